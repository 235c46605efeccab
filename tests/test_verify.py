"""`tidepool verify`: what it shows, and that it notices damage."""

import io
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from tidepool.cli import app
from tidepool.command_line import NO_VLLM
from tidepool.running import process
from tidepool.verify import command, drive, report
from tidepool.verify.messages import Counts, Machine, Outcome
from tidepool.verify.scenarios import (
    ABORTS,
    FAR,
    GPU_PARTS,
    MOVES,
    OTHER,
    PARTS,
    PREEMPTED,
    QUICK_PARTS,
    SCENARIOS,
    SHARED,
    Part,
    Scenario,
    choose_parts,
)
from tidepool.verify.task import ANSWER_TOKENS, MAX_TOKENS
from wrapped_python import run_first

MACHINE = Machine("0.32.0", "2.13.0+cpu", "CPU (x86_64, 2 cores)", certifies=False)
PYTHON = sys.executable
MANY = Counts(12, 123, 45, 1_234_567, 8_901, 0, 9_000_000_000, 7)

# Scenarios.


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
def test_requests_are_the_same_every_time_and_fit(scenario: Scenario) -> None:
    requests = scenario.requests()
    assert requests == scenario.requests()
    again = scenario.requests in (FAR.requests, OTHER.requests)
    assert len({tuple(request.tokens) for request in requests}) * (1 + again) == len(requests) > 10
    assert max(len(request.tokens) for request in requests) + ANSWER_TOKENS <= MAX_TOKENS
    assert {request.question.kind for request in requests} == {"fact", "register"}


def test_every_part_has_its_reference() -> None:
    for parts in (PARTS, QUICK_PARTS, choose_parts(gpu=True, drafts="ngram"), choose_parts(drafts="mtp")):
        assert len(set(parts)) == len(parts)
        stock = {(part.scenario, part.runner) for part in parts if part.side == "stock"}
        assert stock == {(part.scenario, part.runner) for part in parts}
    assert {part.side for part in PARTS} == {"stock", "elastic", "fixed"}
    assert any(part.poison for part in PARTS)


def test_a_gpu_runs_each_side_in_many_processes() -> None:
    parts = choose_parts(gpu=True, drafts="ngram")
    lanes = drive.lanes_of(parts)
    assert sorted(map(repr, parts)) == sorted(repr(part) for lane in lanes for part in lane.parts)
    assert len({lane.name for lane in lanes}) == len(lanes), "a log for each"
    assert max(lane.engines for lane in lanes) == drive.ENGINES_OF_A_LANE
    for lane in lanes:
        assert lane.alone in ("", lane.parts[0].scenario.name)
        assert len({(part.side, part.runner) for part in lane.parts}) == 1
        takes_much = [part for part in lane.parts if part.scenario.far and part.side != "stock"]
        assert takes_much in ([], lane.parts), "beside others there is no room for it"
        for part in lane.parts:
            if part.fault:
                assert replace(part, fault="") in lane.parts, "both on one engine, or side by side"


def test_elsewhere_a_side_has_one_process() -> None:
    assert [lane.name for lane in drive.lanes_of(choose_parts())] == ["elastic", "stock", "fixed"]


# Report.


def outcome_of(scenario: Scenario, counts: Counts = MANY) -> Outcome:
    """All right."""
    answers = {str(number): list(prompt.question.answer) for number, prompt in enumerate(scenario.requests())}
    return Outcome(answers, counts, {}, None, usage_at_end=0.0, seconds=1.0)


def problems_of(outcome: Outcome, *, side: str = "elastic", scenario: Scenario = PREEMPTED) -> tuple[str, ...]:
    """What is wrong with an outcome beside a stock one without fault."""
    part = Part(scenario, side)  # type: ignore[arg-type]
    outcomes = {Part(scenario, "stock"): outcome_of(scenario), part: outcome}
    rows = report.judge(drive.Results(MACHINE, outcomes))
    return next(row.problems for row in rows if row.part == part)


def test_right_answers_are_no_problem() -> None:
    assert problems_of(outcome_of(PREEMPTED)) == ()


def test_a_wrong_answer_is_told() -> None:
    outcome = outcome_of(PREEMPTED)
    right = outcome.answers["3"]
    outcome.answers["3"] = [right[0] ^ 1, *right[1:]]
    wrong, differing = problems_of(outcome)
    assert wrong.startswith("1 wrong, the first to 'ask ")
    assert differing == "1 different from stock vLLM's"


def test_a_request_without_answer_is_told() -> None:
    outcome = outcome_of(PREEMPTED)
    del outcome.answers["3"]
    assert problems_of(outcome) == ("1 without an answer",)
    assert problems_of(replace(outcome, counts=replace(MANY, aborted=1))) == ()


@pytest.mark.parametrize(
    ("scenario", "side", "count", "problem"),
    [
        (PREEMPTED, "elastic", "preemptions", "no request was preempted"),
        (PREEMPTED, "stock", "preemptions", "no request was preempted"),
        (PREEMPTED, "elastic", "moves", None),
        (MOVES, "elastic", "moves", "no extent changed hands"),
        (MOVES, "fixed", "moves", None),
        (SHARED, "elastic", "evictions", "no block was evicted"),
        (SHARED, "elastic", "hit_tokens", "no token was found in the cache"),
        (ABORTS, "elastic", "aborted", "no running request was aborted"),
    ],
)
def test_what_a_scenario_is_about_must_happen(scenario: Scenario, side: str, count: str, problem: str | None) -> None:
    outcome = outcome_of(scenario, replace(MANY, **{count: 0}))
    assert problems_of(outcome, side=side, scenario=scenario) == (
        (f"{problem}, so this proves nothing",) if problem else ()
    )


def test_memory_in_use_at_the_end_is_told() -> None:
    found = problems_of(replace(outcome_of(PREEMPTED), usage_at_end=0.125))
    assert found == ("12.5% of the memory is in use after the last request",)


def printed(results: drive.Results) -> str:
    text = io.StringIO()
    report.print_report(results, report.judge(results), Console(file=text, width=command.WIDTH))
    return text.getvalue()


def test_the_table_fits() -> None:
    outcomes = {part: outcome_of(part.scenario, replace(MANY, aborted=0)) for part in PARTS}
    for part, outcome in outcomes.items():
        if part.fault:
            del outcome.answers["0"][-1]
    results = drive.Results(MACHINE, outcomes)
    lines = printed(results).splitlines()
    assert max(map(len, lines)) <= command.WIDTH
    assert len([line for line in lines if line.rstrip().endswith((" ok", " FAILED"))]) == len(PARTS)
    assert lines[0].startswith("tidepool 0.1.0, vllm 0.32.0, torch 2.13.0+cpu, python 3.")
    assert any("elastic, poison" in line for line in lines)


def test_what_needs_a_gpu_is_not_counted_as_passed() -> None:
    lines = printed(drive.Results(MACHINE, {Part(PREEMPTED, "elastic"): outcome_of(PREEMPTED)})).splitlines()
    (graphs,) = [line for line in lines if line.startswith("CUDA graphs")]
    assert graphs.rstrip().endswith("not run: needs a GPU")
    assert not any(part in PARTS for part in GPU_PARTS)


def test_a_control_that_nobody_notices_fails() -> None:
    control, stock = Part(FAR, "elastic", fault="offsets"), Part(FAR, "stock")
    damaged = outcome_of(FAR)
    results = drive.Results(MACHINE, {stock: outcome_of(FAR), control: damaged})
    (problem,) = report.judge(results)[1].problems
    assert problem == "every answer is right in spite of the damage, so this proves nothing"
    damaged.answers["3"] = [0, 0, 0, 0]
    assert report.judge(results)[1].problems == ()


def test_random_weights_may_part_where_stock_was_of_two_minds() -> None:
    stock = replace(outcome_of(OTHER), answers={"0": [1, 2]}, logprobs={"0": [{"1": -0.1}, {"2": -0.5, "3": -0.9}]})
    counts = replace(MANY, aborted=len(OTHER.requests()) - 1)

    def problems(answer: list[int]) -> tuple[str, ...]:
        outcome = replace(stock, answers={"0": answer}, counts=counts)
        parts = {Part(OTHER, "stock"): replace(stock, counts=counts), Part(OTHER, "elastic"): outcome}
        return report.judge(drive.Results(MACHINE, parts))[1].problems

    assert problems([1, 3]) == ()
    assert problems([1, 4]) == ("1 part from stock vLLM's where that was sure of another token",)


# The command.


def run_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, results: drive.Results) -> Result:
    monkeypatch.setattr("tidepool.command_line.find_spec", lambda name: object())
    monkeypatch.setattr(drive, "run", lambda parts, directory, progress, options: results)
    monkeypatch.setattr(command, "runs_on_gpu", lambda: False)
    return CliRunner().invoke(app, ["verify", "--json", str(tmp_path / "out.json")])


def test_exit_code_and_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    outcomes = {part: outcome_of(PREEMPTED) for part in (Part(PREEMPTED, "stock"), Part(PREEMPTED, "elastic"))}
    assert run_with(monkeypatch, tmp_path, drive.Results(MACHINE, outcomes)).exit_code == 0
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["holds"] is True
    assert content["versions"]["device"] == MACHINE.device
    assert [row["memory"] for row in content["rows"]] == ["stock", "elastic"]
    assert content["rows"][1] | {"right": 12, "answers": 12, "preemptions": 123, "problems": []} == content["rows"][1]

    outcomes[Part(PREEMPTED, "elastic")].answers["0"] = [0, 0, 0, 0]
    failed = run_with(monkeypatch, tmp_path, drive.Results(MACHINE, outcomes))
    assert failed.exit_code == 1
    assert "FAILED: too little memory, elastic: 1 wrong, the first" in failed.output
    assert json.loads((tmp_path / "out.json").read_text())["holds"] is False


def test_a_side_that_ended_early_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result = run_with(monkeypatch, tmp_path, drive.Results(None, {}, ["elastic: out of luck; its log is there."]))
    assert result.exit_code == 1
    assert "FAILED: elastic: out of luck; its log is there." in result.output


def test_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tidepool.command_line.find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["verify"])
    assert result.exit_code == 1
    assert " ".join(result.output.split()) == NO_VLLM


def test_a_place_for_the_numbers_that_is_not_there_is_told_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tidepool.command_line.find_spec", lambda name: object())
    monkeypatch.setattr(drive, "run", lambda *arguments: pytest.fail("it ran"))
    result = CliRunner().invoke(app, ["verify", "--json", str(tmp_path / "nowhere" / "out.json")])
    assert result.exit_code == 2
    assert result.output.strip() == f"There is no directory {tmp_path / 'nowhere'} to write out.json to."


# Processes.


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise SystemExit(3)", "the process ended"),
        ('print(\'{"error": "out of luck"}\', flush=True); raise SystemExit(1)', "out of luck"),
    ],
)
def test_a_failed_worker_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, message: str) -> None:
    run_first(monkeypatch, tmp_path, code)
    results = drive.run([Part(PREEMPTED, "elastic")], tmp_path, lambda done: None)
    assert results.errors == [f"elastic: {message}; its log is {tmp_path / 'elastic.log'}."]


def test_the_others_go_on_when_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_first(monkeypatch, tmp_path, 'print(\'{"error": "out of luck"}\', flush=True); raise SystemExit(1)')
    parts = [Part(PREEMPTED, "elastic"), Part(PREEMPTED, "stock")]
    results = drive.run(parts, tmp_path, lambda done: None)
    assert sorted(error.partition(":")[0] for error in results.errors) == ["elastic", "stock"]


def test_a_silent_worker_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_first(monkeypatch, tmp_path, "import time; time.sleep(60)")
    monkeypatch.setattr(process, "ANSWER_SECONDS", 0.5)
    results = drive.run([Part(PREEMPTED, "elastic")], tmp_path, lambda done: None)
    assert results.errors[0].startswith("elastic: no answer in 0 s; its log is ")


def test_the_switch_of_the_environment_does_not_reach_the_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIDEPOOL", "off")
    code = 'import json, os; print(json.dumps({"error": os.environ["TIDEPOOL"]}), flush=True); raise SystemExit(1)'
    run_first(monkeypatch, tmp_path, code)
    results = drive.run([Part(PREEMPTED, "elastic")], tmp_path, lambda done: None)
    assert results.errors[0].startswith("elastic: elastic; its log is ")


def test_a_slow_worker_is_not_taken_for_a_silent_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each wait is shorter than the limit, all of them together are longer."""
    code = """
import time
for _ in range(6):
    print('{"alive": true}', flush=True)
    time.sleep(0.5)
print('{"error": "out of luck"}', flush=True); raise SystemExit(1)"""
    run_first(monkeypatch, tmp_path, code)
    monkeypatch.setattr(process, "ANSWER_SECONDS", 2.5)
    results = drive.run([Part(PREEMPTED, "elastic")], tmp_path, lambda done: None)
    assert results.errors == [f"elastic: out of luck; its log is {tmp_path / 'elastic.log'}."]


def test_an_interrupt_ends_the_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where only the command got the signal, as when a script sends it."""
    started = tmp_path / "started"
    run_first(monkeypatch, tmp_path, f"import time; open({str(started)!r}, 'w').write('x'); time.sleep(60)")
    # Where the tests themselves run in the background, a shell has them ignore interrupts.
    code = f"""
import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.executable = {sys.executable!r}
from tidepool.verify import drive
from tidepool.verify.scenarios import PREEMPTED, Part
drive.run([Part(PREEMPTED, 'elastic')], Path({str(tmp_path)!r}), print)"""
    # pytest's own interpreter: `run_first` has put its script in the place of `sys.executable`.
    command = subprocess.Popen([PYTHON, "-c", code], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while not started.exists():
            assert time.monotonic() < deadline, "no worker"
            time.sleep(0.05)
        assert running_workers(tmp_path)
        command.send_signal(signal.SIGINT)
        assert command.wait(30) != 0, "the worker sleeps for 60 seconds"
    finally:
        command.kill()
        command.wait()
    assert not running_workers(tmp_path)


def running_workers(tmp_path: Path) -> list[list[str]]:
    """Command lines of processes that run this test's worker."""
    lines = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    return [line for line in lines if str(tmp_path / "python") in line]


def verify(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *parts: Part) -> Result:
    pytest.importorskip("vllm")
    monkeypatch.setattr(command, "choose_parts", lambda **options: parts)
    return CliRunner().invoke(app, ["verify", "--workdir", str(tmp_path)])


@pytest.mark.vllm
@pytest.mark.heavy
def test_verify_end_to_end(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    result = CliRunner().invoke(
        app, ["verify", "--quick", "--workdir", str(tmp_path), "--json", str(tmp_path / "out.json")]
    )
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert len(rows) == len(QUICK_PARTS)
    assert all(row["right"] == row["answers"] > 10 for row in rows)


DAMAGE = {
    "copies of states are dropped": "worker.ArenaBytes.copy = lambda self, copies: None",
    "running states are zeroed": """
apply, calls = worker.ArenaBytes.apply, []
def zero_too(self, operations):
    apply(self, operations)
    calls.append(None)
    self.block(0, 2 + len(calls) % 8).zero_()
worker.ArenaBytes.apply = zero_too""",
}


@pytest.mark.vllm
@pytest.mark.parametrize("code", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    run_first(monkeypatch, tmp_path, "import vllm\nfrom tidepool.vllm_plugin import worker\n" + code)
    result = verify(monkeypatch, tmp_path, Part(SHARED, "elastic"))
    assert result.exit_code == 1
    assert " wrong, the first to " in result.output


@pytest.mark.vllm
def test_a_leak_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
import vllm
from tidepool.vllm_plugin.pools import GroupBlockPool
free, calls = GroupBlockPool.free_blocks, []
def lose_one(self, blocks):
    calls.append(None)
    free(self, list(blocks)[len(calls) == 5 :])
GroupBlockPool.free_blocks = lose_one"""
    run_first(monkeypatch, tmp_path, code)
    result = verify(monkeypatch, tmp_path, Part(PREEMPTED, "elastic"))
    assert result.exit_code == 1
    assert "of the memory is in use after the last request" in result.output

import io
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from math import inf
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from tidepool.cli import app
from tidepool.compare import drive, report
from tidepool.compare.agreement import first_gap
from tidepool.compare.messages import Facts, Job, Run, Side
from tidepool.compare.workloads import CHAT, LONG, MAX_MODEL_LEN, WORKLOADS, Workload, halved, make_conversations

# Workloads.


def test_a_seed_gives_the_same_requests() -> None:
    assert make_conversations(CHAT, 512) == make_conversations(CHAT, 512)
    assert make_conversations(CHAT, 512) != make_conversations(CHAT, 512, seed=1)


@pytest.mark.parametrize("workload", [*WORKLOADS, *map(halved, WORKLOADS)])
def test_requests_are_as_described(workload: Workload) -> None:
    conversations = make_conversations(workload, 512)
    assert len(conversations) == workload.conversations
    for turns in conversations:
        assert len(turns) == workload.turns
        assert all(len(turn.prompt) + turn.answer <= MAX_MODEL_LEN for turn in turns)
        assert all(0 < token < 512 for turn in turns for token in turn.prompt)


def test_a_turn_repeats_the_ones_before() -> None:
    conversations = make_conversations(CHAT, 512)
    for turns in conversations:
        for before, after in pairwise(turns):
            assert after.prompt[: len(before.prompt)] == before.prompt
    shared = conversations[0][0].prompt[: CHAT.shared[0]]
    assert conversations[CHAT.system_prompts][0].prompt[: CHAT.shared[0]] == shared
    assert conversations[1][0].prompt[: CHAT.shared[0]] != shared


# Results.


NEAR, FAR = 90, 91
"""Tokens that a reference finds as good as its own, and far worse."""


def run_of(*, peak: int = 10, cpu: float = 1.0, hits: int = 0, outputs: Sequence[int] = (7, 8)) -> Run:
    """A run of one-token answers: request i answers ``outputs[i]``."""
    answers = {f"{index}.0": [token] for index, token in enumerate(outputs)}
    logprobs = {name: [{str(token): -0.1, str(NEAR): -0.2, str(FAR): -9.0}] for name, (token,) in answers.items()}
    return Run(2 * cpu, cpu, 5, peak, peak / 2, 0, 100, hits, len(answers), answers, logprobs)


def result_of(runs: dict[str, dict[Side, list[Run]]]) -> report.ModelResult:
    facts = Facts(False, 640, 4, 114_560, 1_000, 256)
    sides = next(iter(runs.values())).keys()
    memory = {side: replace(facts, served=side != "stock") for side in sides}
    subject = drive.Subject("tiny", Path("tiny"), 130_000_000, tuple(each for each in WORKLOADS if each.name in runs))
    return report.summarize(drive.Measured(subject, {False: memory, True: memory}, runs))


def test_speed_is_the_median_of_paired_runs() -> None:
    stock = [run_of(cpu=1.0), run_of(cpu=2.0), run_of(cpu=8.0)]
    elastic = [run_of(cpu=0.5), run_of(cpu=1.6), run_of(cpu=8.0)]
    values = result_of({"short": {"stock": stock, "elastic": elastic}}).workloads[0].sides
    assert values["elastic"].speed_ratio == pytest.approx(1.25)
    assert values["stock"].speed_ratio == 1


def test_the_first_gap_is_where_answers_part() -> None:
    logprobs = [{"1": -0.1, "5": -3.0}, {"2": -0.5, "6": -0.75}, {"3": -0.2}]
    assert first_gap([1, 2, 3], logprobs, [1, 2, 3]) is None
    assert first_gap([1, 2, 3], logprobs, [1, 6, 9]) == pytest.approx(0.25)
    assert first_gap([1, 2, 3], logprobs, [5, 6, 9]) == pytest.approx(2.9)
    assert first_gap([1, 2, 3], logprobs, [1, 9, 3]) == inf, "not among the likely ones"
    assert first_gap([1, 2, 3], logprobs, [1, 2]) == inf


def test_rounding_is_told_from_wrong_answers() -> None:
    runs: dict[Side, list[Run]] = {"stock": [run_of()], "elastic": [run_of(outputs=(NEAR, 8))]}
    result = result_of({"short": runs})
    assert result.workloads[0].sides["elastic"].agreement == report.Agreement(2, 1, 1)
    assert report.failures([result]) == []
    assert "yes, 1 of 2*" in printed(result)
    same = result_of({"short": {"stock": [run_of()], "elastic": [run_of()]}})
    assert [len(report.notes(results)) for results in ([same], [same, result])] == [1, 3], "a star has its note"
    assert all(len(note) < 100 for note in report.notes([result]))


@pytest.mark.parametrize("token", [FAR, 9])
def test_an_output_must_agree_in_every_repeat(token: int) -> None:
    runs: dict[Side, list[Run]] = {"stock": [run_of()] * 2, "elastic": [run_of(), run_of(outputs=(7, token))]}
    found = report.failures([result_of({"short": runs})])
    assert found == ["tiny, short chats: 1 outputs of elastic differ from stock's."]


@pytest.mark.parametrize(
    ("workload", "side", "fails"),
    [("short", "elastic", True), ("long", "elastic", True), ("long", "fixed", False), ("chat", "elastic", False)],
)
def test_fewer_requests_than_stock_fail_only_where_promised(workload: str, side: Side, fails: bool) -> None:
    runs: dict[Side, list[Run]] = {"stock": [run_of(peak=10)], side: [run_of(peak=9)]}
    assert bool(report.failures([result_of({workload: runs})])) == fails


def test_outputs_must_agree_with_prefix_caching() -> None:
    runs: dict[Side, list[Run]] = {"stock": [run_of()], "elastic": [run_of(outputs=(0, 0), hits=640)]}
    result = result_of({"chat": runs})
    assert report.failures([result]) == ["tiny, shared prefixes: 2 outputs of elastic differ from stock's."]
    assert "NO, 0 of 2" in printed(result)


def printed(result: report.ModelResult) -> str:
    text = io.StringIO()
    report.print_result(result, Console(file=text, width=100))
    return text.getvalue()


def test_tables_fit_in_100_columns() -> None:
    sides: dict[Side, list[Run]] = {
        "stock": [run_of(peak=123, hits=1_234_567)],
        "elastic": [run_of(peak=234, outputs=(7, NEAR))],
        "fixed": [run_of(peak=234)],
    }
    lines = printed(result_of({"short": sides, "long": sides, "chat": sides})).splitlines()
    assert max(map(len, lines)) <= 100
    assert sum("elastic" in line for line in lines) == 4
    assert any("234 (1.90x)" in line and "yes, 1 of 2*" in line for line in lines)
    assert any("1,234,567" in line for line in lines)


def test_json_holds_what_the_table_holds() -> None:
    result = result_of({"short": {"stock": [run_of(peak=10)], "elastic": [run_of(peak=9)]}})
    content = json.loads(json.dumps(report.to_json([result])))
    assert content["holds"] is False
    assert "ran 9 requests at once, stock 10" in content["failures"][0]
    model = content["models"][0]
    assert model["memory"]["caching_off"]["elastic"]["served"] is True
    assert model["workloads"][0]["sides"]["elastic"]["peak_ratio"] == pytest.approx(0.9)


def test_fixed_limit_follows_from_the_memory() -> None:
    assert drive.fixed_max_num_seqs(100_000_000, 1_500_000) == 40
    assert drive.fixed_max_num_seqs(100_000_000, 0) == drive.MAX_NUM_SEQS
    assert drive.fixed_max_num_seqs(1_000, 1_500_000) == 1


# Processes.


def test_user_settings_win_in_workers() -> None:
    environ = drive.worker_environment({"OMP_NUM_THREADS": "4"})
    assert environ["OMP_NUM_THREADS"] == "4"
    assert environ["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert "VLLM_PLUGINS" not in environ


@pytest.mark.parametrize("plugins", ["", "other"])
def test_workers_have_the_plugin_even_if_the_user_chose_others(plugins: str) -> None:
    chosen = drive.worker_environment({"VLLM_PLUGINS": plugins})["VLLM_PLUGINS"].split(",")
    assert chosen == [*filter(None, [plugins]), "tidepool", "tidepool_early"]


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("raise SystemExit(3)", "the process ended"),
        ('input(); print(\'{"error": "out of luck"}\')', "out of luck"),
    ],
)
def test_a_failed_worker_names_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, message: str
) -> None:
    fake = tmp_path / "python"
    fake.write_text(f"#!{sys.executable}\n{script}\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    with (
        drive.Worker(Job("models/tiny", 1), "stock", tmp_path, {}) as worker,
        pytest.raises(drive.CompareError, match=rf"\(tiny, stock\): {message}; its log is .*stock\.log"),
    ):
        worker.start(caching=False, max_num_seqs=1)


@pytest.mark.vllm
@pytest.mark.heavy
def test_compare_end_to_end(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    from tidepool.tiny import make_checkpoint

    model = make_checkpoint("qwen3.5", tmp_path / "tiny")
    arguments = ["compare", "--quick", "--model", str(model), "--kv-memory", "65MB"]
    arguments += ["--workdir", str(tmp_path), "--json", str(tmp_path / "out.json")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["holds"] is True
    memory = content["models"][0]["memory"]["caching_off"]
    assert memory["elastic"]["served"]
    assert not memory["stock"]["served"]
    short = content["models"][0]["workloads"][0]["sides"]["elastic"]
    assert short["peak_ratio"] >= 1.15
    assert LONG.title in result.output


@pytest.mark.vllm
def test_stock_is_not_compared_with_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm")
    from tidepool.tiny import make_checkpoint

    python = tmp_path / "python"
    python.write_text(f"""#!{sys.executable}
import runpy, sys
sys.argv[:] = sys.argv[2:]
import vllm
from tidepool.vllm_plugin import gates
gates.GATES += (gates.Gate("test", "this is a test", lambda config: True),)
runpy.run_module("tidepool.compare.worker", run_name="__main__")
""")
    python.chmod(0o755)
    job = Job(str(make_checkpoint("qwen3.5", tmp_path / "tiny")), 65_000_000)
    monkeypatch.setattr(sys, "executable", str(python))
    with (
        drive.Worker(job, "elastic", tmp_path, drive.worker_environment(os.environ)) as worker,
        pytest.raises(drive.CompareError, match=r"\(tiny, elastic\): tidepool falls back .* this is a test; its log"),
    ):
        worker.start(caching=False, max_num_seqs=8)

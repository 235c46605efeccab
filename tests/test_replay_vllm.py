"""Small replays through vLLM's real engine core, each mode in a process of its own."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tidepool.cache import FullAttention, State, StateFormat
from tidepool.models import entry
from tidepool.replay.generate import generate
from tidepool.replay.job import Job, Mode, Result
from tidepool.replay.model import find_replay_model
from tidepool.replay.parent import run_jobs
from tidepool.replay.report import Report, Setting
from tidepool.replay.table import print_report
from tidepool.replay.workload import load_workload
from tidepool.running.unpacked import UnpackError, environment_with
from tidepool.vllm_plugin.versions import series_here

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm")

REQUESTS, MEMORY = 60, 1 << 30
QUIET = Console(file=io.StringIO(), width=120)


def job(mode: Mode) -> Job:
    return Job(mode, entry("Qwen3.5-0.8B").config, "4090", MEMORY, None, "hot-prefix", REQUESTS, 0, 1.0, 32, 2048)


def run_all(jobs: list[Job], environ: Mapping[str, str] = os.environ) -> tuple[list[Result], dict[Mode, str]]:
    """Run jobs of one workload."""
    return run_jobs(jobs, load_workload(jobs[0]).requests, QUIET, environ)


@pytest.fixture(scope="module")
def results() -> dict[Mode, Result]:
    modes: tuple[Mode, ...] = ("stock", "elastic", "bound")
    made, failures = run_all([job(mode) for mode in modes])
    assert not failures
    return {result.mode: result for result in made}


def test_every_mode_serves_the_same_requests(results: dict[Mode, Result]) -> None:
    workload = generate("hot-prefix", REQUESTS, 0)
    for result in results.values():
        assert result.requests == REQUESTS
        assert result.prompt_tokens == sum(request.input_tokens for request in workload)
        assert result.output_tokens == sum(request.output_tokens for request in workload)
        assert 0 <= result.hit_tokens < result.prompt_tokens
        assert 0 < result.ttft.p50 <= result.ttft.p99 < result.makespan
        assert result.tpot
        assert 0 < result.tpot.p50 < result.e2e.p50 <= result.e2e.p99 < result.makespan
        assert result.ttft.mean < result.e2e.mean
        assert 0 < result.running_mean <= result.running_peak <= 32
        assert result.scheduler_median > 0


def test_every_byte_has_a_use(results: dict[Mode, Result]) -> None:
    for result in results.values():
        assert all(sum(sample.uses) == MEMORY and min(sample.uses) >= 0 for sample in result.samples)
        assert max(sample.uses[1] for sample in result.samples) > 0
    assert max(sample.uses[0] for sample in results["bound"].samples) == 0
    assert max(sample.uses[0] for sample in results["elastic"].samples) > 0


def test_another_version_hits_as_much(results: dict[Mode, Result]) -> None:
    """On vLLM 0.33, whose Python files `make test` unpacks."""
    if series_here() != "0.32":
        pytest.skip("this runs beside the installed version")
    try:
        environ = environment_with("0.33.0", os.environ)
    except UnpackError as error:
        pytest.skip(str(error))
    made, failures = run_all([job("stock"), job("elastic")], environ)
    assert not failures
    for result in made:
        assert abs(result.hit_rate - results[result.mode].hit_rate) <= 0.005
        assert result.groups == results[result.mode].groups, "the same plan"


def test_the_bound_finds_the_hot_prefix(results: dict[Mode, Result]) -> None:
    assert results["bound"].hit_rate > 0.7
    assert results["bound"].ttft.mean <= results["stock"].ttft.mean


def test_groups_are_as_planned(results: dict[Mode, Result]) -> None:
    assert [group.kind for group in results["stock"].groups] == ["state"] * 3 + ["attention"]
    assert results["stock"].block_tokens > 16
    assert [group.kind for group in results["elastic"].groups] == ["state", "attention"]
    assert results["elastic"].block_tokens == results["bound"].block_tokens == 16
    assert results["elastic"].extents_moved is not None
    assert results["stock"].extents_moved is None


def test_the_table_shows_every_mode(results: dict[Mode, Result]) -> None:
    report = Report(Setting("m", "4090", MEMORY, "hot-prefix", 1.0, 32, 2048), list(results.values()))
    console = Console(file=io.StringIO(), width=120)
    print_report(report, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "stock vLLM" in text
    assert "attention only" in text
    assert set(json.loads(json.dumps(report.to_dict()))["modes"]) == {"stock", "elastic", "bound"}


def test_prompts_that_part_before_their_ends_find_a_state() -> None:
    """Questions about documents: the first few teach where prompts part, and later documents leave a state there. A
    state at the end and one where prompts were seen to part would give 19% here, attention alone 61%."""
    asked = replace(job("elastic"), workload="documents", requests=80, kv_bytes=8 << 30, gpu="H100")
    made, failures = run_all([asked])
    assert not failures
    assert made[0].hit_rate > 0.45


def test_answers_are_hit_by_the_next_turn() -> None:
    """Attention of everything is kept. The chat's prompts are the same, whether answers are in them or others' text."""
    asked = replace(job("bound"), workload="chat", kv_bytes=4 << 30, gpu="H100")
    shares = []
    for each in (asked, replace(asked, drop_reasoning=1.0)):
        (result,), _ = run_all([each])
        shares.append(result.hit_rate)
    told, dropped = shares
    assert dropped + 0.1 < told


@pytest.mark.parametrize("state_format", ["bfloat16", "int8"])
def test_packed_states_leave_room_for_more(state_format: StateFormat) -> None:
    """Chats that don't all fit: more of what comes back is found, and every byte still has a use."""
    whole = replace(job("elastic"), workload="chat", requests=120, kv_bytes=1 << 29)
    made, failures = run_all([whole])
    packed, more = run_all([replace(whole, checkpoint_states=state_format)])
    assert not failures
    assert not more
    assert packed[0].hit_tokens > 1.1 * made[0].hit_tokens
    assert [group.kind for group in packed[0].groups] == ["state", "attention", "packed state"]
    for sample in packed[0].samples:
        assert sum(sample.uses) == whole.kv_bytes
        assert min(sample.uses) >= 0


def test_devices_and_formats_are_planned_as_asked() -> None:
    """Of two devices each keeps half the states, and of attention half in half the bytes, in blocks of 32 tokens."""
    asked = replace(job("elastic"), tp=2, kv_dtype="fp8", prefix_caching=False, block_size=32)
    (made,), failures = run_all([asked])
    assert not failures
    caches = find_replay_model("Qwen3.5-0.8B").shapes.layer_caches(asked.cache_options()).values()
    states = sum(cache.bytes for cache in caches if isinstance(cache, State))
    token = sum(cache.bytes_per_token for cache in caches if isinstance(cache, FullAttention))
    assert [group.natural_bytes for group in made.groups] == [states, 32 * token]
    assert made.block_tokens == 32
    assert made.hit_tokens == 0


def test_drafts_and_salts(tmp_path: Path) -> None:
    """A prompt that comes again and again for two adapters; every draft is accepted."""
    lines = [
        {"timestamp": 10_000 * place, "token_ids": [*range(2_000)], "output_length": 40, "lora": place % 2}
        for place in range(6)
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    asked = replace(job("elastic"), trace=str(tmp_path / "t.jsonl"), workload=None, draft_tokens=3, acceptance=1.0)
    (made,), failures = run_all([asked])
    assert not failures
    each = made.hit_tokens // 4
    assert each > 1_500, "all but the first of each adapter"
    assert each * 4 == made.hit_tokens
    assert made.requests * 10 <= made.steps <= made.requests * 13, "four tokens a step, behind the prompt's"


def test_hits_of_both_tiers_are_counted() -> None:
    """Chats on little memory: what host memory gives back is a part of the hits, with vLLM's own offloading too."""
    asked = replace(
        job("stock"), workload="chat", requests=120, kv_bytes=500 << 20, max_num_seqs=16, host_bytes=8 << 30
    )
    made, failures = run_all([asked, replace(asked, mode="elastic")])
    assert not failures
    for result in made:
        assert result.host
        assert 0 < result.host.loaded_tokens < result.hit_tokens
        assert result.host.loaded_bytes > 0 < result.host.stored_bytes
        assert result.host.waited > 0


def test_too_little_memory_is_said() -> None:
    made, failures = run_all([replace(job("stock"), kv_bytes=50 << 20)])
    assert not made
    assert "memory" in failures["stock"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("moment", [0, 8], ids=["at once", "later"])
def test_a_child_and_all_folders_go_with_the_parent(tmp_path: Path, number: signal.Signals, moment: float) -> None:
    command = [sys.executable, "-m", "tidepool", "replay", "--generate", "random", "--requests", "3000"]
    environ = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as parent:
        (child,) = until(lambda: Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split())
        time.sleep(moment)
        assert list(tmp_path.iterdir())
        parent.send_signal(number)
    assert parent.returncode in (-number, 128 + number)
    until(lambda: not Path(f"/proc/{child}").exists() and not list(tmp_path.iterdir()))


def until(found: Callable[[], Any]) -> Any:
    """What is found, once something is."""
    deadline = time.monotonic() + 60
    while not (answer := found()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return answer


def test_one_request_too_long_leaves_the_others(tmp_path: Path) -> None:
    """Also one that is exactly as long as the model allows; what a replay writes beside its results is gone."""
    config = entry("Qwen3.5-0.8B").config | {"max_position_embeddings": 2_000}
    wrapper = {"model_type": "qwen3_5", "architectures": ["Qwen3_5ForConditionalGeneration"], "auto_map": {"a": "b.C"}}
    (tmp_path / "config.json").write_text(json.dumps(wrapper | {"text_config": config}), "utf-8")
    lengths = (100, 1_990, 1_991)
    trace = "\n".join(json.dumps({"token_ids": [*range(length)], "output_length": 10}) for length in lengths)
    (tmp_path / "t.jsonl").write_text(trace, "utf-8")
    (tmp_path / "temporary").mkdir()
    options = [
        "t.jsonl",
        "--model",
        ".",
        "--modes",
        "elastic",
        "--memory",
        "1GiB",
        "--json",
        "r.json",
        "--html",
        "r.html",
        "--gpu",
        "4090",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "tidepool", "replay", *options],
        cwd=tmp_path,
        env=os.environ | {"TMPDIR": str(tmp_path / "temporary")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "r.json").read_text("utf-8"))
    assert content["modes"]["elastic"]["requests"] == 2
    assert [each["line"] for each in content["skipped"]] == [3]
    assert "longer than the 2,000 tokens that are served (line 3)" in " ".join(done.stdout.split())
    assert not list((tmp_path / "temporary").iterdir())

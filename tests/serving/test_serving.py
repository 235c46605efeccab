"""Real vLLM on the CPU, stock and tidepool, on the same bytes and the same requests.

What is compared, and why this way: with prefix caching off every side computes the same prompts whole, so tokens must
be equal. With prefix caching on prompts are resumed in the middle, and bfloat16 rounds differently there; stock vLLM
differs from itself in the same way. So at the first token that differs, the reference's log-probabilities of the two
tokens must be as good as equal, see `BFLOAT16_GAP`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from answers import assert_same_answers, gaps, tokens
from tidepool.compare.agreement import BFLOAT16_GAP
from tidepool.tiny import Family, make_checkpoint

pytestmark = pytest.mark.vllm
FAMILIES: tuple[Family, ...] = ("qwen3.5", "nemotron-h")

MIXED = {
    "requests": 72,
    "own_lengths": [20, 40, 60, 150, 300, 620, 750],
    "shared_lengths": [],
    "output_tokens": 40,
    "rounds": 1,
    "prefix_caching": False,
}
SHARED = {
    "requests": 30,
    "own_lengths": [20, 60, 150, 400],
    "shared_lengths": [300, 500, 700],
    "output_tokens": 16,
    "rounds": 2,
    "prefix_caching": True,
}
KV_BYTES = {"qwen3.5": 52_000_000, "nemotron-h": 48_000_000}
FIXED_SEQS = {"qwen3.5": 26, "nemotron-h": 16}
SHARED_KV_BYTES = {"qwen3.5": 28_000_000, "nemotron-h": 56_000_000}


@cache
def checkpoint(family: Family) -> Path:
    root = Path(os.environ["TIDEPOOL_TEST_MODELS"])
    return make_checkpoint(family, root / family)


@pytest.fixture(scope="session", autouse=True)
def models_directory(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["TIDEPOOL_TEST_MODELS"] = str(tmp_path_factory.mktemp("models"))


@cache
def _serve(family: Family, side: str, workload: str, poison: bool, corrupt: bool, caching: bool) -> dict[str, Any]:
    shared = workload == "shared"
    answer = Path(os.environ["TIDEPOOL_TEST_MODELS"]) / f"{family}-{side}-{workload}-{poison}-{corrupt}-{caching}.json"
    job = (SHARED if shared else MIXED) | {
        "model": str(checkpoint(family)),
        "side": side,
        "poison": poison,
        "corrupt": corrupt,
        "kv_bytes": (SHARED_KV_BYTES if shared else KV_BYTES)[family],
        "max_num_seqs": 5 if shared else FIXED_SEQS[family] if side == "fixed" else 128,
        "prefix_caching": caching,
        "seed": 3,
        "answer": str(answer),
    }
    # One thread: rounding must not depend on how many cores a machine has.
    environ = os.environ | {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("child.py"))],
        input=json.dumps(job),
        text=True,
        capture_output=True,
        env=environ,
        timeout=540,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    result: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    assert result["served"] == (side != "stock")
    assert result["in_use_at_end"] == 0, "blocks leaked"
    return result


def serve(
    family: Family, side: str, workload: str, *, poison: bool = False, corrupt: bool = False, caching: bool = False
) -> dict[str, Any]:
    return _serve(family, side, workload, poison, corrupt, caching)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_equal_stock_through_preemption(family: Family) -> None:
    stock = serve(family, "stock", "mixed")
    assert len({tuple(t) for t in tokens(stock)}) == MIXED["requests"], "outputs that don't discriminate prove nothing"
    preemptions = 0
    for side in ("elastic", "fixed"):
        result = serve(family, side, "mixed")
        assert_same_answers(stock, result)
        preemptions += result["preemptions"]
    assert stock["preemptions"] > 0
    assert preemptions > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_nobody_reads_what_it_does_not_own(family: Family) -> None:
    """Poison: freed and moved memory is filled with NaN and huge values; outputs don't change."""
    for side, workload, caching in [
        ("elastic", "mixed", False),
        ("fixed", "mixed", False),
        ("elastic", "shared", True),
    ]:
        clean = serve(family, side, workload, caching=caching)
        poisoned = serve(family, side, workload, caching=caching, poison=True)
        assert tokens(poisoned) == tokens(clean), side


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["elastic", "fixed"])
def test_prefix_hits_give_the_same_answers(family: Family, side: str) -> None:
    reference = serve(family, "stock", "shared", caching=False)
    result = serve(family, side, "shared", caching=True)
    assert result["cached_tokens"] > 1000, "nothing was reused"
    if side == "elastic":
        assert result["moves"] > 0, "no extent changed hands"
    assert all(gap <= BFLOAT16_GAP for gap in gaps(reference, result)), gaps(reference, result)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_check_catches_a_corrupted_state(family: Family) -> None:
    reference = serve(family, "stock", "shared", caching=False)
    corrupted = serve(family, "elastic", "shared", caching=True, corrupt=True, poison=True)
    assert sum(gap > BFLOAT16_GAP for gap in gaps(reference, corrupted)) >= 5

"""Real vLLM on the CPU, stock and tidepool, on the same bytes and the same requests, with prefix caching off.

Every side computes the same prompts whole, so tokens must be equal.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import engines
from answers import assert_same_answers, tokens
from asking import make_prompts
from tidepool.tiny import Family

pytestmark = pytest.mark.vllm
FAMILIES: tuple[Family, ...] = ("qwen3.5", "nemotron-h")
PROMPTS = make_prompts({"requests": 72, "own_lengths": [20, 40, 60, 150, 300, 620, 750], "shared_lengths": []})
KV_BYTES = {"qwen3.5": 52_000_000, "nemotron-h": 48_000_000}
FIXED_SEQS = {"qwen3.5": 26, "nemotron-h": 16}
Serve = Callable[..., dict[str, Any]]


@pytest.fixture
def serve(checkpoint: Callable[[Family], Path]) -> Serve:
    def serve(family: Family, side: str, **changes: Any) -> dict[str, Any]:
        job = {
            "model": str(checkpoint(family)),
            "side": side,
            "kv_bytes": KV_BYTES[family],
            "max_num_seqs": FIXED_SEQS[family] if side == "fixed" else 128,
            "prompts": PROMPTS,
            "output_tokens": 40,
        }
        return engines.serve(job | changes)

    return serve


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_equal_stock_through_preemption(serve: Serve, family: Family) -> None:
    stock = serve(family, "stock")
    assert len({tuple(t) for t in tokens(stock)}) == len(PROMPTS), "outputs that don't discriminate prove nothing"
    preemptions = 0
    for side in ("elastic", "fixed"):
        result = serve(family, side)
        assert_same_answers(stock, result)
        preemptions += result["preemptions"]
    assert stock["preemptions"] > 0
    assert preemptions > 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["elastic", "fixed"])
def test_nobody_reads_what_it_does_not_own(serve: Serve, family: Family, side: str) -> None:
    """Poison: freed and moved memory is filled with NaN and huge values; outputs don't change."""
    assert tokens(serve(family, side, poison=True)) == tokens(serve(family, side))

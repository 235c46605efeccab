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
from tidepool.testing.tiny import Family

pytestmark = pytest.mark.vllm
FAMILIES: tuple[Family, ...] = ("qwen3.5", "nemotron-h")
PROMPTS = make_prompts({"requests": 40, "own_lengths": [20, 60, 150, 300, 620, 630], "shared_lengths": []})
KV_BYTES = {"qwen3.5": 29_000_000, "nemotron-h": 27_000_000}
FIXED_SEQS = {"qwen3.5": 15, "nemotron-h": 9}
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
    """Under poison: freed and moved memory is filled with NaN and huge values, so nobody reads what it doesn't own."""
    stock = serve(family, "stock")
    assert len({tuple(t) for t in tokens(stock)}) == len(PROMPTS), "outputs that don't discriminate prove nothing"
    preemptions = 0
    for side in ("elastic", "fixed"):
        result = serve(family, side, poison=True)
        assert_same_answers(stock, result)
        preemptions += result["preemptions"]
        if side == "elastic":
            assert result["moves"] > 0, "no extent changed hands"
    assert preemptions > 0


def test_without_poison(serve: Serve) -> None:
    assert tokens(serve("nemotron-h", "elastic", poison=False)) == tokens(serve("nemotron-h", "elastic", poison=True))

"""Real vLLM on the CPU with prefix caching on: what was found in the cache gives the same answers.

Prompts are resumed in the middle, and bfloat16 rounds differently there; stock vLLM differs from itself in the same
way. So at the first token that differs, the reference's log-probabilities of the two tokens must be as good as equal,
see `BFLOAT16_GAP`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import engines
from answers import gaps, tokens
from asking import make_prompts
from tidepool.running.agreement import BFLOAT16_GAP
from tidepool.testing.tiny import Family

pytestmark = pytest.mark.vllm
FAMILIES: tuple[Family, ...] = ("qwen3.5", "nemotron-h")
PROMPTS = [
    *make_prompts({"requests": 14, "own_lengths": [20, 60, 150, 400], "shared_lengths": [300, 500, 700]}),
    *make_prompts({"requests": 3, "own_lengths": [1_500], "shared_lengths": []}),
]
"""The last ones need much attention and few states, so extents change hands."""
KV_BYTES = {"qwen3.5": 24_500_000, "nemotron-h": 56_000_000}
Serve = Callable[..., dict[str, Any]]


@pytest.fixture
def serve(checkpoint: Callable[[Family], Path]) -> Serve:
    def serve(family: Family, side: str, *, caching: bool = True, **changes: Any) -> dict[str, Any]:
        job = {
            "model": str(checkpoint(family)),
            "side": side,
            "kv_bytes": KV_BYTES[family],
            "max_num_seqs": 5,
            "prefix_caching": caching,
            "prompts": PROMPTS,
            "output_tokens": 16,
            "rounds": 2,
        }
        return engines.serve(job | changes)

    return serve


def asked_twice(serve: Serve, family: Family) -> dict[str, Any]:
    """What stock vLLM answers without prefix caching, where the second round is as the first."""
    return {"answers": serve(family, "stock", caching=False, rounds=1)["answers"] * 2}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["elastic", "fixed"])
def test_prefix_hits_give_the_same_answers(serve: Serve, family: Family, side: str) -> None:
    """Under poison: freed and moved memory is filled with NaN and huge values, so nobody reads what it doesn't own."""
    reference = asked_twice(serve, family)
    result = serve(family, side, poison=True)
    assert result["cached_tokens"] > 1000, "nothing was reused"
    if side == "elastic":
        assert result["moves"] > 0, "no extent changed hands"
    assert all(gap <= BFLOAT16_GAP for gap in gaps(reference, result)), gaps(reference, result)


def test_without_poison(serve: Serve) -> None:
    assert tokens(serve("nemotron-h", "elastic")) == tokens(serve("nemotron-h", "elastic", poison=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_states_given_up_for_want_of_memory(serve: Serve, family: Family) -> None:
    """Many requests at once in the same memory: some go on in the block of a state that they had left; under poison."""
    result = serve(family, "elastic", poison=True, max_num_seqs=32)
    assert result["given_up"] >= 5
    reference = asked_twice(serve, family)
    assert all(gap <= BFLOAT16_GAP for gap in gaps(reference, result)), gaps(reference, result)


@pytest.mark.parametrize(("family", "interval"), [("qwen3.5", None), ("nemotron-h", 1_024)])
def test_retained_states_give_the_same_answers(serve: Serve, family: Family, interval: int | None) -> None:
    """States kept on the way through a prompt as well, with its steps cut short; under poison."""
    reference = asked_twice(serve, family)
    options = {"prefix_cache_retention_interval": interval, "long_prefill_token_threshold": 600}
    result = serve(family, "elastic", poison=True, engine=options)
    assert result["cached_tokens"] > 1000, "nothing was reused"
    assert all(gap <= BFLOAT16_GAP for gap in gaps(reference, result)), gaps(reference, result)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_check_catches_a_corrupted_state(serve: Serve, family: Family) -> None:
    reference = asked_twice(serve, family)
    corrupted = serve(family, "elastic", fault="state copies dropped", poison=True)
    assert sum(gap > BFLOAT16_GAP for gap in gaps(reference, corrupted)) >= 5

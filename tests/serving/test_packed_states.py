"""Real vLLM on the CPU with packed states: what was packed, relocated and unpacked again gives the same answers.

Rounding a state changes what is computed behind it by about as much as bfloat16 does, so answers are compared as in
test_prefix_hits.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import engines
from answers import gaps
from asking import make_prompts
from tidepool.running.agreement import BFLOAT16_GAP
from tidepool.testing.tiny import Family

pytestmark = pytest.mark.vllm
PROMPTS = make_prompts({"requests": 20, "own_lengths": [20, 60, 150, 400], "shared_lengths": [300, 500, 700]})
KV_BYTES = {"qwen3.5": 26_000_000, "nemotron-h": 66_000_000}
"""Fewer than the prompts leave: states are relocated and evicted."""
Serve = Callable[..., dict[str, Any]]


@pytest.fixture
def serve(checkpoint: Callable[[Family], Path]) -> Serve:
    def serve(family: Family, state_format: str | None, *, side: str = "elastic", **changes: Any) -> dict[str, Any]:
        settings = {"checkpoint_states": state_format} if state_format else {}
        job = {
            "model": str(checkpoint(family)),
            "side": side,
            "kv_bytes": KV_BYTES[family],
            "max_num_seqs": 5,
            "prefix_caching": side != "stock",
            "prompts": PROMPTS,
            "output_tokens": 16,
            "rounds": 2,
            "poison": side != "stock",
            "engine": {"additional_config": {"tidepool": settings}},
        }
        return engines.serve(job | changes)

    return serve


@pytest.mark.parametrize(
    ("family", "state_format"), [("qwen3.5", "bfloat16"), ("qwen3.5", "int8"), ("nemotron-h", "int8")]
)
def test_packed_states_give_the_same_answers(serve: Serve, family: Family, state_format: str) -> None:
    """Under poison, with little room."""
    reference = {"answers": serve(family, None, side="stock", rounds=1)["answers"] * 2}
    result = serve(family, state_format)
    assert result["cached_tokens"] > 1000, "nothing was reused"
    assert result["packed"] > len(PROMPTS), "no state was packed"
    assert result["unpacked"] > 5, "no packed state was hit"
    assert all(gap <= BFLOAT16_GAP for gap in gaps(reference, result)), gaps(reference, result)


def test_more_comes_back_from_the_same_memory(serve: Serve) -> None:
    whole, packed = (serve("qwen3.5", state_format)["cached_tokens"] for state_format in (None, "int8"))
    assert packed > 1.2 * whole


@pytest.mark.parametrize("fault", ["states packed wrong", "states not unpacked"])
def test_the_check_catches_a_wrong_state(serve: Serve, fault: str) -> None:
    reference = {"answers": serve("qwen3.5", None, side="stock", rounds=1)["answers"] * 2}
    wrong = serve("qwen3.5", "int8", fault=fault)
    assert sum(gap > BFLOAT16_GAP for gap in gaps(reference, wrong)) >= 3

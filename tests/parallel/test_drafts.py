"""Drafts on two tensor ranks, with prefix caching. What is compared, and why this way, is in tests/speculative."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import engines
from answers import gaps
from habits import tiny_prompts
from tidepool.running.agreement import BFLOAT16_GAP
from tidepool.testing.tiny import make_checkpoint

pytestmark = pytest.mark.vllm
DRAFTS: dict[str, dict[str, Any]] = {
    "ngram": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4, "prompt_lookup_min": 2},
    "mtp": {"method": "mtp", "num_speculative_tokens": 3},
}
ROUNDS = 3
"""A short prompt leaves a state only when it comes again, so the third time hits."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("qwen3.5", tmp_path_factory.mktemp("drafts") / "model", mtp=True)


@pytest.mark.parametrize("method", DRAFTS)
def test_drafts_on_two_ranks(method: str, model: Path) -> None:
    """Ranks add in another order than one process, so answers may part as those of drafts do."""
    prompts = tiny_prompts(model)[:6]
    job = {"model": str(model), "prompts": prompts, "output_tokens": 24, "max_num_seqs": 4}
    reference = engines.serve(job | {"side": "stock", "kv_bytes": 300_000_000})
    ranks = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    served = {"side": "elastic", "poison": True, "prefix_caching": True, "rounds": ROUNDS, "kv_bytes": 30_000_000}
    result = engines.serve(job | served | {"engine": ranks | {"speculative_config": DRAFTS[method]}})
    found = gaps({"answers": reference["answers"] * ROUNDS}, result)
    assert all(gap <= BFLOAT16_GAP for gap in found), found
    assert result["cached_tokens"] > 1000, "nothing was reused"
    assert 0 < result["accepted"] < result["drafted"]

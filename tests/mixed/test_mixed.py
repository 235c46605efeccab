"""Real vLLM on a model of four groups: states, full attention in two sizes, and a window.

What is compared, and why this way, is in tests/serving.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mixed_model import WINDOW, make_mixed_checkpoint

import engines
from answers import assert_same_answers, gaps, tokens
from asking import make_prompts
from tidepool.cache import FullAttention, Group, SlidingWindow, State
from tidepool.capacity.predict import predict
from tidepool.running.agreement import BFLOAT16_GAP

pytestmark = pytest.mark.vllm
MIXED: dict[str, Any] = {
    "side": "elastic",
    "prompts": make_prompts({"requests": 48, "own_lengths": [20, 40, 60, 150, 300, 620, 750], "shared_lengths": []}),
    "output_tokens": 40,
    "kv_bytes": 52_000_000,
    "max_num_seqs": 128,
}
# With windows, vLLM finds prefixes in steps of whole checkpoints.
SHARED: dict[str, Any] = {
    "side": "elastic",
    "prompts": make_prompts({"requests": 14, "own_lengths": [20, 60, 150, 400], "shared_lengths": [600, 700, 1100]}),
    "output_tokens": 16,
    "rounds": 2,
    "kv_bytes": 30_000_000,
    "max_num_seqs": 5,
}
CODED = MIXED | {
    "kv_bytes": 46_000_000,
    "engine": {
        "additional_config": {"tidepool": {"kv": "tqkv-k4v4"}},
        "kv_cache_dtype_skip_layers": ["sliding_window"],
    },
}
"""Full attention in packed codes, beside windows in bfloat16 and states."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(make_mixed_checkpoint(tmp_path_factory.mktemp("mixed")))


def serve(model: Path, workload: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return engines.serve(workload | changes | {"model": str(model)}, Path(__file__).with_name("child.py"))


def test_four_groups_give_stocks_tokens(model: Path) -> None:
    stock = serve(model, MIXED, side="stock")
    assert len({tuple(answer) for answer in tokens(stock)}) == len(MIXED["prompts"])
    result = serve(model, MIXED, poison=True)
    assert_same_answers(stock, result)
    assert result["moves"] > 0, "no extent changed hands"
    assert stock["preemptions"] > 0


def test_what_plan_predicts_is_allocated_to_the_block(model: Path) -> None:
    result = serve(model, MIXED, poison=True)
    config = json.loads((model / "config.json").read_text())
    token = 2 * 2 * config["head_dim"]  # a key and a value in bfloat16
    wide = token * config["num_key_value_heads"]
    inner = config["mamba_num_heads"] * config["mamba_head_dim"]
    channels = inner + 2 * config["n_groups"] * config["ssm_state_size"]
    state = State(2 * 3 * channels + 4 * inner * config["ssm_state_size"])
    mamba = tuple(f"m{index}" for index in range(config["hybrid_override_pattern"].count("M")))
    groups = [
        Group(state, mamba, 2048, 64),
        Group(FullAttention(wide), ("full",), 32, 64),
        Group(SlidingWindow(wide, WINDOW), ("window",), 32, 64),
        Group(FullAttention(token), ("narrow",), 32, 64),
    ]
    memory = predict(groups, MIXED["kv_bytes"], "elastic", MIXED["max_num_seqs"], 2048)
    blocks_per_extent = [group.blocks // (memory.units - 1) for group in memory.groups]
    assert result["pool_blocks"] == [memory.units * count for count in blocks_per_extent]


def test_prefix_hits_give_the_same_answers(model: Path) -> None:
    once = serve(model, SHARED, side="stock", rounds=1)
    stock = {"answers": once["answers"] * SHARED["rounds"]}
    result = serve(model, SHARED, prefix_caching=True, poison=True)
    assert result["cached_tokens"] > 10_000
    assert result["moves"] > 0
    assert all(gap <= BFLOAT16_GAP for gap in gaps(stock, result)), gaps(stock, result)


def test_codes_beside_bfloat16(model: Path) -> None:
    """Three kinds of bytes in one arena. A block that anyone else could write to would change answers under poison."""
    roomy = serve(model, CODED, kv_bytes=400_000_000)
    tight = serve(model, CODED, poison=True)
    assert tight["moves"] > 0
    assert_same_answers(roomy, tight)
    plain = serve(model, MIXED, poison=True)
    assert tokens(tight) != tokens(plain), "codes are rounder than bfloat16"
    # Four bits and a norm for 32 or so numbers of two bytes: more blocks of full attention fit, not of windows.
    more = [coded / blocks for coded, blocks in zip(tight["pool_blocks"], plain["pool_blocks"], strict=True)]
    assert more[1] > 2 > more[2]

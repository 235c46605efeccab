"""Real vLLM on the CPU with drafts: the same answers as without, and blocks as planned.

A step with drafts computes several tokens of a request at once, which rounds otherwise than one by one. So the tiny
models' answers may part from those without drafts where both tokens are as good as equal (`BFLOAT16_GAP`), and the
trained model's have to be right.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest

import engines
from answers import gaps
from drafters import make_drafter
from habits import make_habit, tiny_prompts
from tidepool.cache import State
from tidepool.models import model_from_config
from tidepool.plan.planner import PlanOptions, divide
from tidepool.running.agreement import BFLOAT16_GAP
from tidepool.testing.tiny import Family, make_checkpoint
from tidepool.verify.task import ANSWER_TOKENS, MODEL, make_prompts

pytestmark = pytest.mark.vllm
FAMILIES: tuple[Family, ...] = ("qwen3.5", "nemotron-h")
DRAFT_TOKENS = 3
NGRAM = {"method": "ngram", "num_speculative_tokens": DRAFT_TOKENS, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
MTP = {"method": "mtp", "num_speculative_tokens": DRAFT_TOKENS}
KV_BYTES = {"qwen3.5": 73_000_000, "nemotron-h": 72_000_000}
"""Requests are admitted until nothing is left, and each soon takes another block of attention: some are preempted."""
SHARED_KV_BYTES = {"qwen3.5": 60_000_000, "nemotron-h": 80_000_000}


JOB: dict[str, Any] = {"side": "elastic", "poison": True, "watch": True, "max_num_seqs": 16, "output_tokens": 48}
SHARED: dict[str, Any] = {"prefix_caching": True, "rounds": 3, "max_num_seqs": 4}
"""A short prompt leaves a state only when it comes again, so the third time hits."""
Checkpoint = Callable[[Family], Path]
Serve = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    root = tmp_path_factory.mktemp("models")
    # The head that drafts changes nothing in the rest of the model.
    return cache(lambda family: make_checkpoint(family, root / family, mtp=family == "qwen3.5"))


@pytest.fixture(scope="module")
def serve(checkpoint: Checkpoint) -> Serve:
    def serve(family: Family, *, drafts: dict[str, Any] | None = NGRAM, **changes: Any) -> dict[str, Any]:
        model = checkpoint(family)
        job = JOB | {"kv_bytes": KV_BYTES[family], "model": str(model), "prompts": tiny_prompts(model)} | changes
        return engines.serve(job | {"engine": {"speculative_config": drafts} | job.get("engine", {})})

    return serve


def undrafted(serve: Serve, family: Family) -> dict[str, Any]:
    """Stock vLLM without drafts, with memory for all: what every other run has to answer."""
    return serve(family, side="stock", kv_bytes=300_000_000, drafts=None)


def assert_right(serve: Serve, family: Family, result: dict[str, Any], *, rounds: int = 1) -> None:
    asked = len(result["answers"]) // rounds
    found = gaps({"answers": undrafted(serve, family)["answers"][:asked] * rounds}, result)
    assert all(gap <= BFLOAT16_GAP for gap in found), found
    assert 0 < result["accepted"] < result["drafted"], "some drafts are accepted, and some are not"


def planned(model_path: Path, kv_bytes: int, *, prefix_caching: bool, mtp: bool = False) -> tuple[Any, int]:
    """What `tidepool plan` says about an engine here: its memory, and the states that a running request holds."""
    model = model_from_config(json.loads((model_path / "config.json").read_text()))
    options = PlanOptions(
        kv_bytes,
        block_tokens=32,
        prefix_caching=prefix_caching,
        max_num_seqs=16,
        max_model_len=2048,
        speculative_tokens=DRAFT_TOKENS,
        mtp=mtp,
    )
    memory = divide("elastic", model, model.stages(1, options.cache_options()), options, 2048)
    return memory, next(group.cache.copies for group in memory.groups if isinstance(group.cache, State))


def assert_as_planned(result: dict[str, Any], memory: Any) -> None:
    assert result["extents"] == memory.units
    assert result["pool_blocks"] == [memory.units * blocks_per_extent for blocks_per_extent in memory.blocks_per_extent]
    assert result["wrong_attention"] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_drafts_change_nothing_through_preemption(serve: Serve, checkpoint: Checkpoint, family: Family) -> None:
    result = serve(family)
    assert_right(serve, family, result)
    assert result["preemptions"] > 0
    memory, copies = planned(checkpoint(family), KV_BYTES[family], prefix_caching=False)
    assert_as_planned(result, memory)
    assert copies == 1 + DRAFT_TOKENS
    assert set(result["states"]) == {str(copies)}, "a running request holds a state and one for each draft token"
    assert result["unaccounted"] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_drafts_beside_prefix_hits(serve: Serve, checkpoint: Checkpoint, family: Family) -> None:
    result = serve(family, **SHARED, prompts=tiny_prompts(checkpoint(family))[:6], kv_bytes=SHARED_KV_BYTES[family])
    assert_right(serve, family, result, rounds=3)
    assert result["cached_tokens"] > 1000, "nothing was reused"
    memory, copies = planned(checkpoint(family), SHARED_KV_BYTES[family], prefix_caching=True)
    assert_as_planned(result, memory)
    held = {int(states) for states in result["states"]}
    assert min(held) == 1 + DRAFT_TOKENS
    assert max(held) <= copies


def test_a_head_that_drafts(serve: Serve, checkpoint: Checkpoint) -> None:
    prompts = tiny_prompts(checkpoint("qwen3.5"))[:6]
    result = serve("qwen3.5", **SHARED, prompts=prompts, drafts=MTP, kv_bytes=SHARED_KV_BYTES["qwen3.5"])
    assert_right(serve, "qwen3.5", result, rounds=3)
    assert result["cached_tokens"] > 1000, "nothing was reused"
    memory, _ = planned(checkpoint("qwen3.5"), SHARED_KV_BYTES["qwen3.5"], prefix_caching=True, mtp=True)
    assert_as_planned(result, memory)


HITS = {2_100: 2_048, 600: 544, 300: 256, 200: 160, 150: 96, 100: 64, 80: 32, 60: 0}
"""Lengths of prompts, and what they hit when they are asked for the third time: a block of attention (32 tokens on the
CPU) less than is found of it, and from 2,048 on no state is left but at the last checkpoint."""


@pytest.mark.parametrize(
    "kv_bytes", [400_000_000, pytest.param(48_000_000, marks=pytest.mark.heavy)], ids=["room for all", "little room"]
)
def test_a_head_that_drafts_after_hits(serve: Serve, checkpoint: Checkpoint, kv_bytes: int) -> None:
    """Eight prompts, three times: what drafts find in the cache is as good as what they compute."""
    some = make_habit(checkpoint("qwen3.5"))
    job = {
        "prompts": [some(length) for length in HITS],
        "max_num_seqs": 4,
        "output_tokens": 48,
        "engine": {"max_model_len": 4096},
    }
    reference = serve("qwen3.5", **job, side="stock", kv_bytes=400_000_000, drafts=None)
    result = serve("qwen3.5", **job, drafts=MTP, prefix_caching=True, rounds=3, kv_bytes=kv_bytes)
    found = gaps({"answers": reference["answers"] * 3}, result)
    assert all(gap <= BFLOAT16_GAP for gap in found), found
    hits = result["cached"][2 * len(HITS) :]
    if kv_bytes == 400_000_000:
        assert result["cached"][: len(HITS)] == [0] * len(HITS)
        assert hits == list(HITS.values())
    else:
        assert 0 < sum(hits) < sum(HITS.values())
        assert result["moves"] > 0
    before, _, after = result["accepted_share"]
    assert 0.2 < before < 0.95
    assert after > before - 0.03


@pytest.mark.parametrize("method", ["eagle", "draft_model"])
def test_a_drafter_whose_layer_is_a_group_of_its_own(
    serve: Serve, checkpoint: Checkpoint, tmp_path: Path, method: Literal["eagle", "draft_model"]
) -> None:
    model = checkpoint("nemotron-h")
    drafter = make_drafter(method, model, tmp_path / method)
    drafts = {"method": method, "model": str(drafter), "num_speculative_tokens": DRAFT_TOKENS}
    prompts = tiny_prompts(model)[:6]
    result = serve("nemotron-h", **SHARED, prompts=prompts, drafts=drafts, kv_bytes=SHARED_KV_BYTES["nemotron-h"])
    assert_right(serve, "nemotron-h", result, rounds=3)
    assert result["cached_tokens"] > 1000, "nothing was reused"
    assert len(result["pool_blocks"]) == 3, "states, the model's attention, the drafter's"
    assert result["wrong_attention"] == []


def test_a_trained_models_answers_are_right(serve: Serve) -> None:
    asked = make_prompts(5, length=300, stories=4, questions=4)
    result = serve(
        "qwen3.5",
        model=str(MODEL),
        prompts=[prompt.tokens for prompt in asked],
        output_tokens=ANSWER_TOKENS,
        kv_bytes=60_000_000,
        prefix_caching=True,
    )
    wrong = [
        prompt.question
        for prompt, answer in zip(asked, result["answers"], strict=True)
        if not prompt.question.is_right(answer["tokens"])
    ]
    assert wrong == []
    assert 0 < result["accepted"] < result["drafted"]


def test_the_check_catches_a_state_that_isnt_rolled_on(serve: Serve) -> None:
    corrupted = serve("qwen3.5", fault="drafts not rolled on")
    assert sum(gap > BFLOAT16_GAP for gap in gaps(undrafted(serve, "qwen3.5"), corrupted)) >= 5

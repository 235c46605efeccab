"""tqkv in real vLLM on the CPU: stock vLLM and tidepool, on the same bytes and the same questions.

The model is the trained one that comes along, so that answers are right or wrong. One process runs all engines.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engines import run_child
from tidepool.models import model_from_config
from tidepool.plan.planner import PlanOptions, divide
from tidepool.testing.tiny import make_checkpoint
from tidepool.tqkv.formats import FORMATS
from tidepool.verify.task import ANSWER_TOKENS, MODEL, Prompt, make_prompts

pytestmark = [pytest.mark.vllm, pytest.mark.heavy]
APART = [*make_prompts(2, length=1_200, stories=3, questions=2), *make_prompts(3, length=300, stories=6, questions=2)]
SHARED = [
    prompt
    for visit in range(2)
    for story in range(5)
    for prompt in make_prompts(8 + story, length=(1_290, 900)[story % 2], stories=1, questions=8)[visit::2]
]
RANDOM = [
    [5 + (7 * place * place + 11 * number * place) % 480 for place in range(90 + 160 * number)] for number in range(6)
]
MAX_NUM_SEQS = 16


def job(kv: str, side: str, prompts: list[Prompt], **changes: Any) -> dict[str, Any]:
    return {
        "model": str(MODEL),
        "kv": kv,
        "side": side,
        "poison": False,
        "kv_bytes": 60_000_000,
        "max_num_seqs": MAX_NUM_SEQS,
        # Prompts are never cut, so that every side computes the same chunks.
        "step_tokens": 16_384,
        "chunk_tokens": 0,
        "caching": False,
        "damage": False,
        "output_tokens": ANSWER_TOKENS,
        "prompts": [prompt.tokens for prompt in prompts],
    } | changes


TIGHT = {"kv_bytes": 14_000_000, "step_tokens": 1_024, "chunk_tokens": 200, "caching": True}
JOBS = {
    "stock k4v4": job("tqkv-k4v4", "off", APART),
    "elastic k4v4": job("tqkv-k4v4", "elastic", APART),
    "damaged": job("tqkv-k4v4", "elastic", APART, damage=True),
    "stock k3v3": job("tqkv-k3v3", "off", APART[:1]),
    "elastic k8v8": job("tqkv-k8v8", "elastic", SHARED, **TIGHT),
    "elastic k8v8, poison": job("tqkv-k8v8", "elastic", SHARED, **TIGHT, poison=True),
}
"""All in one process, so that a format that stuck would be noticed."""
OTHER_JOBS = {
    "nemotron-h, stock k8v3": job("tqkv-k8v3", "off", []),
    "nemotron-h, elastic k8v3": job("tqkv-k8v3", "elastic", [], poison=True),
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("tqkv")
    other = {"model": str(make_checkpoint("nemotron-h", folder / "nemotron-h")), "prompts": RANDOM, "output_tokens": 12}
    jobs = JOBS | {name: job | other for name, job in OTHER_JOBS.items()}
    found = run_child(Path(__file__).with_name("child.py"), {"jobs": list(jobs.values())}, timeout=400)
    return dict(zip(jobs, found, strict=True))


def right(prompts: list[Prompt], answer: dict[str, Any]) -> int:
    return sum(prompt.question.is_right(tokens) for prompt, tokens in zip(prompts, answer["tokens"], strict=True))


def test_outputs_equal_stock_vllms_with_the_same_backend(answers: dict[str, dict[str, Any]]) -> None:
    for ours, stock in [("elastic k4v4", "stock k4v4"), ("nemotron-h, elastic k8v3", "nemotron-h, stock k8v3")]:
        assert answers[ours]["blocks"], "tidepool fell back"
        assert answers[stock]["blocks"] is None
        assert answers[ours]["tokens"] == answers[stock]["tokens"]
        assert len({tuple(tokens) for tokens in answers[ours]["tokens"]}) > 4


def test_answers_are_right(answers: dict[str, dict[str, Any]]) -> None:
    assert right(APART, answers["elastic k4v4"]) == len(APART)
    assert right(SHARED, answers["elastic k8v8"]) == len(SHARED)
    assert right(APART, answers["damaged"]) < 0.7 * len(APART), "facts need their keys"


def test_nobody_reads_what_it_does_not_own(answers: dict[str, dict[str, Any]]) -> None:
    """Through cut prompts, prefix hits, preemption and moves; poisoned norms are NaN."""
    clean, poisoned = answers["elastic k8v8"], answers["elastic k8v8, poison"]
    assert clean["tokens"] == poisoned["tokens"]
    assert clean["hit_tokens"] == poisoned["hit_tokens"] > 1_000
    assert poisoned["moves"] > 0
    assert poisoned["preemptions"] > 0
    assert all(answer["in_use_at_end"] == 0 for answer in answers.values())


@pytest.mark.parametrize("name", ["elastic k4v4", "elastic k8v8"])
def test_what_plan_predicts_is_allocated_to_the_block(answers: dict[str, dict[str, Any]], name: str) -> None:
    asked = JOBS[name]
    model = model_from_config(json.loads((MODEL / "config.json").read_text(encoding="utf-8")))
    options = PlanOptions(
        asked["kv_bytes"], prefix_caching=asked["caching"], kv_dtype=asked["kv"], max_num_seqs=MAX_NUM_SEQS
    )
    memory = divide("elastic", model, model.stages(1, options.cache_options()), options, 4096)
    blocks = {group.label: group.blocks for group in memory.groups}
    assert answers[name]["units"] == memory.units
    assert answers[name]["blocks"] == [blocks["state"], blocks["attention"]]
    form = FORMATS[asked["kv"]]
    (attention,) = (group for group in answers[name]["groups"] if group[0] == "FullAttentionSpec")
    assert attention[1:] == [16, 16 * 2 * form.head_bytes(64, 64), 2], "blocks of 16 tokens, natural pages"


@pytest.mark.parametrize(
    ("name", "block_tokens", "padding"), [("stock k4v4", 1_920, 8_192), ("stock k3v3", 2_432, 4_096)]
)
def test_what_stock_vllm_makes_of_the_same_page(
    answers: dict[str, dict[str, Any]], name: str, block_tokens: int, padding: int
) -> None:
    """It runs: the attention block grows until its page holds a state of 268,288 bytes, and states are padded to it.

    The figures are those of docs/tqkv.md.
    """
    form = FORMATS[JOBS[name]["kv"]]
    page = block_tokens * 2 * form.head_bytes(64, 64)
    *states, attention = answers[name]["groups"]
    assert attention == ["FullAttentionSpec", block_tokens, page, 2]
    assert [(kind, group_page, layers) for kind, _, group_page, layers in states] == [("MambaSpec", page, 2)] * 3
    assert page - 268_288 == padding
    model = model_from_config(json.loads((MODEL / "config.json").read_text(encoding="utf-8")))
    options = PlanOptions(60_000_000, block_tokens=128, kv_dtype=form.name, max_num_seqs=MAX_NUM_SEQS)
    memory = divide("stock", model, model.stages(1, options.cache_options()), options, 4096)
    assert memory.units == answers[name]["units"], "plan knows"

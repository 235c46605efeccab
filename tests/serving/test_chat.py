"""A conversation goes on where it ended: what its turns find in the prefix cache, and that the answers are right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import engines
from answers import gaps
from tidepool.running.agreement import BFLOAT16_GAP
from tidepool.testing.tiny import Family

pytestmark = pytest.mark.vllm
BLOCK = 32
"""Tokens; the smallest block of the CPU's attention kernel, so nothing can be reused in smaller pieces."""
JOB = {
    "system": 200,
    "added": 60,
    "answer_tokens": 100,
    "turns": 6,
    "chats": 4,
    "kv_bytes": 120_000_000,
    "regenerated": False,
}


def chat(model: Path, **changes: Any) -> tuple[dict[str, Any], list[list[int]], list[list[int]]]:
    """(what was said; for each turn and chat the tokens that came from the cache; those that could have)."""
    job = JOB | {"model": str(model)} | changes
    said = engines.run_child(Path(__file__).with_name("chat.py"), job, timeout=600)
    chats, answer = job["chats"], 0 if job["regenerated"] else job["answer_tokens"]
    # The last token of an answer was never read by the model, nor is that of a prompt found.
    ends = [(len(prompt) + answer - 1) // BLOCK * BLOCK for prompt in said["prompts"]]
    cached = [said["cached"][at : at + chats] for at in range(0, len(said["cached"]), chats)]
    reusable = [[0] * chats] + [ends[at : at + chats] for at in range(0, len(ends) - chats, chats)]
    return said, cached, reusable


@pytest.mark.parametrize("family", ["qwen3.5", "nemotron-h"])
def test_turns_reuse_answers(checkpoint: Callable[[Family], Path], family: Family) -> None:
    said, cached, reusable = chat(checkpoint(family))
    assert sum(map(sum, cached[1:])) >= 0.95 * sum(map(sum, reusable[1:])), (cached, reusable)
    job = {"model": str(checkpoint(family)), "side": "stock", "kv_bytes": JOB["kv_bytes"], "max_num_seqs": 4}
    reference = engines.serve(job | {"prompts": said["prompts"], "output_tokens": JOB["answer_tokens"]})
    assert all(gap <= BFLOAT16_GAP for gap in gaps(reference, said)), gaps(reference, said)


def test_prompts_without_answers_keep_their_own_states(checkpoint: Callable[[Family], Path]) -> None:
    _, cached, reusable = chat(checkpoint("qwen3.5"), regenerated=True)
    assert sum(map(sum, cached[2:])) >= 0.9 * sum(map(sum, reusable[2:])), (cached, reusable)

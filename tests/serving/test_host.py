"""Host memory behind a small device cache, through real vLLM: what was copied there and back gives the same answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from answers import gaps, tokens
from engines import run_child
from tidepool.running.agreement import BFLOAT16_GAP
from tidepool.testing.tiny import Family, make_checkpoint

pytestmark = pytest.mark.vllm
KV_BYTES = {"qwen3.5": 16_000_000, "nemotron-h": 20_000_000}
"""Fewer than the chats leave."""
CHATS = 8
SMALL_GIB = 0.025
"""Of host memory: fewer than they leave, too."""


@cache
def _run(
    model: str, kv_bytes: int, host_gib: float | None, fault: str | None, slow: float, reset: str | None, engine: str
) -> Any:
    job = {
        "model": model,
        "kv_bytes": kv_bytes,
        "host_gib": host_gib,
        "fault": fault,
        "slow": slow,
        "reset": reset,
        "chats": CHATS,
        "engine": json.loads(engine),
    }
    return run_child(Path(__file__).with_name("host.py"), job, timeout=600)


@pytest.fixture
def run(checkpoint: Callable[[Family], Path]) -> Callable[..., Any]:
    def run(
        family: Family,
        host_gib: float | None = 0.25,
        *,
        fault: str | None = None,
        slow: float = 0.0,
        reset: str | None = None,
        **engine: Any,
    ) -> Any:
        return _run(str(checkpoint(family)), KV_BYTES[family], host_gib, fault, slow, reset, json.dumps(engine))

    return run


@pytest.mark.parametrize("family", ["qwen3.5", "nemotron-h"])
def test_what_was_loaded_gives_the_same_answers(run: Callable[..., Any], family: Family) -> None:
    """Under poison: a block that wasn't loaded is full of NaN or huge values."""
    without, tiered = run(family, None), run(family, slow=0.02)
    assert without["served"]
    assert tiered["served"]
    traffic = tiered["traffic"]
    assert traffic["loads"] >= CHATS, traffic
    assert traffic["failed"] == 0, traffic
    assert tiered["cached"] > 1.5 * without["cached"], "the device's cache is far too small"
    assert tiered["in_use"] == tiered["host_in_use"] == 0, "blocks leaked"
    found = gaps(without, tiered)
    assert all(gap <= BFLOAT16_GAP for gap in found), found
    assert len(found) <= len(tiered["answers"]) // 4, found


def test_packed_states_come_back_from_the_host(run: Callable[..., Any]) -> None:
    """They are copied there as they are, and unpacked when they are hit."""
    packing = {"tidepool": {"checkpoint_states": "int8"}}
    without, tiered = run("qwen3.5", None), run("qwen3.5", slow=0.02, additional_config=packing)
    assert tiered["traffic"]["loads"] >= CHATS // 2, tiered["traffic"]
    assert tiered["traffic"]["failed"] == 0
    assert tiered["cached"] > 1.5 * without["cached"]
    assert tiered["in_use"] == tiered["host_in_use"] == 0, "blocks leaked"
    found = gaps(without, tiered)
    assert all(gap <= BFLOAT16_GAP for gap in found), found


def test_a_drafter_finds_what_the_host_holds(tmp_path: Path) -> None:
    """Its lookups find a block of attention more than they give: that one is loaded, too, and nothing twice."""
    model = make_checkpoint("qwen3.5", tmp_path, mtp=True)
    drafter = {"speculative_config": {"method": "mtp", "num_speculative_tokens": 1}}
    tiered = _run(str(model), 20_000_000, 0.25, None, 0.0, None, json.dumps(drafter))
    traffic = tiered["traffic"]
    assert 0 < traffic["loads"] <= 2 * len(tiered["answers"]), traffic
    assert traffic["loaded_bytes"] > 0
    assert tiered["in_use"] == tiered["host_in_use"] == 0, "blocks leaked"


def test_what_host_memory_has_lost_is_not_loaded(run: Callable[..., Any]) -> None:
    """It holds fewer than the chats leave, and what goes there is poisoned, too."""
    without, tiered = run("nemotron-h", None), run("nemotron-h", SMALL_GIB)
    assert tiered["traffic"]["loads"] > 0
    assert tiered["poisoned"] > 0, "nothing was evicted and poisoned"
    found = gaps(without, tiered)
    assert all(gap <= BFLOAT16_GAP for gap in found), found


@pytest.mark.parametrize("fault", ["swapped", "dropped"])
def test_a_wrong_copy_is_noticed(run: Callable[..., Any], fault: str) -> None:
    found = gaps(run("qwen3.5", None), run("qwen3.5", fault=fault))
    assert any(gap > BFLOAT16_GAP for gap in found), "answers don't depend on what is loaded"


def apart(answers: list[Any], others: list[Any]) -> float:
    """How far the log-probabilities of answers' first tokens are apart at most. Tokens alone don't tell: tiny models
    hardly look at what lies far back."""
    pairs = [(a["logprobs"][0], b["logprobs"][0]) for a, b in zip(answers, others, strict=True)]
    return max(abs(float(a[token]) - float(b[token])) for a, b in pairs for token in a.keys() & b.keys())


@pytest.mark.parametrize("reset", ["reset", "sleep"])
def test_nothing_from_before_new_weights_is_found_after_a_reset(run: Callable[..., Any], reset: str) -> None:
    """Neither what was on its way to the host then, nor what was on its way from there."""
    found = run("qwen3.5", slow=1.0, reset=reset)
    assert sorted(set(found["under_way"])) == [False, True], "copies in both directions were under way"
    assert found["done"], "copies aren't a reason to refuse"
    assert found["kept"] == 0
    assert len(found["answers"]) == 3, "what was being stored, and what was being loaded"
    assert apart(found["fresh"], found["answers"]) < 0.3, "found what was cached before"
    assert tokens(found)[:2] != tokens({"answers": found["before"]}), "the weights are no others"
    assert found["in_use"] == found["host_in_use"] == 0, "blocks leaked"

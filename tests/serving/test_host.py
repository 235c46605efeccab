"""Host memory behind a small device cache, through real vLLM: what was copied there and back gives the same answers."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from answers import gaps
from engines import run_child
from tidepool.running.agreement import BFLOAT16_GAP
from tidepool.testing.tiny import Family

pytestmark = pytest.mark.vllm
KV_BYTES = {"qwen3.5": 16_000_000, "nemotron-h": 20_000_000}
"""Fewer than the chats leave."""
CHATS = 8
SMALL_GIB = 0.025
"""Of host memory: fewer than they leave, too."""


@cache
def _run(model: str, kv_bytes: int, host_gib: float | None, fault: str | None, slow: bool) -> Any:
    job = {
        "model": model,
        "kv_bytes": kv_bytes,
        "host_gib": host_gib,
        "fault": fault,
        "slow": slow,
        "chats": CHATS,
    }
    return run_child(Path(__file__).with_name("host.py"), job, timeout=600)


@pytest.fixture
def run(checkpoint: Callable[[Family], Path]) -> Callable[..., Any]:
    def run(family: Family, host_gib: float | None = 0.25, *, fault: str | None = None, slow: bool = False) -> Any:
        return _run(str(checkpoint(family)), KV_BYTES[family], host_gib, fault, slow)

    return run


@pytest.mark.parametrize("family", ["qwen3.5", "nemotron-h"])
def test_what_was_loaded_gives_the_same_answers(run: Callable[..., Any], family: Family) -> None:
    """Under poison: a block that wasn't loaded is full of NaN or huge values."""
    without, tiered = run(family, None), run(family, slow=True)
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

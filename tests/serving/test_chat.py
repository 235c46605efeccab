"""A conversation goes on where it ended: what its turns take from the prefix cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from engines import run_child
from tidepool.testing.tiny import make_checkpoint

pytestmark = pytest.mark.vllm
BLOCK = 32
"""Tokens; the smallest block of the CPU's attention kernel, so nothing can be reused in smaller pieces."""


@pytest.mark.parametrize("family", ["qwen3.5", "nemotron-h"])
def test_turns_reuse_what_they_can(family: str, tmp_path: Path) -> None:
    model = make_checkpoint(family, tmp_path / family)  # type: ignore[arg-type]
    turns = run_child(Path(__file__).with_name("chat.py"), {"model": str(model), "side": "elastic"}, timeout=300)
    # Until somebody has come back, a short prompt isn't cut for a state at its end.
    assert turns[1][0] >= 0.6 * turns[1][1], "what all chats begin with"
    later = turns[2:]
    reused, shared = (sum(turn[index] for turn in later) for index in (0, 1))
    assert reused >= 0.9 * shared, turns

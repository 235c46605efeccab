"""Two data parallel engines of a model without experts, on one machine: each has a cache of its own, and is right."""

from __future__ import annotations

from pathlib import Path

import pytest

from engines import run_child

pytestmark = pytest.mark.vllm


def test_each_engine_has_a_cache_of_its_own() -> None:
    """What one engine has cached is new to the other. Stock vLLM's blocks are longer than the prompts and never hit."""
    ranks = [0, 0, 0, 1, 1, 1]
    result = run_child(Path(__file__).with_name("engines_child.py"), {"ranks": ranks}, timeout=900)
    assert result["wrong"] == []
    # A short prompt leaves a state only when it comes again, so the third time hits.
    first, second = result["cached"][:3], result["cached"][3:]
    assert first == second
    assert first[0] == 0
    assert first[2] > 1_000

"""Prompts make progress in every step that has tokens left: first tokens come when stock vLLM's do.

Real engine cores with the model left out, stock and elastic in one process, on the same requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import count
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st

from tidepool.models import entry

pytestmark = pytest.mark.vllm
MEMORY = 24 << 30
"""Room for all that decode: stock vLLM holds seven blocks of 82 MB for each request of Nemotron-3-Nano-4B."""
MTP = {"method": "mtp", "num_speculative_tokens": 2}
PATIENCE = 600
"""Steps after which nothing is waited for any longer."""

names = count()
tokens = count(1_000)


@cache
def engine_of(side: Any, model: str, drafts: bool) -> Any:
    from tidepool.replay.engine import EngineShape, make_engine

    config = dict(entry(model).config) | ({"mtp_num_hidden_layers": 1} if drafts else {})
    shape = EngineShape(
        config, MEMORY, side, max_model_len=16_384, options={"speculative_config": dict(MTP)} if drafts else {}
    )
    return make_engine(shape)


def first_tokens(engine: Any, budget: int, decodes: int, prompts: Sequence[int]) -> tuple[list[int], list[int]]:
    """Steps until prompts of these lengths, which come behind requests under way, get their first tokens.

    Returns:
        (steps of each, checkpoints that each was to leave).
    """
    from tidepool.replay.engine import add_request
    from tidepool.replay.step import take_step

    scheduler = engine.scheduler
    begun = [str(next(names)) for _ in range(decodes)]
    for name in begun:
        add_request(engine, name, [next(tokens) for _ in range(8)], 10_000)
    for _ in range(PATIENCE):
        if sum(request.num_output_tokens > 0 for request in scheduler.running) == decodes:
            break
        take_step(engine)
    assert len(scheduler.running) == decodes, "there is no room for all of them"
    before = scheduler.max_num_scheduled_tokens
    scheduler.max_num_scheduled_tokens = scheduler.scheduler_config.max_num_batched_tokens = budget
    asked = [str(next(names)) for _ in prompts]
    for name, length in zip(asked, prompts, strict=True):
        add_request(engine, name, [next(tokens) for _ in range(length)], 10_000)
    steps: dict[str, int] = {}
    kept: dict[str, int] = {}
    retention = getattr(scheduler.kv_cache_manager.coordinator, "retention", None)
    for step in range(1, PATIENCE):
        emitted = take_step(engine).emitted
        for name in asked:
            if retention and name in retention.requests:
                plan = retention.checkpoints(name)
                kept[name] = len(plan.cuts) + bool(plan.within)
            if name in emitted:
                steps.setdefault(name, step)
        if len(steps) == len(asked):
            break
    engine.abort_requests([*begun, *asked])
    scheduler.max_num_scheduled_tokens = scheduler.scheduler_config.max_num_batched_tokens = before
    take_step(engine)
    assert not scheduler.has_unfinished_requests()
    return [steps.get(name, PATIENCE) for name in asked], [kept.get(name, 0) for name in asked]


@pytest.mark.parametrize(
    ("model", "drafts"), [("Qwen3.5-0.8B", False), ("Nemotron-3-Nano-4B", False), ("Qwen3.5-0.8B", True)]
)
def test_first_tokens_come_when_stocks_do(model: str, drafts: bool) -> None:
    @settings(max_examples=60, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
    @given(st.integers(130, 2_100), st.integers(0, 40), st.lists(st.integers(1, 9_000), min_size=1, max_size=3))
    @example(512, 1, [900, 30])
    @example(600, 39, [900, 30])
    @example(2_048, 40, [3_000, 3_000])
    def hold(budget: int, decodes: int, prompts: list[int]) -> None:
        stock, _ = first_tokens(engine_of("stock", model, drafts), budget, decodes, prompts)
        ours, kept = first_tokens(engine_of("elastic", model, drafts), budget, decodes, prompts)
        for number, mine in enumerate(ours):
            # Where stock vLLM lets a prompt starve, those behind it come first; here they come in order.
            assert mine <= max(stock[: number + 1]) + sum(kept[: number + 1]), (stock, ours, kept)

    hold()

"""Prompts that begin alike and come in one moment compute what they share once."""

from __future__ import annotations

import pytest

from tidepool.models import entry

pytestmark = pytest.mark.vllm
BLOCK = 16


def computed(model: str, prompts: list[list[int]]) -> int:
    """Tokens of prompts that come at once and are computed, all together."""
    from tidepool.replay.engine import EngineShape, add_request, make_engine
    from tidepool.replay.step import take_step

    engine = make_engine(EngineShape(entry(model).config, 4 << 30, "elastic", max_model_len=9_000))
    for number, prompt in enumerate(prompts):
        add_request(engine, str(number), prompt, 4)
    hits: dict[str, int] = {}
    while engine.scheduler.has_unfinished_requests():
        for new in take_step(engine).output.scheduled_new_reqs:
            hits.setdefault(new.req_id, new.num_computed_tokens)
    return sum(map(len, prompts)) - sum(hits.values())


@pytest.mark.parametrize("model", ["Qwen3.5-0.8B", "Nemotron-3-Nano-4B"])
@pytest.mark.parametrize(("length", "prompts"), [(900, 12), (1_800, 12), (6_000, 5)])
def test_one_prompt_many_times_is_computed_once(model: str, length: int, prompts: int) -> None:
    """But for the last block, of which a token must be computed.

    The first may leave its last checkpoint alone. Then the second goes on from there, and leaves a state at the end.
    """
    prompt = list(range(1_000, 1_000 + length))
    assert computed(model, [prompt] * prompts) <= length + (prompts - 1) * BLOCK + 512


@pytest.mark.parametrize("model", ["Qwen3.5-0.8B", "Nemotron-3-Nano-4B"])
def test_a_common_beginning_is_computed_once_for_each_group(model: str) -> None:
    beginnings = [list(range(100_000 * group, 100_000 * group + 2_560)) for group in range(1, 4)]
    prompts = [beginnings[number % 3] + list(range(1_000 * number, 1_000 * number + 400)) for number in range(15)]
    own = 15 * (400 + BLOCK)
    assert computed(model, prompts) <= own + 3 * 2_560

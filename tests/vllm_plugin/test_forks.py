"""A first fork, far before a long prompt's end: what it hits, and what that costs where memory is short."""

from __future__ import annotations

from typing import Any

import pytest

from tidepool.models import entry

pytestmark = pytest.mark.vllm
LONG = 32_000


def ask(engine: Any, name: str, prompt: list[int]) -> int:
    """Serve a prompt to its end. Returns the tokens of it that were hit."""
    from tidepool.replay.engine import add_request
    from tidepool.replay.step import take_step

    add_request(engine, name, prompt, 4)
    hits = []
    while engine.scheduler.has_unfinished_requests():
        hits += [new.num_computed_tokens for new in take_step(engine).output.scheduled_new_reqs]
    return int(hits[0])


def states_cached(engine: Any) -> list[int]:
    """Tokens up to each cached state."""
    pool = engine.scheduler.kv_cache_manager.coordinator.single_type_managers[0].block_pool
    return sorted(block.block_hash_num_tokens for block in pool.blocks if block.block_hash is not None)


@pytest.mark.parametrize("model", ["Qwen3.5-0.8B", "Nemotron-3-Nano-4B"])
def test_a_first_fork_far_back_hits_the_end_of_a_step(model: str) -> None:
    from tidepool.replay.engine import EngineShape, make_engine

    engine = make_engine(EngineShape(entry(model).config, 4 << 30, "elastic", max_model_len=40_000))
    agent = list(range(1_000, 1_000 + LONG))
    assert ask(engine, "agent", agent) == 0
    assert ask(engine, "fork", agent[:9_000] + list(range(500_000, 502_000))) == 8_192
    assert ask(engine, "another", agent[:20_000] + list(range(600_000, 602_000))) == 16_384
    assert ask(engine, "next turn", agent + list(range(700_000, 700_500))) == LONG // 512 * 512


def test_where_memory_is_full_none_is_kept_for_forks() -> None:
    from tidepool.replay.engine import EngineShape, make_engine

    engine = make_engine(EngineShape(entry("Qwen3.5-0.8B").config, 2 << 30, "elastic", max_model_len=40_000))
    for number in range(12):
        ask(engine, str(number), list(range(100_000 * number, 100_000 * number + LONG)))
    states = states_cached(engine)
    assert LONG // 512 * 512 in states
    assert states.count(8_192) < states.count(LONG // 512 * 512) / 2, states


def test_a_state_that_saves_little_beside_another_has_low_priority_though_it_took_no_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tidepool.cache import PromptEnds
    from tidepool.replay.engine import EngineShape, make_engine

    for share in ("from_end", "from_checkpoint"):
        monkeypatch.setattr(PromptEnds, share, lambda ends, tokens: 0.9)
    engine = make_engine(EngineShape(entry("Nemotron-3-Nano-4B").config, 4 << 30, "elastic"))
    ask(engine, "prompt", list(range(1_000, 2_400)))
    assert states_cached(engine) == [1_024, 1_392]
    pool = engine.scheduler.kv_cache_manager.coordinator.single_type_managers[0].block_pool
    assert [pool.blocks[block].block_hash_num_tokens for block in pool.low] == [1_392]

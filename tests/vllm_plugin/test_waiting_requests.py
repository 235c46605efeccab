"""Who goes first of the requests that wait: real engine cores with the model left out."""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest

from tidepool.models import entry

pytestmark = pytest.mark.vllm
MEMORY = 260 << 20
"""It holds a cached conversation of 4,000 tokens beside a prompt of 8,000."""
tokens = count(1_000)


def text(length: int) -> list[int]:
    return [next(tokens) for _ in range(length)]


def engine_of(queue: Any) -> Any:
    from tidepool.replay.engine import EngineShape, make_engine

    config = dict(entry("Qwen3.5-0.8B").config)
    return make_engine(
        EngineShape(
            config,
            MEMORY,
            "elastic",
            max_num_seqs=1,
            max_model_len=9_000,
            max_num_batched_tokens=1_024,
            eviction="lru",
            queue=queue,
        )
    )


def run(engine: Any, until: set[str]) -> list[str]:
    """The names in the order in which they got their first tokens."""
    from tidepool.replay.step import take_step

    order: list[str] = []
    for _ in range(200):
        order += [name for name in take_step(engine).emitted if name not in order]
        if until <= set(order) and not engine.scheduler.has_unfinished_requests():
            return order
    raise AssertionError(order)


@pytest.mark.parametrize(
    ("queue", "order"), [("fcfs", ["far", "new", "again"]), ("hits-first", ["far", "again", "new"])]
)
def test_hits_go_first_if_they_may(queue: str, order: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from tidepool.replay.engine import add_request
    from tidepool.replay.step import take_step

    engine = engine_of(queue)
    manager = engine.scheduler.kv_cache_manager
    hits: dict[str, int] = {}
    monkeypatch.setattr(
        manager, "record_prefix_cache_stats", lambda request, hit: hits.update({request.request_id: hit})
    )
    first = text(4_000)
    add_request(engine, "first", first, 1)
    run(engine, {"first"})
    add_request(engine, "far", text(8_000), 1)
    add_request(engine, "new", text(600), 1)
    add_request(engine, "again", first + text(100), 1)
    take_step(engine)
    assert queue == "fcfs" or len(manager.block_pool.waiting) == 2
    assert run(engine, {"far", "new", "again"}) == order
    assert not manager.block_pool.waiting
    assert hits["again"] == 3_584 or queue == "fcfs", "what it waited for has gone for the others"


@pytest.mark.parametrize("reset", [False, True])
def test_what_went_meanwhile_counts_no_more(reset: bool) -> None:
    from tidepool.replay.engine import add_request
    from tidepool.replay.step import take_step

    engine = engine_of("hits-first")
    first = text(4_000)
    add_request(engine, "first", first, 1)
    run(engine, {"first"})
    pool = engine.scheduler.kv_cache_manager.block_pool
    if reset:
        assert pool.reset_prefix_cache()
    add_request(engine, "far", text(1_500), 1)
    add_request(engine, "new", text(600), 1)
    add_request(engine, "again", first + text(100), 1)
    take_step(engine)
    if not reset:
        pool.first_states.evict_blocks({block.block_id for block in pool.first_states.blocks if block.block_hash})
    assert run(engine, {"far", "new", "again"}) == ["far", "new", "again"]


def test_an_aborted_request_waits_no_more() -> None:
    from tidepool.replay.engine import add_request
    from tidepool.replay.step import take_step

    engine = engine_of("hits-first")
    add_request(engine, "runs", text(3_000), 1)
    add_request(engine, "waits", text(3_000), 1)
    take_step(engine)
    waiting = engine.scheduler.kv_cache_manager.block_pool.waiting
    assert len(waiting) == 1
    engine.abort_requests(["waits"])
    assert not len(waiting)

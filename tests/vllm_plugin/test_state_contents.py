"""Each request goes on from the state of its own tokens, whatever was copied, packed, taken over or evicted meanwhile.

Real engine cores with the model left out. In place of its workers there is one that knows, for each block of states, of
which tokens it holds the state. It does what vLLM's do in a step: keeps a block table for each request, carries out the
orders to copy, and moves a running state from its column to the next.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tidepool.cache import StateFormat
from tidepool.testing.tiny import make_checkpoint
from tidepool.vllm_plugin.worker import ArenaBytes, decode

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm")
STATES = 0
"""vLLM's group of states."""


class Contents(ArenaBytes):
    """For each block of states, the tokens up to which it holds one."""

    def __init__(self, groups: int) -> None:
        self.groups = groups
        self.tokens: dict[tuple[int, int], tuple[int, ...] | None] = {}

    def _fill(self, operations: Iterable[int]) -> None:
        """Blocks of attention are of no interest here."""

    def copy(self, copies: Iterable[Sequence[int]]) -> None:
        for source, target in copies:
            self.tokens[decode(target, self.groups)] = self.tokens.get(decode(source, self.groups))


class Worker:
    def __init__(self, engine: Any) -> None:
        self.scheduler = engine.scheduler
        config = self.scheduler.kv_cache_config
        self.column_tokens = config.kv_cache_groups[STATES].kv_cache_spec.block_size
        self.contents = Contents(len(config.pool_blocks))
        self.tables: dict[str, list[int]] = {}
        self.columns: dict[str, int] = {}
        """Where the state of each request was written last."""
        self.hits = self.resumed = 0

    def step(self, output: Any) -> None:
        started: dict[str, int] = {}
        for new in output.scheduled_new_reqs:
            self.tables[new.req_id] = list(new.block_ids[STATES])
            self.columns.pop(new.req_id, None)
            started[new.req_id] = new.num_computed_tokens
            self.hits += new.num_computed_tokens > 0
        cached = output.scheduled_cached_reqs
        for name, blocks, computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            started[name] = computed
            if name in cached.resumed_req_ids:
                self.resumed += 1
                self.tables[name] = []
                self.columns.pop(name, None)
            self.tables[name] += blocks[STATES] if blocks else ()
        self.contents.apply(output.new_block_ids_to_zero or ())
        self.contents.copy(output.kv_cache_block_copies or ())
        written = {}
        for name, count in output.num_scheduled_tokens.items():
            tokens, start, table = self.scheduler.requests[name].all_token_ids, started[name], self.tables[name]
            if start:
                column = self.columns.get(name, (start - 1) // self.column_tokens)
                assert self.contents.tokens.get((STATES, table[column])) == tuple(tokens[:start]), (name, start)
            self.columns[name] = (start + count - 1) // self.column_tokens
            written[STATES, table[self.columns[name]]] = tuple(tokens[: start + count])
        assert len(written) == len(output.num_scheduled_tokens), "two requests write to one block"
        self.contents.tokens |= written


@pytest.mark.parametrize("state_format", ["same", "int8"])
@pytest.mark.parametrize(
    ("memory", "of_answers", "crowded"),
    [(30_000_000, False, False), (100_000_000, True, False), (30_000_000, False, True)],
)
def test_requests_go_on_from_their_own_states(
    state_format: StateFormat,
    memory: int,
    of_answers: bool,
    crowded: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prompts that continue others, or part from them anywhere. An answer's state may take the place of its prompt's,
    unless somebody else has found that. Where too many run at once, some give checkpoints up or are preempted."""
    from tidepool.cache import PromptEnds
    from tidepool.replay.engine import EngineShape, add_request, make_engine

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TIDEPOOL_OVERCOMMIT", "1" if crowded else "0")
    if of_answers:
        monkeypatch.setattr(PromptEnds, "answer_pays", lambda *_: True)
    config = json.loads((make_checkpoint("qwen3.5", tmp_path) / "config.json").read_text(encoding="utf-8"))
    shape = EngineShape(
        config,
        memory,
        "elastic",
        max_num_seqs=32 if crowded else 8,
        max_model_len=4096,
        max_num_batched_tokens=1024,
        checkpoint_states=state_format,
    )
    engine = make_engine(shape)
    scheduler, worker, chance = engine.scheduler, Worker(engine), random.Random(0)
    texts: list[list[int]] = []
    for step in range(300):
        if step < 250 and chance.random() < (0.9 if crowded else 0.3):
            begun = chance.choice(texts) if texts and chance.random() < 0.8 else []
            begun = begun[: chance.choice([len(begun), chance.randrange(len(begun) + 1)])]
            prompt = [*begun, *(chance.randrange(5, 500) for _ in range(chance.choice([20, 200, 700])))][:3000]
            add_request(engine, str(step), prompt, chance.choice([2, 60, 600]))
            texts.append(prompt)
        if not scheduler.has_requests():
            continue
        output = scheduler.schedule()
        worker.step(output)
        scheduler.update_from_output(output, engine.model_executor.execute_model(output))
    assert worker.hits > 3
    assert (scheduler.kv_cache_manager.coordinator.retention.given_up > 0) == crowded
    assert (worker.resumed > 0) == crowded
    arena = scheduler.kv_cache_manager.block_pool.arena
    if state_format != "same" and not crowded:
        assert arena.pools[-1].cached > 0
    engine.abort_requests(list(scheduler.requests))
    if scheduler.has_requests():
        scheduler.update_from_output(output := scheduler.schedule(), engine.model_executor.execute_model(output))
    assert arena.usage().in_use == 0

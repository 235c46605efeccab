"""What others are told of the memory, against what fits into it: real engine cores, filled until a request waits."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from tidepool.models import entry

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm")

MAX_MODEL_LEN = 16_384
STEP_TOKENS = 32_768
SEQS = {"elastic": 64, "fixed": 24}
ENGINES: dict[str, tuple[str, int, Any, bool]] = {
    "Qwen3.5-4B": ("Qwen3.5-4B", 4 << 30, "elastic", False),
    "Qwen3.5-4B, prefix caching": ("Qwen3.5-4B", 4 << 30, "elastic", True),
    "Qwen3.5-4B, fixed": ("Qwen3.5-4B", 6 << 30, "fixed", True),
    "Nemotron-3-Nano-4B": ("Nemotron-3-Nano-4B", 5 << 30, "elastic", False),
    "Nemotron-3-Nano-4B, prefix caching": ("Nemotron-3-Nano-4B", 5 << 30, "elastic", True),
}


@dataclass
class Filled:
    """An engine, and what was seen of it after each step was scheduled."""

    core: Any
    random: random.Random = field(default_factory=lambda: random.Random(0))
    names: int = 0
    usages: list[float] = field(default_factory=list)
    preempted: int = 0
    full: int = 0
    """Steps in which a request had to wait for memory."""

    @property
    def manager(self) -> Any:
        return self.core.scheduler.kv_cache_manager

    @property
    def pool(self) -> Any:
        return self.manager.block_pool

    @property
    def caching(self) -> bool:
        return bool(self.manager.enable_caching)

    def ask(self, prompt_tokens: int, output_tokens: int) -> str:
        """Queue a prompt that no other begins like."""
        from tidepool.replay.engine import add_request

        self.names += 1
        prompt = [self.names, *self.random.choices(range(5, 30_000), k=prompt_tokens - 1)]
        add_request(self.core, str(self.names), prompt, output_tokens)
        return str(self.names)

    def step(self) -> None:
        """One step; what is told after it was scheduled must agree with who waits."""
        scheduler, manager = self.core.scheduler, self.manager
        schedule, allocate_slots = scheduler.schedule, manager.allocate_slots
        seen = SimpleNamespace()

        def asked(*args: Any, **kwargs: Any) -> Any:
            given = allocate_slots(*args, **kwargs)
            seen.released = self.pool.arena.released
            return given

        def watched(*args: Any, **kwargs: Any) -> Any:
            seen.output = schedule(*args, **kwargs)
            seen.usage, seen.waiting, seen.running = manager.usage, len(scheduler.waiting), len(scheduler.running)
            seen.released_at_end = self.pool.arena.released
            return seen.output

        scheduler.schedule, manager.allocate_slots = watched, asked
        try:
            outputs, _ = self.core.step()
        finally:
            del scheduler.schedule, manager.allocate_slots
        self.usages.append(seen.usage)
        if not seen.waiting:
            assert seen.usage < 1, "nobody waits"
        elif self._for_memory(seen):
            self.full += 1
            assert seen.usage == 1, "somebody waits for memory"
        for each in outputs.values():
            if each.scheduler_stats and not each.finished_requests and not any(o.finished for o in each.outputs):
                assert each.scheduler_stats.kv_cache_usage == self.manager.usage == seen.usage

    def _for_memory(self, seen: SimpleNamespace) -> bool:
        """Whether those who wait could have been served in this step if there were memory, and none came free since:
        the source of a copied state does at the end of a step."""
        self.preempted += len(seen.output.preempted_req_ids or ())
        left = STEP_TOKENS - seen.output.total_num_scheduled_tokens
        could = seen.running < self.core.scheduler.max_num_running_reqs and left > 1024
        return bool(could and seen.released == seen.released_at_end)

    def drain(self) -> None:
        while self.core.scheduler.has_unfinished_requests():
            self.step()
        assert self.manager.usage == 0
        assert self.core.reset_prefix_cache()


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Any:
    from tidepool.replay.engine import EngineShape, make_engine

    os.environ["HF_HUB_OFFLINE"] = "1"
    name, memory, side, caching = ENGINES[request.param]
    return make_engine(
        EngineShape(
            entry(name).config,
            memory,
            side,
            max_num_seqs=SEQS[side],
            max_model_len=MAX_MODEL_LEN,
            max_num_batched_tokens=STEP_TOKENS,
            prefix_caching=caching,
        )
    )


@pytest.fixture
def filled(engine: Any) -> Iterator[Filled]:
    filled = Filled(engine)
    yield filled
    filled.drain()


def test_blocks_times_tokens_is_what_fits(filled: Filled) -> None:
    """``num_gpu_blocks x block_size``, which is what routers and autoscalers reckon with, within 3%."""
    cache_config = filled.core.vllm_config.cache_config
    told = cache_config.num_gpu_blocks * cache_config.block_size
    states, attention = filled.pool.arena.pools
    state_tokens = filled.pool.state_tokens
    if filled.caching:
        # One request after another, until the cache can take no more.
        for _ in range(int(1.5 * told) // 16_000):
            filled.ask(16_000, 2)
            while filled.core.scheduler.has_unfinished_requests():
                filled.step()
        held = (attention.in_use + attention.cached) * 16
        # All states but those that a request has.
        others = states.in_use + states.cached - 2
    else:
        for length in (MAX_MODEL_LEN - 500, 1_000):
            full = filled.full
            while filled.full == full:
                name = filled.ask(length, 500)
                filled.step()
            filled.core.abort_requests([name])
        held, others = attention.in_use * 16, len(filled.core.scheduler.running) - 1
    if filled.manager.kv_cache_config.geometry:
        held += int(others * state_tokens)
    assert held == pytest.approx(told, rel=0.03)


def test_concurrency_is_kept(filled: Filled) -> None:
    """vLLM's own numbers: so many requests of max_model_len run at once, and hold so many tokens."""
    cache_config = filled.core.vllm_config.cache_config
    concurrency = cache_config.kv_cache_max_concurrency
    assert cache_config.kv_cache_size_tokens == int(concurrency * MAX_MODEL_LEN)
    for _ in range(int(concurrency)):
        filled.ask(MAX_MODEL_LEN - 200, 200)
    most = 0
    while filled.core.scheduler.has_unfinished_requests():
        filled.step()
        most = max(most, len(filled.core.scheduler.running))
    assert most == int(concurrency)
    assert not filled.preempted


def test_usage_rises_to_one_when_a_request_waits(filled: Filled) -> None:
    while not filled.full:
        filled.ask(6_000, 200)
        filled.step()
    assert filled.usages == sorted(filled.usages)
    assert len(set(filled.usages)) > 5
    # A request that gives up waits no more.
    (waiting,) = filled.core.scheduler.waiting
    filled.core.abort_requests([waiting.request_id])
    assert filled.usages[-2] <= filled.manager.usage < 1


def test_usage_is_one_while_requests_wait_for_memory(filled: Filled) -> None:
    """Arrivals, ends, aborts and preemptions at random; each step is checked by `Filled.step`."""
    names = []
    for _ in range(250):
        if filled.random.random() < 0.5:
            length = filled.random.choice([100, 700, 3_000, 12_000])
            names.append(filled.ask(length, filled.random.randrange(2, 150)))
        if names and filled.random.random() < 0.05:
            filled.core.abort_requests([names.pop(filled.random.randrange(len(names)))])
        if filled.core.scheduler.has_unfinished_requests():
            filled.step()
    assert filled.full > 10


def test_usage_forgets_who_was_preempted_by_a_reset(filled: Filled) -> None:
    for _ in range(4):
        filled.ask(3_000, 20)
    filled.step()
    assert 0 < filled.manager.usage < 1
    assert filled.core.reset_prefix_cache(reset_running_requests=True)
    assert filled.manager.usage == 0

"""Host memory behind the pools of real engine cores without a model, whose copies take as long as a test wants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any

import pytest

from tidepool.models import entry

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm")
MEMORY = 260 << 20
"""Of the device: it holds a cached conversation of 4,000 tokens and little beside it."""
LENGTH = 4_000
tokens = count(1_000)


def text(length: int = LENGTH) -> list[int]:
    return [next(tokens) for _ in range(length)]


class Bench:
    """An engine, its link to the host, and a clock that a test moves by hand: no copy ends before it does."""

    def __init__(self, *, drafter: bool = False) -> None:
        from tidepool.replay.engine import EngineShape, make_engine
        from tidepool.replay.link import Link

        self.now = 0.0
        self.engine = make_engine(
            EngineShape(
                dict(entry("Qwen3.5-0.8B").config) | ({"mtp_num_hidden_layers": 1} if drafter else {}),
                MEMORY,
                "elastic",
                max_num_seqs=4,
                max_model_len=9_000,
                max_num_batched_tokens=1_024,
                host_bytes=1 << 30,
                options={"speculative_config": {"method": "mtp", "num_speculative_tokens": 1}} if drafter else {},
            )
        )
        self.scheduler = self.engine.scheduler
        self.manager = self.scheduler.kv_cache_manager
        self.host = self.manager.host
        self.host.clock = lambda: self.now
        self.host.speeds.worth_loading = lambda *_: True
        self.link = self.engine.model_executor.link = Link(1e9, 1, lambda: self.now)
        self.hits: dict[str, int] = {}
        self.manager.record_prefix_cache_stats = lambda request, hit: self.hits.update({request.request_id: hit})

    def step(self, times: int = 1) -> None:
        from tidepool.replay.step import take_step

        for _ in range(times):
            take_step(self.engine)

    def ask(self, name: str, prompt: list[int], answer: int = 1) -> None:
        from tidepool.replay.engine import add_request

        add_request(self.engine, name, prompt, answer)

    def answer(self, name: str, prompt: list[int]) -> int:
        """Ask, and let everything end. Returns the tokens that were hit."""
        self.ask(name, prompt)
        self.settle()
        return self.hits[name]

    def settle(self) -> None:
        """Let all requests and copies end."""
        for _ in range(200):
            self.now += 1
            self.step()
            if not (self.scheduler.has_unfinished_requests() or self.host.busy):
                return
        raise AssertionError("it doesn't end")

    def leave(self, name: str, prompt: list[int]) -> None:
        """Ask, and stop once what the request left is being copied to the host."""
        self.ask(name, prompt)
        while self.scheduler.has_unfinished_requests():
            self.step()
        self.step()
        assert self.host.tier.copies == 1, "nothing is being copied"

    def loading(self, name: str, prompt: list[int]) -> None:
        """Ask for what the host alone has, and stop once it is being loaded."""
        self.lose_on_device()
        self.ask(name, prompt)
        self.step()
        assert self.host.loads_for(name)
        assert self.host.tier.copies == 1

    def lose_on_device(self) -> None:
        """The device's cache loses everything, and the host's nothing."""
        assert self.host.tier.copies == 0
        for pool in self.manager.block_pool.pools:
            pool.reset_prefix_cache()

    @property
    def in_use(self) -> int:
        """Bytes on both sides."""
        return int(self.manager.block_pool.arena.usage().in_use + self.host.tier.arena.usage().in_use)

    def reset(self, **options: bool) -> bool:
        return bool(self.engine.reset_prefix_cache(**options))


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_what_has_left_the_device_is_loaded(bench: Bench) -> None:
    prompt = text()
    bench.answer("first", prompt)
    bench.loading("again", [*prompt, *text(100)])
    bench.settle()
    assert bench.hits["again"] == 3_584
    assert bench.in_use == 0


def test_with_a_drafter_as_much_is_loaded_as_the_device_would_hit() -> None:
    """Its lookups need a block more than they give."""
    bench = Bench(drafter=True)
    prompt = text()
    longer = [*prompt, *text(100)]
    bench.answer("first", prompt)
    bench.loading("loaded", longer)
    bench.settle()
    assert bench.hits["loaded"] == bench.answer("again", longer) == 3_584
    assert bench.host.traffic.loads == 1


RESETS: dict[str, Callable[[Bench], Any]] = {
    "reset": lambda bench: bench.reset(),
    "reset with requests running": lambda bench: bench.reset(reset_running_requests=True),
    "reset of the connector, too": lambda bench: bench.reset(reset_connector=True),
    "sleep": lambda bench: bench.engine.sleep(1, "keep") or bench.engine.wake_up() or True,
}


@pytest.mark.parametrize("how", RESETS)
def test_what_is_being_stored_at_a_reset_is_never_found(bench: Bench, how: str) -> None:
    prompt = text()
    bench.leave("first", prompt)
    assert RESETS[how](bench), "a copy alone isn't a reason to refuse"
    assert bench.in_use > 0, "the copy has ended"
    bench.leave("second", text())
    bench.settle()
    assert bench.answer("again", prompt) == 0, "found what was cached before the reset"
    assert bench.in_use == 0


@pytest.mark.parametrize("how", RESETS)
def test_what_is_being_loaded_at_a_reset_is_never_found(bench: Bench, how: str) -> None:
    prompt = text()
    bench.answer("first", prompt)
    bench.loading("again", prompt)
    assert RESETS[how](bench), "a copy alone isn't a reason to refuse"
    assert len(bench.host.tier) == 0
    bench.settle()
    assert bench.hits["again"] == 0, "found what was cached before the reset"
    assert bench.in_use == 0
    assert bench.host.traffic.loads == 1


def test_a_prompt_is_stored_anew_after_a_reset(bench: Bench) -> None:
    """Although the copy of its earlier contents was still under way."""
    prompt = text()
    bench.leave("first", prompt)
    assert bench.reset()
    bench.answer("anew", prompt)
    bench.loading("again", prompt)
    bench.settle()
    assert bench.hits["again"] == 3_584


def test_a_reset_under_running_requests_is_refused_and_leaves_both_tiers(bench: Bench) -> None:
    prompt = text()
    bench.leave("first", prompt)
    bench.now += 1
    bench.ask("runs", text(1_500), answer=100)
    bench.step(2)
    assert not bench.reset()
    assert len(bench.host.tier) > 0
    assert not bench.reset(reset_connector=True), "the device's cache wasn't reset"
    assert len(bench.host.tier) == 0, "the host's was"


def test_a_failed_load_is_read_instead(bench: Bench) -> None:
    prompt = text()
    bench.answer("first", prompt)
    bench.loading("again", prompt)
    (number,) = bench.host.tier._copies
    bench.link._under_way.clear()
    bench.host.ended(number, failed=True, seconds=1.0)
    bench.settle()
    assert bench.hits["again"] == 0
    assert bench.host.traffic.failed == 1
    assert bench.in_use == 0


def test_a_failed_store_is_never_found(bench: Bench) -> None:
    prompt = text()
    bench.leave("first", prompt)
    (number,) = bench.host.tier._copies
    bench.link._under_way.clear()
    bench.host.ended(number, failed=True, seconds=1.0)
    assert len(bench.host.tier) == 0
    bench.lose_on_device()
    assert bench.answer("again", prompt) == 0
    assert bench.in_use == 0


def test_a_request_that_is_aborted_while_it_is_loaded_leaves_nothing_in_use(bench: Bench) -> None:
    prompt = text()
    bench.answer("first", prompt)
    bench.loading("again", prompt)
    bench.engine.abort_requests(["again"])
    assert not bench.host.loads_for("again")
    assert bench.in_use > 0, "the copy still writes there"
    bench.settle()
    assert bench.in_use == 0
    bench.hits.clear()
    bench.ask("once more", prompt)
    bench.step()
    assert bench.hits["once more"] == 3_584, "what was loaded is in the device's cache"


def test_a_state_that_a_running_request_has_left_goes_to_the_host_at_once(bench: Bench) -> None:
    """It may be evicted before the request ends, and the rest is of no use without it."""
    prompt = text()
    bench.ask("long", prompt, answer=200)
    for _ in range(12):
        bench.now += 1
        bench.step()
    assert bench.scheduler.running
    assert sum(bench.host.tier.find(0, key) is not None for key in bench.host.tier._held[0]) == 1
    arena = bench.manager.block_pool.arena
    (state,) = arena.pools[0].kept()
    bench.manager.block_pool.at(0, state).pool.evict_blocks({state})
    bench.settle()
    bench.lose_on_device()
    assert bench.answer("again", [*prompt, *text(100)]) == 3_584
    assert bench.in_use == 0


def test_a_state_that_a_later_one_serves_for_goes_first_on_the_host_too(bench: Bench) -> None:
    from tidepool.cache import PriorityClass

    prompt = text()
    assert bench.answer("alone", text(1_500)) == 0
    assert bench.answer("first", prompt) == 0
    assert bench.answer("next turn", [*prompt, *text(1_000)]) == 3_584
    evictions = bench.host.tier.arena.evictions
    for number in range(200):
        if sum(evictions.values()):
            break
        bench.answer(str(number), text(1_500))
    assert evictions[PriorityClass.LOW] == sum(evictions.values()) == 1


def test_memory_that_is_being_stored_is_not_taken_by_others(bench: Bench) -> None:
    """A prompt that needs it waits for the copy, and is served then."""
    bench.leave("first", text())
    held = {(each.group, each.device) for copy, _ in bench.host.tier._copies.values() for each in copy.blocks}
    assert held
    bench.ask("large", text(8_500))
    bench.step(5)
    arena = bench.manager.block_pool.arena
    assert all(arena.pools[group].refs[block] for group, block in held), "reused under a copy"
    bench.settle()
    assert bench.hits["large"] == 0
    assert bench.in_use == 0


def test_more_memory_than_there_is_ends_in_one_sentence(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from tidepool.cache import CacheConfigError
    from tidepool.vllm_plugin.host_copies import HostBytes

    config = bench.scheduler.kv_cache_config
    view = torch.empty(config.arena_bytes, dtype=torch.uint8)
    assert not HostBytes(config, view).bytes.is_shared(), "it would outlive an engine that is killed"
    assert HostBytes(replace(config, host_extents=1 << 40), None).bytes.numel() == 0, "a stage without layers"
    with pytest.raises(CacheConfigError, match=r"and [\d,]+ are available here. Lower --kv-offloading-size"):
        HostBytes(replace(config, host_extents=1 << 40), view)

    size, empty = config.host_extents * config.host_geometry.extent_bytes, torch.empty

    def refuse(*shape: Any, **options: Any) -> Any:
        if shape == (size,):
            raise RuntimeError("no such memory\nand a long trace")
        return empty(*shape, **options)

    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(CacheConfigError, match=r"doesn't give tidepool .* host_memory\). no such memory$"):
        HostBytes(config, view)


def test_a_copy_that_fails_in_the_thread_is_told_and_the_next_is_made(caplog: pytest.LogCaptureFixture) -> None:
    from tidepool.cache import Copy
    from tidepool.vllm_plugin.host_copies import ThreadCopier

    class Memory:
        def pieces(self, copy: Copy) -> Any:
            if copy.number == 1:
                raise RuntimeError("the bus is broken")
            return iter(())

    copier = ThreadCopier(Memory())  # type: ignore[arg-type]
    with caplog.at_level("ERROR", logger="vllm.tidepool"):
        copier.begin([Copy(1, False, (), 0), Copy(2, True, (), 0)])
        copier.close()
    assert [(each.number, each.failed) for each in copier.ended()] == [(1, True), (2, False)]
    assert [record.message for record in caplog.records] == ["tidepool: a copy from host memory failed."]

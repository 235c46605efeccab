"""The cache of an engine under load, rebuilt by a consumer that sees nothing but its KV events."""

from __future__ import annotations

import os
import random
from collections import Counter
from dataclasses import dataclass, field, fields, replace
from itertools import count
from typing import Any

import pytest

from tidepool.models import entry
from tidepool.replay.trace import GENERATED_TOKEN

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm")

UNIT = 16
"""Tokens that each hash covers beside those of its parent."""
STEPS = 200


def wider_blocks(specs: dict[str, Any]) -> dict[str, Any]:
    """Every other attention layer in blocks of 32 tokens, the others in blocks of 16."""
    attention = [name for name, spec in specs.items() if hasattr(spec, "head_size")]
    return specs | {name: replace(specs[name], block_size=2 * UNIT) for name in attention[::2]}


def windows(specs: dict[str, Any]) -> dict[str, Any]:
    """Every other attention layer to the last 1,000 tokens."""
    from vllm.v1.kv_cache_interface import AttentionSpec, SlidingWindowSpec

    attention = {name: spec for name, spec in specs.items() if isinstance(spec, AttentionSpec)}
    common = {name: {f.name: getattr(spec, f.name) for f in fields(AttentionSpec)} for name, spec in attention.items()}
    return specs | {name: SlidingWindowSpec(**common[name], sliding_window=1000) for name in list(attention)[::2]}


PACKED, HOST = "packed states", "host memory"
ENGINES: dict[str, tuple[str, Any, Any]] = {
    "Qwen3.5-4B": ("Qwen3.5-4B", "elastic", None),
    "Qwen3.5-4B, fixed": ("Qwen3.5-4B", "fixed", None),
    "Nemotron-3-Nano-4B": ("Nemotron-3-Nano-4B", "elastic", None),
    "blocks of two sizes": ("Qwen3.5-4B", "elastic", wider_blocks),
    "windows": ("Qwen3.5-4B", "elastic", windows),
    PACKED: ("Qwen3.5-4B", "elastic", None),
    HOST: ("Qwen3.5-4B", "elastic", None),
    f"{HOST}, blocks of two sizes": ("Qwen3.5-4B", "elastic", wider_blocks),
}


@dataclass
class Consumer:
    """Keeps, for every group, the hashes that are stored, with the tokens and the parent that each came with.

    What it is told more than once is an error, unless it is told again on request.
    """

    hash_function: Any
    groups: dict[int, dict[bytes, tuple[bytes | None, tuple[int, ...]]]] = field(default_factory=dict)
    kinds: dict[int, str] = field(default_factory=dict)
    told: Counter[str] = field(default_factory=Counter)
    repeats: int = 0

    def take(self, event: Any) -> None:
        name = type(event).__name__
        self.told[name] += 1
        if name == "AllBlocksCleared":
            for group in self.groups.values():
                group.clear()
        elif name == "BlockRemoved":
            assert event.block_hashes
            for key in event.block_hashes:
                del self.groups[event.group_idx][key]
        else:
            self._store(event)

    def _store(self, event: Any) -> None:
        assert event.block_hashes
        assert len(event.token_ids) == len(event.block_hashes) * event.block_size
        assert len(event.extra_keys) == len(event.block_hashes)
        assert self.kinds.setdefault(event.group_idx, event.kv_cache_spec_kind) == event.kv_cache_spec_kind
        group, parent = self.groups.setdefault(event.group_idx, {}), event.parent_block_hash
        for index, (key, extra) in enumerate(zip(event.block_hashes, event.extra_keys, strict=True)):
            tokens = tuple(event.token_ids[index * event.block_size : (index + 1) * event.block_size])
            assert key == self._hash(parent, tokens, extra), "the hash isn't that of these tokens"
            self.repeats += key in group
            assert group.setdefault(key, (parent, tokens)) == (parent, tokens)
            parent = key

    def _hash(self, parent: bytes | None, tokens: tuple[int, ...], extra: tuple[str, ...] | None) -> bytes | None:
        from vllm.v1.core.kv_cache_utils import hash_block_tokens

        for start in range(0, len(tokens), UNIT):
            # Salt is part of a prompt's first hash alone.
            salt = tuple(("cache_salt", each) for each in extra) if extra and not start else None
            parent = hash_block_tokens(self.hash_function, parent, tokens[start : start + UNIT], salt)
        return parent

    def compare(self, pools: Any) -> None:
        """With what lookups of each group find."""
        from vllm.v1.core.kv_cache_utils import get_block_hash, get_group_id

        for pool in pools:
            found = pool.cached_block_hash_to_block._cache
            assert {get_group_id(key) for key in found} <= {pool.group}
            assert {get_block_hash(key) for key in found} == set(self.groups.get(pool.group, {}))

    def prompt_of(self, key: bytes | None) -> list[int] | None:
        """All tokens up to a hash, by way of its parents in whichever group; None where one has left the cache."""
        pieces: list[tuple[int, ...]] = []
        while key is not None:
            entry = next((group[key] for group in self.groups.values() if key in group), None)
            if entry is None:
                return None
            key = entry[0]
            pieces.append(entry[1])
        return [token for piece in reversed(pieces) for token in piece]


@dataclass
class Load:
    """Requests that share beginnings, part, go on, come twice at once, and are aborted; seeded."""

    core: Any
    random: random.Random
    reports: bool
    """Whether some requests want to be told what they found."""
    back: int
    """Prompts that come back are of so many last ones."""
    names: int = 0
    prompts: list[list[int]] = field(default_factory=list)

    def ask(self) -> None:
        dice = self.random.random()
        prompt: list[int] = []
        if self.prompts and dice < 0.7:
            earlier = self.random.choice(self.prompts[-self.back :])
            # The same again, one that goes on, or one that parts from it.
            prompt = earlier[: len(earlier) if dice < 0.35 else self.random.randrange(len(earlier))]
        if not prompt or dice > 0.1:
            prompt = prompt + self.random.choices(range(5, 30_000), k=self.random.choice([3, 60, 700, 2_600]))
        prompt = prompt[:9_000]
        self.prompts.append(prompt)
        # Some come twice at once, and so are computed twice.
        for _ in range(self.random.choice([1, 1, 1, 2])):
            self._add(prompt)

    def _add(self, prompt: list[int]) -> None:
        from vllm import SamplingParams
        from vllm.v1.engine import EngineCoreRequest

        self.names += 1
        params = SamplingParams(max_tokens=self.random.randrange(1, 60), ignore_eos=True)
        if self.reports and self.random.random() < 0.2:
            params.extra_args = {"kv_cache_report_mode": "full"}
        salt = "salt" if self.random.random() < 0.1 else None
        request = EngineCoreRequest(str(self.names), prompt, None, params, None, 0.0, None, salt, None)
        self.core.add_request(*self.core.preprocess_add_request(request))


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Any:
    from vllm.config import KVEventsConfig

    from tidepool.replay.engine import EngineShape, make_engine

    os.environ["HF_HUB_OFFLINE"] = "1"
    name, side, change_specs = ENGINES[request.param]
    # Little memory, so that requests are preempted and much is evicted.
    memory = {"elastic": 9 << 28, "fixed": 10 << 28}[side]
    engine = make_engine(
        EngineShape(
            entry(name).config,
            memory,
            side,
            # A load never preempts, so it needs memory that few requests leave.
            max_num_seqs=4 if HOST in request.param else {"elastic": 16, "fixed": 8}[side],
            max_model_len=10_000,
            options={"kv_events_config": KVEventsConfig(True, "null")},
            change_specs=change_specs,
            checkpoint_states="int8" if request.param == PACKED else "same",
            host_bytes=3 << 30 if HOST in request.param else 0,
        )
    )
    if engine.scheduler.kv_cache_manager.host:
        link_to_host(engine)
    return engine


def link_to_host(engine: Any) -> None:
    """Host memory whose contents are always worth loading; copies take about a step or some."""
    from tidepool.replay.link import Link

    steps = count()
    executor, host = engine.model_executor, engine.scheduler.kv_cache_manager.host
    host.clock = lambda: float(next(steps))
    host.speeds.worth_loading = lambda *_: True
    executor.link = Link(2e8, 1, host.clock)


@pytest.mark.parametrize("reports", [False, True])
def test_the_cache_can_be_rebuilt_from_events_alone(
    engine: Any, reports: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By one that keeps a set of hashes, and by one that counts them: each is stored once and removed once, whatever
    the number of blocks that have it."""
    from vllm.utils.hashing import get_hash_fn_by_name

    # vLLM reads once in a process whether hashes are cut to 64 bits.
    for module in ("vllm.v1.core.block_pool", "tidepool.vllm_plugin.events"):
        monkeypatch.setattr(f"{module}.maybe_convert_block_hash", lambda key: key)
    manager = engine.scheduler.kv_cache_manager
    consumer = Consumer(get_hash_fn_by_name(engine.vllm_config.cache_config.prefix_caching_hash_algo))
    take_events = manager.take_events

    def watched() -> Any:
        events = take_events()
        for event in events:
            consumer.take(event)
        consumer.compare(manager.block_pool.pools)
        return events

    monkeypatch.setattr(manager, "take_events", watched)
    # The device forgets what the host still holds.
    load = Load(engine, random.Random(reports), reports, back=40 if manager.host else 12)
    resets = preempted = twice = 0
    for _ in range(STEPS):
        if load.random.random() < 0.4:
            load.ask()
        if load.names and load.random.random() < 0.03:
            engine.abort_requests([str(load.random.randrange(1, load.names + 1))])
        if load.random.random() < 0.01:
            resets += engine.reset_prefix_cache(reset_running_requests=load.random.random() < 0.5)
        if engine.scheduler.has_unfinished_requests():
            engine.step()
            preempted += sum(each.num_preemptions > 0 for each in engine.scheduler.requests.values())
            found = (pool.cached_block_hash_to_block._cache for pool in manager.block_pool.pools)
            twice += sum(isinstance(blocks, dict) for each in found for blocks in each.values())
    while engine.scheduler.has_unfinished_requests():
        engine.step()
    # What came free when the last requests ended is told in the next step.
    watched()

    attention = [group for group, kind in consumer.kinds.items() if kind == "full_attention"]
    assert "mamba" in consumer.kinds.values()
    whole = [prompt for key in consumer.groups[attention[0]] if (prompt := consumer.prompt_of(key))]
    assert len(whole) > 100
    for text in load.random.sample(whole, 50):
        while text[-1] == GENERATED_TOKEN:
            text.pop()
        assert any(prompt[: len(text)] == text for prompt in load.prompts), "nobody asked that"
    assert resets
    assert preempted
    host = manager.host
    assert host is None or host.traffic.loads >= 8
    assert consumer.told["BlockRemoved"] > 500
    assert consumer.told["AllBlocksCleared"] == resets
    assert twice, "no two blocks had the same hash"
    assert bool(consumer.repeats) == reports, "only what is asked for is told again"
    while host and host.busy:
        engine.step()
    watched()
    assert engine.reset_prefix_cache()
    watched()

"""Host memory behind the pools, in the scheduler: what goes there, and what comes back.

When a request ends, what it leaves in the cache is copied to the host. When a request waits whose prompt is found
there, and loading is quicker than reading it, the blocks are copied back *into the device's cache*, and the request
waits for that while others run; then it finds them there like any others. So nothing behind the lookup knows of it.

Each block of a copy is referenced on both sides until the copy has ended on all ranks.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm.logger import init_logger
from vllm.v1.core.kv_cache_utils import KVCacheBlock, make_block_hash_with_group_id
from vllm.v1.request import Request

from tidepool.cache import Arena, Copy, HostTier, Left, Speeds, TurnClass
from tidepool.vllm_plugin.pools import ArenaBlockPool, GroupBlockPool, RequestContext, Serving
from tidepool.vllm_plugin.worker import encode_poison

if TYPE_CHECKING:
    from tidepool.vllm_plugin.coordinator import TidepoolKVCacheManager
    from tidepool.vllm_plugin.planning import TidepoolKVCacheConfig

logger = init_logger("vllm.tidepool")

UNDER_WAY = 16
"""Copies to the host wait while more than this part of the device's memory is being copied, and can't be evicted."""


class OnHost(NamedTuple):
    """A block that a lookup found on the host alone, in place of one on the device."""

    group: int
    """Of the arena."""
    key: Hashable
    tokens: int
    is_null: bool = False


class TieredBlockPool(GroupBlockPool):
    """The blocks of one group, with host memory behind them."""

    def cached_run(self, hashes: Sequence[Any], most: int, groups: Sequence[int]) -> list[KVCacheBlock] | None:
        """As the device's; while `HostMemory.looking` blocks need be looked up singly."""
        host = self.memory.host
        return None if host is not None and host.looking else super().cached_run(hashes, most, groups)

    def get_cached_block(self, block_hash: Any, kv_cache_group_ids: list[int]) -> list[Any] | None:
        """As vLLM's; while `HostMemory.looking`, what only the host holds is found, too."""
        found: list[Any] | None = super().get_cached_block(block_hash, kv_cache_group_ids)
        host = self.memory.host
        if found is not None or host is None or not host.looking:
            return found
        blocks: list[Any] = []
        for group in kv_cache_group_ids:
            key = make_block_hash_with_group_id(block_hash, group)
            block = self.cached_block_hash_to_block.get_one_block(key)
            if block is None:
                held = ((each, host.tier.find(each, key)) for each in self.core_groups)
                block = next((OnHost(each, key, found.tokens) for each, found in held if found), None)
                if block is None:
                    return None
            blocks.append(block)
        return blocks


@dataclass(slots=True)
class _Departure:
    """What a request has left in the device's cache, before it is copied."""

    turn: TurnClass
    left: list[Left]


@dataclass(slots=True)
class _Load:
    """A prefix on its way to the device."""

    request: Request
    """The one that waits for it."""
    tokens: int
    """Of the prefix."""
    new_tokens: int
    """Those of them that didn't hit before."""
    held: list[KVCacheBlock]
    """Blocks of the prefix that the device has, which mustn't go meanwhile."""
    began: float
    loaded: list[tuple[OnHost, KVCacheBlock]] = field(default_factory=list)
    ended: bool = False
    """Whether the request has ended meanwhile."""
    forgotten: bool = False
    """Whether the cache was reset meanwhile: nobody may find what is loaded."""


@dataclass
class Traffic:
    """What was copied so far."""

    loads: int = 0
    loaded_tokens: int = 0
    loaded_bytes: int = 0
    stores: int = 0
    stored_bytes: int = 0
    wait_seconds: float = 0.0
    """That requests waited for loads, all together."""
    failed: int = 0
    """Copies that failed."""


class HostMemory:
    """The host's memory of one engine."""

    def __init__(self, memory: ArenaBlockPool, config: TidepoolKVCacheConfig) -> None:
        geometry = config.host_geometry
        assert geometry
        self._memory = memory
        self._limit = config.arena_bytes // UNDER_WAY
        self.tier = HostTier(config.block_bytes)
        self.tier.arena = Arena.elastic(
            geometry,
            config.host_extents,
            policy=config.make_policy(memory.reuse),
            on_evict=self._evicted,
            clock=lambda: memory.arena.bytes_allocated,
            state_groups=config.state_groups,
        )
        self.looking = False
        """Whether lookups find what only the host holds."""
        self.speeds = Speeds()
        self.clock: Callable[[], float] = time.monotonic
        """Seconds."""
        self.traffic = Traffic()
        self._departures: deque[_Departure] = deque()
        self._early: dict[str, list[Left]] = {}
        """By running request, the states that it has left so far."""
        self._new_early: dict[str, list[Left]] = {}
        """Those of them since the last step."""
        self._stores = 0
        self._held: dict[int, list[KVCacheBlock]] = {}
        """By number of a copy to the host, its blocks on the device."""
        self._loads: dict[int, _Load] = {}
        self._loading: dict[str, _Load] = {}
        """By request that waits for a load."""
        self._settled: set[str] = set()
        """Requests that wait, and for which nothing will be loaded."""
        self._reached: dict[str, int] = {}
        """By request for which something was loaded, tokens that the device's cache then held."""
        self._loaded: dict[str, int] = {}
        """By request that waits, tokens that were loaded for it."""
        self._to_send: list[Copy] = []
        self._to_poison: list[tuple[int, int]] = []
        """(group, block on the host) of what has gone since the last step."""
        self._loading_bytes = 0

    # To the host.

    def leave_early(self, name: str, states: Iterable[KVCacheBlock]) -> None:
        """A request that may go on has released these states: they go to the host with the next step.

        What running requests have left goes first where memory is tight, so they may be gone when the request ends,
        and what else it leaves is of no use without them.
        """
        retention = self._memory.retention
        record = retention.requests.get(name) if retention else None
        if record is None:
            return
        left = [self._left(block) for block in states if block.block_hash is not None]
        # An answer's states are left anew every few tokens.
        left = [e for e in left if e.tokens <= record.checkpoints.last and not self.tier.find(e.group, e.key)]
        if left:
            self._early.setdefault(name, []).extend(left)
            self._new_early.setdefault(name, []).extend(left)

    def leave(self, name: str, turn: TurnClass) -> None:
        """A request has released its blocks: note what it leaves in the cache."""
        at = self._memory.at
        blocks = [at(group, index) for group, index in self._memory.arena.left_by(name)]
        left = [self._left(block) for block in blocks if block.block_hash is not None]
        self._new_early.pop(name, None)
        groups, keys = {each.group for each in left}, {each.key for each in left}
        for each in self._early.pop(name, ()):
            if each.group not in groups:
                left.insert(0, each)
            elif each.key not in keys and not each.shared:
                self.tier.lower(each.group, each.key)
        if left:
            self._departures.append(_Departure(turn, left))

    def _left(self, block: KVCacheBlock) -> Left:
        """A cached block, as it may be copied to the host."""
        group, index = block.pool.place(block)
        shared = bool(self._memory.arena.pools[group].shared[index])
        assert block.block_hash is not None
        return Left(group, index, block.block_hash, block.block_hash_num_tokens or 0, shared)

    def _depart_early(self) -> None:
        """What running requests have left since the last step goes to the host."""
        new, self._new_early = self._new_early, {}
        retention = self._memory.retention
        for name, left in new.items():
            if retention and (record := retention.requests.get(name)):
                self._departures.append(_Departure(record.match.turn, left))

    def _store(self, departure: _Departure) -> None:
        """Begin to copy what is still there."""
        at = self._memory.at
        left = [now for each in departure.left if (now := self._where_now(each))]
        self._stores += 1
        copy = self.tier.store(self._stores, departure.turn, left)
        if copy is None:
            return
        held = [at(each.group, each.device) for each in copy.blocks]
        self._hold(held)
        self._held[copy.number] = held
        self._to_send.append(copy)
        self.traffic.stores += 1
        self.traffic.stored_bytes += copy.bytes

    def _where_now(self, left: Left) -> Left | None:
        """What a request has left, where it is by now; None if it has gone."""
        block = self._memory.at(left.group, left.block)
        if block.block_hash == left.key:
            return left
        # A packed state may have been relocated.
        found = block.pool.cached_block_hash_to_block.get_one_block(left.key)
        if found is None and self.tier.find(left.group, left.key):
            return left  # it was copied before it went
        if found is None or block.pool.place(found).group != left.group:
            return None
        return left._replace(block=block.pool.place(found).block)

    def _hold(self, blocks: Sequence[KVCacheBlock]) -> None:
        of_pool: dict[Any, list[KVCacheBlock]] = {}
        for block in blocks:
            of_pool.setdefault(block.pool, []).append(block)
        for pool, held in of_pool.items():
            pool.touch(held)

    # From the host.

    def delays(self, manager: TidepoolKVCacheManager, request: Request, computed: int) -> bool:
        """Whether a waiting request waits for a load; begins one where that is worth it.

        Args:
            manager: the cache's manager.
            request: a request that has just been looked up.
            computed: tokens of it that the device's cache holds.
        """
        name = request.request_id
        if name in self._loading:
            return True
        if name in self._settled or not len(self.tier) or computed >= self._reached.get(name, request.num_tokens):
            return False
        if manager.refused_before(name) or not manager.prefix_cache_lookup_enabled(request):
            return False
        found, tokens = manager.coordinator.find_in_both_tiers(request.block_hashes, request.num_tokens - 1)
        missing: list[list[OnHost]] = [[] for _ in self._memory.block_bytes]
        for block in (block for blocks in found for block in blocks if isinstance(block, OnHost)):
            missing[block.group].append(block)
        size = sum(len(each) * size for each, size in zip(missing, self._memory.block_bytes, strict=True))
        more = tokens - computed
        if more <= 0 or not size or not self.speeds.worth_loading(more, size, self._loading_bytes):
            self._settled.add(name)
            return False
        return self._load(manager, request, found, missing, tokens, computed)

    def _load(
        self,
        manager: TidepoolKVCacheManager,
        request: Request,
        found: Sequence[Sequence[Any]],
        missing: Sequence[Sequence[OnHost]],
        tokens: int,
        computed: int,
    ) -> bool:
        """Begin to load, if there is memory for it: as much as the request will need anyway, beside those that run."""
        memory, name = self._memory, request.request_id
        held = [b for blocks in found for b in blocks if not b.is_null and not isinstance(b, OnHost)]
        idle: list[list[int]] = [[] for _ in missing]
        for group, index in (block.pool.place(block) for block in held if not block.ref_cnt):
            idle[group].append(index)
        needs = [len(each) for each in missing]
        charges, pinned = memory.arena.extents_needed(needs, idle)
        extents = manager.coordinator.extents_beside_others(name, tokens, needs, idle, sum(charges) + pinned)
        if extents > memory.arena.available:
            return False
        load = _Load(request, tokens, tokens - computed, held, self.clock())
        self._hold(held)
        memory.arena.reserve(charges)
        with Serving(memory, RequestContext(name)):
            for group, wanted in enumerate(missing):
                if wanted:
                    load.loaded += zip(wanted, memory.get_new_blocks(group, len(wanted)), strict=True)
        memory.arena.release_reservation()
        places = [block.pool.place(block) for _, block in load.loaded]
        if memory.poison:
            memory.operations += [encode_poison(group, index, memory.groups) for group, index in places]
        copy = self.tier.load(
            [(on.group, on.key, index) for (on, _), (_, index) in zip(load.loaded, places, strict=True)]
        )
        self._loads[copy.number] = self._loading[name] = load
        self._loading_bytes += copy.bytes
        self._to_send.append(copy)
        self.traffic.loads += 1
        self.traffic.loaded_tokens += tokens - computed
        self.traffic.loaded_bytes += copy.bytes
        return True

    def forget(self, name: str) -> None:
        """A request has ended, or begins anew."""
        self._early.pop(name, None)
        self._new_early.pop(name, None)
        self._settled.discard(name)
        self._reached.pop(name, None)
        self._loaded.pop(name, None)
        load = self._loading.pop(name, None)
        if load:
            load.ended = True

    # What goes.

    def _evicted(self, group: int, block: int) -> None:
        self.tier.evicted(group, block)
        if self._memory.poison:
            self._to_poison.append((group, block))

    def poisoned(self) -> list[tuple[int, int]]:
        """(group, block on the host) of what is to be poisoned before the copies of this step."""
        gone, self._to_poison = self._to_poison, []
        return gone

    # Copies.

    def copies(self) -> list[Copy]:
        """Copies to make from now on."""
        self._depart_early()
        while self._departures and (not self._held or self.tier.bytes_under_way < self._limit):
            self._store(self._departures.popleft())
        copies, self._to_send = self._to_send, []
        return copies

    def loads_for(self, name: str) -> bool:
        """Whether a request waits for a load."""
        return name in self._loading

    def loaded_for(self, name: str) -> int:
        """Tokens that were loaded for a request that waits, and hit by now."""
        return self._loaded.get(name, 0)

    @property
    def busy(self) -> bool:
        """Whether copies are under way or wait."""
        return bool(self.tier.copies or self._departures)

    def ended(self, number: int, *, failed: bool, seconds: float) -> None:
        """A copy has ended on all ranks, after so many seconds."""
        copy = self.tier.ended(number, failed=failed)
        self.traffic.failed += failed
        if copy.to_host:
            self._release(self._held.pop(number))
            return
        load = self._loads.pop(number)
        name = load.request.request_id
        self._loading_bytes -= copy.bytes
        self.traffic.wait_seconds += self.clock() - load.began
        if failed and not load.ended:
            self._settled.add(name)
        if not failed:
            self.speeds.loaded(copy.bytes, seconds)
        if arrived := not (failed or load.forgotten):
            self._cache(load)
        blocks = [block for _, block in load.loaded]
        if load.ended:
            self._release(blocks)
        else:
            del self._loading[name]
            if arrived:
                self._reached[name] = load.tokens
                self._loaded[name] = self._loaded.get(name, 0) + load.new_tokens
            with Serving(self._memory, RequestContext(name)):
                self._release(blocks)
        self._release(load.held)

    def _cache(self, load: _Load) -> None:
        """What was loaded can be found in the device's cache from now on."""
        for pool, loaded in groupby(load.loaded, lambda each: each[1].pool):
            pool.cache_loaded(load.request, [(on.key, block, on.tokens) for on, block in loaded])

    def _release(self, blocks: Iterable[KVCacheBlock]) -> None:
        # The last block of a prefix is to go first.
        self._memory.free_blocks(list(blocks)[::-1])

    def copied_alone(self) -> list[KVCacheBlock]:
        """Blocks on the device that are referenced by copies and by nothing else."""
        held = [block for blocks in self._held.values() for block in blocks]
        for load in self._loads.values():
            held += [*load.held, *(block for _, block in load.loaded)]
        references = Counter(map(id, held))
        return [block for block in {id(each): each for each in held}.values() if block.ref_cnt == references[id(block)]]

    def reset(self) -> None:
        """Forget all contents, and those of copies under way, in either direction."""
        for load in self._loads.values():
            load.forgotten = True
        self._departures.clear()
        self._early.clear()
        self._new_early.clear()
        self._settled.clear()
        self._reached.clear()
        self._loaded.clear()
        gone = self.tier.forget_all()
        if self._memory.poison:
            self._to_poison += gone


@contextmanager
def looking(host: HostMemory) -> Iterator[None]:
    """While it lasts, lookups find what only the host holds."""
    host.looking = True
    try:
        yield
    finally:
        host.looking = False

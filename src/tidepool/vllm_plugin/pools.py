"""vLLM's block pool, one for each group, over the core's arena.

The core knows which blocks are in use, cached or free; vLLM's `BlockPool` knows what is in them (the prefix hashes)
and counts references. `GroupBlockPool` keeps vLLM's half and asks the arena for the other. A block comes to the arena's
notice only when its count leaves or reaches zero.

vLLM's managers call pools without saying for which request. So whoever calls them says it first, by a `Serving`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from vllm.distributed.kv_events import AllBlocksCleared, KVCacheEvent
from vllm.logger import init_logger
from vllm.v1.core.block_pool import BlockHashToBlockMap, BlockPool
from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    BlockHashWithGroupId,
    KVCacheBlock,
    get_block_hash,
    make_block_hash_with_group_id,
)
from vllm.v1.kv_cache_interface import MambaSpec

from tidepool.cache import Arena, Retention, RetentionPolicy, ReuseModel, Waiting
from tidepool.vllm_plugin.events import ExactEvents
from tidepool.vllm_plugin.planning import TidepoolKVCacheConfig
from tidepool.vllm_plugin.worker import encode, encode_copy, encode_poison, encode_poison_extent

if TYPE_CHECKING:
    from tidepool.vllm_plugin.host import HostMemory

logger = init_logger("vllm.tidepool")

RUN = 64
"""Blocks of a prompt that are looked up at once: so many are looked up for nothing at most."""
REUSE_UNITS = 16
"""Ages up to this part of the memory aren't told apart; see `ReuseModel`."""


class Place(NamedTuple):
    """Where the arena has a block."""

    group: int
    block: int


class PackedBlocks(NamedTuple):
    """The blocks of packed states of one group of states."""

    group: int
    """Of the arena."""
    blocks: int
    """Block ids, the null block included."""


class RequestContext(NamedTuple):
    """The request that the pools serve, and what they need to know of it."""

    name: str
    finds_shared: bool = False
    """Whether what it finds in the cache is a shared prefix."""
    supersedes_before: int = 0
    """States that it finds before this place, in tokens, are superseded: it will leave a later one."""
    last_checkpoint: int | None = None
    """While its blocks are released, tokens up to the last state that it leaves; None if that isn't known."""


class Serving:
    """While it lasts, the pools serve one request. Doesn't nest."""

    __slots__ = ("_context", "_memory")

    def __init__(self, memory: ArenaBlockPool, context: RequestContext) -> None:
        self._memory = memory
        self._context = context

    def __enter__(self) -> None:
        assert self._memory.serving is None, "the pools serve one request at a time"
        self._memory.serving = self._context

    def __exit__(self, *_: object) -> None:
        self._memory.serving = None


class GroupBlockPool(ExactEvents, BlockPool):
    """The blocks of one group. Everything about hashes is vLLM's; where blocks come from and go is the arena's."""

    def __init__(
        self,
        group: int,
        memory: ArenaBlockPool,
        num_blocks: int,
        enable_caching: bool,
        hash_block_size: int,
        block_tokens: int,
        holds_states: bool,
        packed: PackedBlocks | None = None,
    ) -> None:
        self.group = group
        self.packed = packed
        """Where states lie that are only cached, if those are kept in another format."""
        self.holds_states = holds_states
        """Whether the blocks are states; else they are attention."""
        self.event_tokens = hash_block_size if holds_states else block_tokens
        self.memory = memory
        self.arena: Arena = memory.arena
        self.num_gpu_blocks = num_blocks
        self.medium = memory.medium
        self.enable_caching = enable_caching
        self.hash_block_size = hash_block_size
        self.num_hash_lookahead_tokens = memory.num_hash_lookahead_tokens
        # Packed states have ids of their own behind the others': what knows them by hash needn't tell them apart.
        ids = num_blocks + (packed.blocks if packed else 0)
        self.blocks = [KVCacheBlock(index, pool=self) for index in range(ids)]
        self.null_block = self.blocks[0]
        self.null_block.is_null = True
        self.cached_block_hash_to_block = BlockHashToBlockMap()
        self._group_ids = [group]
        self._key_end = make_block_hash_with_group_id(BlockHash(b""), group)
        self.cached_block_hashes_by_block: dict[int, set[BlockHashWithGroupId]] = {}
        self.enable_kv_cache_events = memory.enable_kv_cache_events
        # One queue for all groups keeps their events in the order in which they happened.
        self.kv_event_queue = memory.kv_event_queue
        self.metrics_collector = None
        self.superseded: set[int] = set()
        """States in use that a request has found, and will leave a later one."""
        self.low: set[int] = set()
        """States that are to be kept at low priority."""
        self.blocks_of: Mapping[str, Sequence[KVCacheBlock]] = {}
        """By request, the blocks that the group's manager has for it."""

    def is_packed(self, block: KVCacheBlock) -> bool:
        """Whether this is the block of a packed state: no kernel can read it."""
        return block.block_id >= self.num_gpu_blocks

    def place(self, block: KVCacheBlock) -> Place:
        """Where the arena has this block."""
        index = block.block_id - self.num_gpu_blocks
        if index < 0:
            return Place(self.group, block.block_id)
        assert self.packed is not None
        return Place(self.packed.group, index)

    def block_at(self, place: Place) -> KVCacheBlock:
        """The block at a place of this pool's."""
        return self.blocks[place.block + (0 if place.group == self.group else self.num_gpu_blocks)]

    def get_new_blocks_of(self, group: int, count: int) -> list[KVCacheBlock]:
        """Blocks of one group of the arena, with one reference each."""
        if group == self.group:
            return self.get_new_blocks(count)
        got = self.arena.allocate(group, count, request=self._filed_under)
        return self._referenced(group, got)

    def _referenced(self, group: int, indices: Sequence[int]) -> list[KVCacheBlock]:
        """The blocks that a group of the arena has just handed out."""
        first = 0 if group == self.group else self.num_gpu_blocks
        new = [self.blocks[first + index] for index in indices]
        for block in new:
            block.ref_cnt = 1
        if self.low:
            self.low.difference_update(block.block_id for block in new)
        return new

    @property
    def core_groups(self) -> tuple[int, ...]:
        """The groups of the arena that have this pool's blocks, packed ones first."""
        return (self.packed.group, self.group) if self.packed else (self.group,)

    def by_core_group(self, blocks: Sequence[KVCacheBlock]) -> Iterator[tuple[int, list[int]]]:
        """(group, blocks) of the arena, in the order of its groups."""
        if self.packed is None:
            yield self.group, [block.block_id for block in blocks]
            return
        places = [self.place(block) for block in blocks]
        for group in self.core_groups:
            if of_group := [place.block for place in places if place.group == group]:
                yield group, of_group

    def get_cached_block(self, block_hash: BlockHash, kv_cache_group_ids: list[int]) -> list[KVCacheBlock] | None:
        """As vLLM's, in fewer calls: it is asked for every block of a prompt that is found."""
        if kv_cache_group_ids != self._group_ids:
            return super().get_cached_block(block_hash, kv_cache_group_ids)
        key = BlockHashWithGroupId(block_hash + self._key_end)
        block = self.cached_block_hash_to_block.get_one_block(key)
        return None if block is None else [block]

    def cached_run(self, hashes: Sequence[BlockHash], most: int, groups: Sequence[int]) -> list[KVCacheBlock] | None:
        """The blocks of the first ``most`` hashes, as far as they are cached; None if they need be looked up singly."""
        if groups != self._group_ids:
            return None
        end, find = self._key_end, self.cached_block_hash_to_block.get_one_block
        run: list[KVCacheBlock] = []
        for start in range(0, most, RUN):
            found = [find(BlockHashWithGroupId(key + end)) for key in hashes[start : min(start + RUN, most)]]
            if None in found:
                return run + found[: found.index(None)]
            run += found
        return run

    def get_new_blocks(self, num_blocks: int) -> list[KVCacheBlock]:
        """Blocks with one reference each; evicts what the arena's policy says."""
        request = self.memory.serving
        before = self.blocks_of.get(request.name) if request else None
        last = before[-1].block_id if before and not before[-1].is_null and not self.is_packed(before[-1]) else None
        got = self.arena.allocate(self.group, num_blocks, last=last, request=self._filed_under)
        return self._referenced(self.group, got)

    def get_packed_block(self, source: KVCacheBlock) -> KVCacheBlock | None:
        """A block, with one reference, to pack a state into; None if there is none or states aren't packed."""
        if self.packed is None:
            return None
        index = self.arena.allocate_for_copy(self.packed.group, self.group, source.block_id, request=self._filed_under)
        return None if index is None else self._referenced(self.packed.group, [index])[0]

    @property
    def _filed_under(self) -> str | None:
        """The request that the arena files cached blocks under; without prefix caching there are none."""
        request = self.memory.serving
        return request.name if request and self.enable_caching else None

    def touch(self, blocks: Sequence[KVCacheBlock]) -> None:
        """Reference blocks that a prefix hit found."""
        request = self.memory.serving
        shared = request is not None and request.finds_shared
        waking: list[KVCacheBlock] = []
        for block in blocks:
            if block.is_null:
                continue
            if block.ref_cnt == 0:
                waking.append(block)
            block.ref_cnt += 1
            if self.holds_states:
                self._state_found(block, shared=shared)
        if waking:
            for group, ids in self.by_core_group(waking):
                # vLLM releases a state that it has copied without saying for whom.
                self.arena.touch(group, ids, shared=shared, request=self._filed_under)

    def _state_found(self, block: KVCacheBlock, *, shared: bool) -> None:
        request, retention = self.memory.serving, self.memory.retention
        self.low.discard(block.block_id)
        tokens = block.block_hash_num_tokens or 0
        if request and retention:
            retention.state_at(request.name, tokens)
            if tokens < request.supersedes_before and not shared:
                self.superseded.add(block.block_id)

    def free_blocks(self, ordered_blocks: Iterable[KVCacheBlock]) -> None:
        """Drop a reference to each block, the first to be evicted first. Blocks of other pools go to theirs."""
        idle: list[KVCacheBlock] = []
        elsewhere: dict[BlockPool, list[KVCacheBlock]] = {}
        for block in ordered_blocks:
            if block.pool is not self:
                elsewhere.setdefault(block.pool, []).append(block)
            elif not block.is_null:
                block.ref_cnt -= 1
                if block.ref_cnt == 0:
                    idle.append(block)
        if idle and self.holds_states:
            self._release_states(idle)
        elif idle:
            self._release(self.group, [block.block_id for block in idle], self._of_attention(idle))
        for pool, blocks in elsewhere.items():
            pool.free_blocks(blocks)

    def _release_states(self, states: Sequence[KVCacheBlock]) -> None:
        """States have lost their last reference. Those that are kept are packed, where that is to be."""
        kept = [(block, self._of_state(block)) for block in states]
        if self.packed:
            kept = [each for block, keep in kept for each in self._packing(block, keep)]
        for group, same in groupby(((self.place(block), keep) for block, keep in kept), lambda each: each[0].group):
            places, keeps = zip(*same, strict=True)
            self._release(group, [place.block for place in places], keeps)
        request, host = self.memory.serving, self.memory.host
        if host and request:
            host.leave_early(request.name, [block for block, keep in kept if keep == Retention.KEEP])

    def _packing(self, state: KVCacheBlock, keep: Retention) -> list[tuple[KVCacheBlock, Retention]]:
        """A state without references, and the block that it is packed into, with what becomes of each."""
        packed = None if not keep or self.is_packed(state) else self.pack(state)
        if packed is None:
            return [(state, keep)]
        packed.ref_cnt = 0
        return [(state, Retention.DROP), (packed, keep)]

    def pack(self, state: KVCacheBlock) -> KVCacheBlock | None:
        """Have what a state's block holds now packed before the next step, and let lookups find that in its place.

        Returns:
            The packed state, with one reference; None if there is no memory for it.
        """
        packed = self.get_packed_block(state)
        if packed is not None:
            self.move_block_hashes(state, packed)
            self.memory.order_copy(state, packed)
        return packed

    def _release(self, group: int, blocks: Sequence[int], kept: Sequence[Retention]) -> None:
        """Give blocks back to the arena's group."""
        self.arena.release(group, blocks, kept, request=self._filed_under)
        if self.memory.poison:
            self.memory.operations += [
                encode_poison(group, block, self.memory.groups)
                for block, each in zip(blocks, kept, strict=True)
                if not each
            ]

    @property
    def _waiting(self) -> Waiting | None:
        """What requests wait for, if this is the group whose states are looked up for them: the first."""
        return self.memory.waiting if self is self.memory.first_states else None

    def _of_state(self, block: KVCacheBlock) -> Retention:
        """What becomes of a state without references."""
        superseded = block.block_id in self.superseded
        self.superseded.discard(block.block_id)
        policy = self.memory.retention
        if block.block_hash is None or policy is None:
            return Retention.DROP
        kept = policy.of_state(
            get_block_hash(block.block_hash),
            superseded=superseded,
            shared=self._is_shared(block),
            low=block.block_id in self.low,
        )
        if kept == Retention.LOW and self.memory.host is not None:
            for group in self.core_groups:
                self.memory.host.tier.lower(group, block.block_hash)
        return kept

    def _is_shared(self, block: KVCacheBlock) -> bool:
        group, index = self.place(block)
        return bool(self.arena.pools[group].shared[index])

    def _of_attention(self, blocks: Sequence[KVCacheBlock]) -> list[Retention]:
        """What becomes of blocks of attention without references."""
        policy, request = self.memory.retention, self.memory.serving
        if policy is None:
            return [Retention.DROP] * len(blocks)
        end = policy.attention_end(request.last_checkpoint if request else None)
        kept: list[Retention] = []
        drop, keep = Retention.DROP, Retention.KEEP  # Looked up once: a prompt has thousands of blocks.
        for block in blocks:
            if block.block_hash is None:
                kept.append(drop)
            elif (block.block_hash_num_tokens or 0) <= end:
                kept.append(keep)
            else:
                self._maybe_evict_cached_block(block)
                kept.append(drop)
        return kept

    def move_block_hashes(self, src_block: KVCacheBlock, dst_block: KVCacheBlock) -> None:
        """As vLLM's: a state's place in the cache passes to the block that it is copied to."""
        super().move_block_hashes(src_block, dst_block)
        if src_block.block_id in self.low:
            self.low.discard(src_block.block_id)
            self.low.add(dst_block.block_id)

    def _insert_block_hash(
        self, block_hash_with_group_id: BlockHashWithGroupId, block: KVCacheBlock, num_tokens: int | None
    ) -> None:
        """Put contents into the prefix cache; what waits is told of states."""
        super()._insert_block_hash(block_hash_with_group_id, block, num_tokens)
        if self._waiting is not None:
            self._waiting.cached(get_block_hash(block_hash_with_group_id))

    def _remove_cached_block_hashes(self, block: KVCacheBlock) -> list[BlockHashWithGroupId]:
        """As vLLM's; what waits is told of states."""
        removed: list[BlockHashWithGroupId] = super()._remove_cached_block_hashes(block)
        if self._waiting is not None:
            for key in removed:
                if self.cached_block_hash_to_block.get_one_block(key) is None:
                    self._waiting.removed(get_block_hash(key))
        return removed

    def evict_blocks(self, block_ids: set[int]) -> None:
        """Drop blocks of this group from the prefix cache; those in use stay in use."""
        for block_id in block_ids:
            block = self.blocks[block_id]
            self._maybe_evict_cached_block(block)
            if block.ref_cnt == 0:
                group, index = self.place(block)
                self.arena.forget(group, [index])

    def is_spare(self, block: KVCacheBlock) -> bool:
        """Whether a state is in the cache for nobody but the prompts that continue the one that left it."""
        return block.ref_cnt == 0 and not self._is_shared(block)

    def take_over(self, block: KVCacheBlock) -> None:
        """The request that the pools serve gets a block that is in the cache, to keep something else in it."""
        assert self.memory.serving is not None
        self.touch([block])
        self.arena.adopt(*self.place(block), self.memory.serving.name)

    def drop_contents(self, place: Place) -> None:
        """The arena is taking this cached block away: no lookup may find it any more."""
        self._maybe_evict_cached_block(self.block_at(place))

    def reset_prefix_cache(self) -> bool:
        """Forget every cached block of this group; the caller has made sure that no request uses any."""
        self.cached_block_hash_to_block = BlockHashToBlockMap()
        self.cached_block_hashes_by_block.clear()
        for group in self.core_groups:
            cached = list(self.arena.pools[group].kept())
            for index in cached:
                self.block_at(Place(group, index)).reset_hash()
            self.arena.forget(group, cached)
        if self._waiting is not None:
            self._waiting.forget_states()
        return True

    def get_num_free_blocks(self) -> int:
        """Blocks that this group could get if no other asked."""
        pool = self.arena.pools[self.group]
        return pool.usable + self.arena.available * pool.blocks_per_extent

    def get_usage(self) -> float:
        """Share of the arena in use by all groups."""
        return self.memory.get_usage()


class ArenaBlockPool:
    """What the scheduler sees as *the* block pool: all groups' memory, counted in extents."""

    medium = "GPU"

    def __init__(
        self,
        config: TidepoolKVCacheConfig,
        *,
        enable_caching: bool,
        hash_block_size: int,
        enable_kv_cache_events: bool,
        poison: bool,
        pool_class: type[GroupBlockPool] = GroupBlockPool,
        num_hash_lookahead_tokens: int = 0,
    ) -> None:
        self.groups = len(config.pool_blocks)
        """Groups of the arena: those of packed states come behind vLLM's."""
        self.poison = poison
        self.operations: list[int] = []
        """Orders to the workers, to be carried out before their next step; see `tidepool.vllm_plugin.worker`."""
        self.new_blocks: Sequence[Callable[[], list[int]]] = ()
        """By group, what tells and forgets the attention blocks that requests have got since the last time."""
        self.enable_caching = enable_caching
        self.enable_kv_cache_events = enable_kv_cache_events
        self.num_hash_lookahead_tokens = num_hash_lookahead_tokens
        """Tokens behind a block that its hash covers as well; vLLM's managers and events ask."""
        self.kv_event_queue: list[KVCacheEvent] = []
        self.num_gpu_blocks = config.num_blocks
        specs = [group.kv_cache_spec for group in config.kv_cache_groups]
        self.reuse = ReuseModel(config.arena_bytes // REUSE_UNITS)
        self.arena = config.make_arena(
            policy=config.make_policy(self.reuse),
            on_evict=self._on_evict,
            on_move=self._on_move,
            on_relocate=self._on_relocate,
            relocatable=tuple(config.packed_numbers.values()),
        )
        self.retention: RetentionPolicy | None = None
        """With prefix caching, what is kept."""
        self.serving: RequestContext | None = None
        """The request that the pools serve now; see `Serving`."""
        self.waiting: Waiting | None = None
        """What requests that wait will find, where those with much in the cache go first."""
        self.host: HostMemory | None = None
        """The memory behind this one, if there is any."""
        self.block_bytes = config.block_bytes
        """Of one block of each group, without padding."""
        packed = {
            group: PackedBlocks(number, config.pool_blocks[number]) for group, number in config.packed_numbers.items()
        }
        self.pools = tuple(
            pool_class(
                group,
                self,
                blocks,
                enable_caching,
                hash_block_size,
                spec.block_size,
                isinstance(spec, MambaSpec),
                packed.get(group),
            )
            for group, (blocks, spec) in enumerate(zip(config.pool_blocks, specs, strict=False))
        )
        self._pool_of = {group: pool for pool in self.pools for group in pool.core_groups}
        self.first_states = next((pool for pool in self.pools if pool.holds_states), None)
        self.growing = [self.arena.pools[pool.group] for pool in self.pools if not pool.holds_states]
        """The core's pools of groups whose need grows with the text."""
        self.checkpoint_tokens = config.checkpoint_tokens
        """Tokens from one checkpoint to the next."""
        self.state_tokens = config.state_bytes / config.token_bytes
        """Tokens whose attention takes as many bytes as a cached state."""
        self.null_block = self.pools[0].null_block

    def at(self, group: int, block: int) -> KVCacheBlock:
        """The block that the arena has there."""
        return self._pool_of[group].block_at(Place(group, block))

    def get_new_blocks(self, group: int, count: int) -> list[KVCacheBlock]:
        """Blocks of one group of the arena, with one reference each."""
        return self._pool_of[group].get_new_blocks_of(group, count)

    def _on_evict(self, group: int, block: int) -> None:
        self._pool_of[group].drop_contents(Place(group, block))
        if self.poison:
            self.operations.append(encode_poison(group, block, self.groups))

    def _on_relocate(self, group: int, block: int, new: int) -> None:
        source, target = self.at(group, block), self.at(group, new)
        source.pool.low.discard(target.block_id)
        source.pool.move_block_hashes(source, target)
        self.order_copy(source, target)

    def _on_move(self, extent: int, old: int | None, new: int) -> None:
        if self.poison:
            self.operations.append(encode_poison_extent(new, extent, self.groups))

    def get_num_free_blocks(self) -> int:
        """Extents that could go to any group."""
        return self.arena.available

    def get_usage(self) -> float:
        """Share of the arena's bytes that are in use, 0 to 1; the null bytes count as neither."""
        usage = self.arena.usage()
        return usage.in_use / max(usage.total - usage.null, 1)

    def free_blocks(self, ordered_blocks: Iterable[KVCacheBlock]) -> None:
        """Drop a reference to each block, whichever pool it is of."""
        self.pools[0].free_blocks(ordered_blocks)

    def evict_blocks(self, block_ids: set[int]) -> None:
        """Refused: an id without its group names a block in every group."""
        raise NotImplementedError(
            "tidepool: a block id alone doesn't name a block; evict through the pool of its group "
            "(coordinator.single_type_managers[group].block_pool)."
        )

    def reset_prefix_cache(self) -> bool:
        """Forget all cached blocks of all groups, or none if a request uses any.

        Copies from and to the host end as they would, and nobody finds what they have copied.
        """
        copied = self.host.copied_alone() if self.host else []
        in_use = sum(pool.in_use for pool in self.arena.pools) - len(copied)
        if in_use:
            logger.warning("Can't reset the prefix cache: %d blocks are still in use.", in_use)
            return False
        for block in copied:
            block.reset_hash()
        for pool in self.pools:
            pool.reset_prefix_cache()
        if self.host is not None:
            self.host.reset()
        if self.enable_kv_cache_events:
            self.kv_event_queue.append(AllBlocksCleared())
        logger.info("Reset the prefix cache of %d groups.", len(self.pools))
        return True

    def take_events(self) -> list[KVCacheEvent]:
        """The events of all groups since the last call, in order."""
        events = self.kv_event_queue.copy()
        self.kv_event_queue.clear()
        return events

    def order_copy(self, source: KVCacheBlock, target: KVCacheBlock) -> None:
        """Have a block copied, packed or unpacked before the next step, in order with what else is ordered."""
        self._order_zeroing()
        self.operations.append(encode_copy(self.unique_id(source), self.unique_id(target)))

    def _order_zeroing(self) -> None:
        """Attention blocks that requests have got are zeroed before what is ordered from now on."""
        for group, take in enumerate(self.new_blocks):
            self.operations += [encode(group, block, self.groups) for block in take()]

    def take_operations(self) -> list[int]:
        """What workers do to blocks before the next step, in this order."""
        self._order_zeroing()
        operations, self.operations = self.operations, []
        return operations

    def unique_id(self, block: KVCacheBlock) -> int:
        """The id by which workers know a block."""
        group, index = block.pool.place(block)
        return encode(group, index, self.groups)

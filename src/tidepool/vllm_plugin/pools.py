"""vLLM's block pool, one for each group, over the core's arena.

The core knows which blocks are in use, cached or clean; vLLM's `BlockPool` knows what is in them (the prefix hashes)
and counts references. `GroupBlockPool` keeps vLLM's half and asks the arena for the other. A block comes to the arena's
notice only when its count leaves or reaches zero.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from vllm.distributed.kv_events import AllBlocksCleared, KVCacheEvent
from vllm.logger import init_logger
from vllm.v1.core.block_pool import BlockHashToBlockMap, BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, BlockHashWithGroupId, KVCacheBlock, get_block_hash
from vllm.v1.kv_cache_interface import MambaSpec

from tidepool.cache import Arena, BranchStatistics, ExpectedReturn, LeastRecentlyUsed, PromptEnds, Retention, ReuseModel
from tidepool.vllm_plugin.events import ExactEvents
from tidepool.vllm_plugin.planning import TidepoolKVCacheConfig
from tidepool.vllm_plugin.worker import encode, encode_poison, encode_poison_extent

logger = init_logger("vllm.tidepool")

JUNCTIONS = 4096
"""Places where prompts parted that are remembered at most."""
RETURN_UNITS = 16
"""Ages up to this part of the memory aren't told apart; see `ReuseModel`."""
LIFETIME = 16
"""Times that the memory is handed out, after which a prompt counts as never gone on from; see `PromptEnds`."""
SECOND_STATES = (1, 2, 4, 8)
"""How far before its last checkpoint a prompt may leave a second state, in checkpoints; see `BranchStatistics`."""


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
        checkpoint_tokens: int | None,
    ) -> None:
        self.group = group
        self.checkpoint_tokens = checkpoint_tokens
        """Tokens between states; None where the blocks aren't states."""
        self.event_tokens = hash_block_size if checkpoint_tokens else block_tokens
        self.memory = memory
        self.arena: Arena = memory.arena
        self.num_gpu_blocks = num_blocks
        self.medium = memory.medium
        self.enable_caching = enable_caching
        self.hash_block_size = hash_block_size
        self.blocks = [KVCacheBlock(index, pool=self) for index in range(num_blocks)]
        self.null_block = self.blocks[0]
        self.null_block.is_null = True
        self.cached_block_hash_to_block = BlockHashToBlockMap()
        self.cached_block_hashes_by_block: dict[int, set[BlockHashWithGroupId]] = {}
        self.enable_kv_cache_events = memory.enable_kv_cache_events
        # One queue for all groups keeps their events in the order in which they happened.
        self.kv_event_queue = memory.kv_event_queue
        self.metrics_collector = None
        self.handed_on: set[int] = set()
        """States in use that a request goes on from, and will leave a later one."""
        self.spares: set[int] = set()
        """States that are cached only as long as memory isn't short."""
        self.request_blocks: Sequence[KVCacheBlock] = ()
        """Blocks of the request that the next ones are for."""

    def get_new_blocks(self, num_blocks: int) -> list[KVCacheBlock]:
        """Blocks with one reference each; evicts what the arena finds coldest."""
        blocks, before = self.blocks, self.request_blocks
        last = before[-1].block_id if before and not before[-1].is_null else None
        got = self.arena.allocate(self.group, num_blocks, last=last, request=self.memory.request)
        new = [blocks[i] for i in got]
        for block in new:
            block.ref_cnt = 1
        if self.spares:
            self.spares.difference_update(got)
        return new

    def touch(self, blocks: Sequence[KVCacheBlock]) -> None:
        """Reference blocks that a prefix hit found."""
        waking: list[int] = []
        for block in blocks:
            if block.is_null:
                continue
            if block.ref_cnt == 0:
                waking.append(block.block_id)
            block.ref_cnt += 1
            if self.checkpoint_tokens:
                self.spares.discard(block.block_id)
                tokens = block.block_hash_num_tokens or 0
                self.memory.leaves_state_at(tokens)
                if tokens < self.memory.state_to_come and not self.memory.finds_trunk:
                    self.handed_on.add(block.block_id)
        if waking:
            self.arena.touch(self.group, waking, shared=self.memory.finds_trunk)

    def free_blocks(self, ordered_blocks: Iterable[KVCacheBlock]) -> None:
        """Drop a reference to each block, the first to be evicted first. Blocks of other pools go to theirs."""
        idle: list[int] = []
        keep: list[Retention] = []
        elsewhere: dict[BlockPool, list[KVCacheBlock]] = {}
        for block in ordered_blocks:
            if block.pool is not self:
                elsewhere.setdefault(block.pool, []).append(block)
            elif not block.is_null:
                block.ref_cnt -= 1
                if block.ref_cnt == 0:
                    idle.append(block.block_id)
                    keep.append(self._worth(block))
        if idle:
            self.arena.release(self.group, idle, keep, request=self.memory.request)
            if self.memory.poison:
                self.memory.operations += [
                    encode_poison(self.group, index, self.memory.groups)
                    for index, kept in zip(idle, keep, strict=True)
                    if not kept
                ]
        for pool, blocks in elsewhere.items():
            pool.free_blocks(blocks)

    def _worth(self, block: KVCacheBlock) -> Retention:
        """What becomes of a block without references.

        Attention behind the last state that its request leaves is of no use to anybody. A state that saves little
        beside another one is kept only while there is memory to spare. So is the state that a conversation has gone on
        from, once it has a later one.
        """
        handed_on = block.block_id in self.handed_on
        self.handed_on.discard(block.block_id)
        if block.block_hash is None:
            return Retention.DROP
        tokens = block.block_hash_num_tokens or 0
        if not self.checkpoint_tokens:
            if self.memory.reach is None or tokens - self.memory.ahead_tokens <= self.memory.reach:
                return Retention.KEEP
            self._maybe_evict_cached_block(block)
            return Retention.DROP
        if not tokens or get_block_hash(block.block_hash) in self.memory.junctions:
            return Retention.KEEP
        if handed_on:
            return Retention.KEEP if self.arena.pools[self.group].shared[block.block_id] else Retention.LOW
        return Retention.LOW if block.block_id in self.spares else Retention.KEEP

    def move_block_hashes(self, src_block: KVCacheBlock, dst_block: KVCacheBlock) -> None:
        """As vLLM's: a state's place in the cache passes to the block that it is copied to."""
        super().move_block_hashes(src_block, dst_block)
        if src_block.block_id in self.spares:
            self.spares.discard(src_block.block_id)
            self.spares.add(dst_block.block_id)

    def _insert_block_hash(
        self, block_hash_with_group_id: BlockHashWithGroupId, block: KVCacheBlock, num_tokens: int | None
    ) -> None:
        """Put contents into the prefix cache; of states it is remembered how far the last one of a request reaches."""
        super()._insert_block_hash(block_hash_with_group_id, block, num_tokens)
        if self.checkpoint_tokens:
            self.memory.leaves_state_at(num_tokens or 0)

    def evict_blocks(self, block_ids: set[int]) -> None:
        """Drop blocks of this group from the prefix cache; those in use stay in use."""
        for block_id in block_ids:
            block = self.blocks[block_id]
            self._maybe_evict_cached_block(block)
            if block.ref_cnt == 0:
                self.arena.forget(self.group, [block_id])

    def drop_contents(self, block_id: int) -> None:
        """The arena is taking this cached block away: no lookup may find it any more."""
        self._maybe_evict_cached_block(self.blocks[block_id])

    def reset_prefix_cache(self) -> bool:
        """Forget every cached block of this group; the caller has made sure that none is in use."""
        self.cached_block_hash_to_block = BlockHashToBlockMap()
        self.cached_block_hashes_by_block.clear()
        cached = list(self.arena.pools[self.group].kept())
        for block_id in cached:
            self.blocks[block_id].reset_hash()
        self.arena.forget(self.group, cached)
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
    ) -> None:
        self.groups = len(config.kv_cache_groups)
        self.poison = poison
        self.operations: list[int] = []
        """Poisoning for the workers to do before their next step, in order; see `tidepool.vllm_plugin.worker`."""
        self.enable_caching = enable_caching
        self.enable_kv_cache_events = enable_kv_cache_events
        self.kv_event_queue: list[KVCacheEvent] = []
        self.num_gpu_blocks = config.num_blocks
        specs = [group.kv_cache_spec for group in config.kv_cache_groups]
        self.returns = ReuseModel(config.arena_bytes // RETURN_UNITS)
        self.arena = config.make_arena(
            policy=ExpectedReturn(self.returns) if config.eviction == "returns" else LeastRecentlyUsed(),
            on_evict=self._on_evict,
            on_move=self._on_move,
        )
        self.request: str | None = None
        """The request that the coordinator is at work for; None without prefix caching, where nobody needs to know."""
        self.reach: int | None = None
        """Tokens up to the last state of the request whose blocks are being released; None if that isn't known."""
        self.last_states: dict[str, int] = {}
        """Tokens up to the last state that a request under way has found or left in the cache, if any."""
        self.state_to_come = 0
        """Tokens up to the last state that this request is to leave and that is no spare."""
        self.junctions: OrderedDict[BlockHash, None] = OrderedDict()
        """Hashes of the places where prompts parted."""
        self.finds_trunk = False
        """Whether what this request finds in the cache is a trunk."""
        self.pools = tuple(
            GroupBlockPool(
                group,
                self,
                blocks,
                enable_caching,
                hash_block_size,
                spec.block_size,
                config.checkpoint_tokens if isinstance(spec, MambaSpec) else None,
            )
            for group, (blocks, spec) in enumerate(zip(config.pool_blocks, specs, strict=True))
        )
        self.growing = [
            pool for pool, spec in zip(self.arena.pools, specs, strict=True) if not isinstance(spec, MambaSpec)
        ]
        """The core's pools of groups whose need grows with the text."""
        self.checkpoint_tokens = config.checkpoint_tokens
        """Tokens from one checkpoint to the next."""
        self.prompt_ends = PromptEnds(self.checkpoint_tokens, config.arena_bytes * LIFETIME)
        self.partings = BranchStatistics([self.checkpoint_tokens * steps for steps in SECOND_STATES])
        state_bytes = sum(
            stride for stride, pool in zip(config.strides, self.pools, strict=True) if pool.checkpoint_tokens
        )
        token_bytes = sum(
            stride / spec.block_size
            for stride, spec in zip(config.strides, specs, strict=True)
            if not isinstance(spec, MambaSpec)
        )
        self.state_tokens = state_bytes / token_bytes
        """Tokens whose attention takes as many bytes as a state."""
        self.ahead_tokens = 0
        """How much more than it gives a lookup has to find: a block of attention, with a drafter."""
        self.null_block = self.pools[0].null_block

    def leaves_state_at(self, tokens: int) -> None:
        """This request has found or left a state there."""
        if self.request is not None:
            self.last_states[self.request] = max(tokens, self.last_states.get(self.request, 0))

    def remember_junction(self, key: BlockHash) -> None:
        """Other prompts went on differently from here: the state at this place is no spare."""
        self.junctions[key] = None
        self.junctions.move_to_end(key)
        if len(self.junctions) > JUNCTIONS:
            self.junctions.popitem(last=False)

    def _on_evict(self, group: int, block: int) -> None:
        self.pools[group].drop_contents(block)
        if self.poison:
            self.operations.append(encode_poison(group, block, self.groups))

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
        """Forget all cached blocks of all groups, or none if any block is in use."""
        in_use = sum(pool.in_use for pool in self.arena.pools)
        if in_use:
            logger.warning("Can't reset the prefix cache: %d blocks are still in use.", in_use)
            return False
        for pool in self.pools:
            pool.reset_prefix_cache()
        if self.enable_kv_cache_events:
            self.kv_event_queue.append(AllBlocksCleared())
        logger.info("Reset the prefix cache of %d groups.", self.groups)
        return True

    def take_events(self) -> list[KVCacheEvent]:
        """The events of all groups since the last call, in order."""
        events = self.kv_event_queue.copy()
        self.kv_event_queue.clear()
        return events

    def take_operations(self) -> list[int]:
        """The poisoning due before the next step."""
        operations, self.operations = self.operations, []
        return operations

    def encode_zeroing(self, group: int, block_ids: Iterable[int]) -> list[int]:
        """Ids that tell workers to zero blocks of a group."""
        return [encode(group, block, self.groups) for block in block_ids]

"""Seam 2: the scheduler's bookkeeping of blocks.

vLLM's coordinator gives every single-type manager the same pool and adds their needs up in blocks. Here each manager
holds its own group's pool, and needs are added up in extents, which is also what `ArenaBlockPool` counts as free: the
comparison in `KVCacheManager.allocate_slots` stays vLLM's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm.v1.core.kv_cache_coordinator import (
    HybridKVCacheCoordinator,
    KVCacheCoordinator,
    KVCacheCoordinatorNoPrefixCache,
)
from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock, KVCacheBlockCopy
from vllm.v1.core.single_type_kv_cache_manager import MambaManager
from vllm.v1.request import Request, RequestStatus

from tidepool.cache import Arrival, Place, Turn
from tidepool.vllm_plugin.pools import ArenaBlockPool, saves_little
from tidepool.vllm_plugin.settings import poison_requested
from tidepool.vllm_plugin.worker import encode

GROWING_PER_SPARE_EXTENT = 8
"""Chosen by replay, see docs/prefix-caching.md."""
LONG_PROMPT = 2048
"""Tokens from which on a prompt leaves a state at its last checkpoint alone: not at its very end, which would save less
than a quarter more for a whole step, and not behind the answer that it goes on from. Chosen by replay, likewise."""


class ArenaCoordinator(KVCacheCoordinator if TYPE_CHECKING else object):  # type: ignore[misc]
    """Mixed into vLLM's coordinators: own pools, needs in extents."""

    block_pool: ArenaBlockPool

    def install_pools(self, hash_block_size: int) -> None:
        """Give every manager its group's pool in place of the shared one."""
        shared = self.block_pool
        self.block_pool = ArenaBlockPool(
            self.kv_cache_config,
            enable_caching=shared.enable_caching,
            hash_block_size=hash_block_size,
            enable_kv_cache_events=shared.enable_kv_cache_events,
            poison=poison_requested(),
        )
        for manager, pool in zip(self.single_type_managers, self.block_pool.pools, strict=True):
            manager.block_pool = pool
            manager._null_block = pool.null_block
            pool.ahead_tokens = manager.block_size if manager.use_eagle else 0
        self._no_charges = [0] * len(self.single_type_managers)
        self._charges = self._no_charges
        self.postponed = False
        """Whether the last need counted was refused for this step alone, whatever memory there is."""

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: tuple[Sequence[KVCacheBlock], ...],
        num_encoder_tokens: int,
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        """Extents that this allocation takes from those free, all groups together."""
        if self.retention_interval != 0:
            prefill_end = 0
        needs: list[int] = []
        touched: list[Sequence[int]] = []
        anything = self.postponed = False
        for manager, computed in zip(self.single_type_managers, new_computed_blocks, strict=True):
            need = manager.get_num_blocks_to_allocate(
                request_id,
                num_tokens,
                computed,
                total_computed_tokens,
                num_local_computed_tokens,
                num_tokens_main_model,
                apply_admission_cap=apply_admission_cap,
                prefill_end=prefill_end,
            )
            if need > manager.block_pool.num_gpu_blocks:
                # More than the pool has: a manager's way to say "not in this step".
                self._charges = self._no_charges
                self.postponed = need == manager.block_pool.num_gpu_blocks + 1
                return self.block_pool.num_gpu_blocks + 1
            # Managers count the cached blocks that a hit will touch among the needed; the arena wants them by name.
            # What lies before a window was found and isn't touched.
            idle: Sequence[int] = ()
            if computed:
                skipped = manager.get_num_skipped_tokens(total_computed_tokens) // manager.block_size
                idle = [block.block_id for block in computed[skipped:] if block.ref_cnt == 0 and not block.is_null]
            needs.append(need - len(idle))
            touched.append(idle)
            anything |= need > 0
        if not anything:
            self._charges = self._no_charges
            return 0
        self._charges, pinned = self.block_pool.arena.extents_needed(needs, touched)
        return sum(self._charges) + pinned

    def allocate_new_blocks(self, request_id: str, *args: Any, **kwargs: Any) -> tuple[list[KVCacheBlock], ...]:
        """Allocate for every group what `get_num_blocks_to_allocate` last counted."""
        if self._charges is self._no_charges:
            return super().allocate_new_blocks(request_id, *args, **kwargs)
        arena = self.block_pool.arena
        for manager, pool in zip(self.single_type_managers, self.block_pool.pools, strict=True):
            pool.request_blocks = manager.req_to_blocks.get(request_id, ())
        arena.promise(self._charges)
        try:
            return super().allocate_new_blocks(request_id, *args, **kwargs)
        finally:
            arena.settle()
            self._charges = self._no_charges
            for pool in self.block_pool.pools:
                pool.request_blocks = ()

    def reset_prefix_cache(self) -> bool:
        """Reset all groups or none."""
        return self.block_pool.reset_prefix_cache()


class TidepoolHybridCoordinator(ArenaCoordinator, HybridKVCacheCoordinator):
    """With prefix caching."""

    def __init__(self, *args: Any, hash_block_size: int, **kwargs: Any) -> None:
        super().__init__(*args, hash_block_size=hash_block_size, **kwargs)
        self.install_pools(hash_block_size)


class TidepoolNoCacheCoordinator(ArenaCoordinator, KVCacheCoordinatorNoPrefixCache):
    """Without prefix caching."""

    def __init__(self, *args: Any, hash_block_size: int, **kwargs: Any) -> None:
        super().__init__(*args, hash_block_size=hash_block_size, **kwargs)
        self.install_pools(hash_block_size)


def make_coordinator(
    *, enable_caching: bool, allow_partial_hash_hits: bool = True, **kwargs: Any
) -> KVCacheCoordinator:
    """A coordinator with a pool for each group; arguments as vLLM's ``get_kv_cache_coordinator``."""
    if enable_caching:
        return TidepoolHybridCoordinator(enable_caching=True, allow_partial_hash_hits=allow_partial_hash_hits, **kwargs)
    return TidepoolNoCacheCoordinator(**kwargs)


class TidepoolKVCacheManager(KVCacheManager):
    """vLLM's manager, with the group in every block id that goes to the workers, and room left to those who run.

    It also tells the cache when prompts begin and end: see `tidepool.cache.returns`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._arrivals: dict[str, Arrival] = {}
        """Of each request that was offered memory and hasn't ended, what was known when it came."""
        self._second_states: dict[str, int] = {}
        """Of these requests, tokens up to the second state that they were told to leave, if any."""
        self._found: tuple[KVCacheBlocks, int, int] = (self.empty_kv_cache_blocks, 0, 0)
        """What the last lookup found."""
        self._refused: tuple[Request, int, tuple[KVCacheBlocks, int, int]] | None = None
        """The last waiting request that there was no memory for, `Arena.released` then, and what it found cached."""
        # Without a drafter, vLLM keeps a state where prompts part only at multiples of the checkpoint spacing, which is
        # wide here; its switch for the exact place works without one too.
        self.mamba_shared_prefix_checkpoint = self.enable_caching and self.coordinator.enable_partial_hash_hits
        if self.mamba_shared_prefix_checkpoint:
            for manager in self.coordinator.single_type_managers:
                if isinstance(manager, MambaManager):
                    manager.shared_prefix_checkpoint = True

    def _continues(self, request: Request) -> bool:
        """Whether a request goes on from an earlier one; looked up once, before its first blocks."""
        arrival = self._arrivals.get(request.request_id)
        if arrival is None:
            pool: ArenaBlockPool = self.block_pool
            arrival = pool.returns.began(request.block_hashes[::-1], pool.arena.turnover)
            if arrival.distance is not None:
                pool.partings.saw(arrival.distance)
            self._arrivals[request.request_id] = arrival
            pool.arena.start(request.request_id, arrival.turn)
        return arrival.turn != Turn.FIRST

    def get_computed_blocks(self, request: Request) -> tuple[KVCacheBlocks, int, int]:
        """As vLLM's, but another place for the state that it would keep where prompts part.

        None where a long prompt goes on from an earlier one: it shares that one's answer as well, which looks like a
        place where prompts part; but the answer was given once, and a state there costs each turn a step and a block.
        And where no prompt has parted from this one yet, the place where later ones are expected to.
        """
        if found := self._refused_before(request):
            return found
        blocks, tokens, junction = super().get_computed_blocks(request)
        if junction >= LONG_PROMPT and self._continues(request):
            junction = 0
        pool: ArenaBlockPool = self.block_pool
        if junction:
            pool.remember_junction(request.block_hashes[junction // pool.pools[0].hash_block_size - 1])
        elif self.mamba_shared_prefix_checkpoint:
            junction = self._second_state(request, tokens)
            if junction:
                self._second_states[request.request_id] = junction
        self._found = blocks, tokens, junction
        return blocks, tokens, junction

    def _second_state(self, request: Request, computed: int) -> int:
        """Tokens up to which a prompt should leave a second state, of which ``computed`` are cached; 0 for none."""
        pool: ArenaBlockPool = self.block_pool
        _, checkpoint = self._last_places(request)
        distance = pool.partings.second_state(checkpoint, pool.state_tokens)
        place = checkpoint - distance
        return place if distance and place > computed and place >= LONG_PROMPT else 0

    def allocate_slots(self, request: Request, *args: Any, **kwargs: Any) -> KVCacheBlocks | None:
        """As vLLM's; it files what the request leaves in the cache under its name."""
        if not self.enable_caching:
            return super().allocate_slots(request, *args, **kwargs)
        pool: ArenaBlockPool = self.block_pool
        waits = request.status != RequestStatus.RUNNING
        if waits:
            if self._refused_before(request):
                return None
            pool.finds_trunk = not self._continues(request)
            end, checkpoint = self._last_places(request)
            long = request.num_prompt_tokens >= LONG_PROMPT
            pool.state_to_come = checkpoint if long or saves_little(end, pool.checkpoint_tokens) else end
        pool.request = request.request_id
        slots = super().allocate_slots(request, *args, **kwargs)
        pool.request = None
        if slots is None and waits and not self.coordinator.postponed:
            self._refused = request, pool.arena.released, self._found
        return slots

    def _refused_before(self, request: Request) -> tuple[KVCacheBlocks, int, int] | None:
        """What a waiting request had found when it got no memory, if no block has come free since.

        vLLM asks again in every step, and looking up a long prompt costs more than the rest of the step. The answer is
        only good for being refused again: what was found may have been evicted.
        """
        if self._refused and self._refused[0] is request and self._refused[1] == self.block_pool.arena.released:
            return self._refused[2]
        return None

    def free(self, request: Request) -> None:
        """Release all blocks of a request that ends or is preempted."""
        pool: ArenaBlockPool = self.block_pool
        if self.enable_caching:
            pool.request = request.request_id
            pool.reach = pool.last_states.pop(request.request_id, None)
        left = pool.reach is not None
        super().free(request)
        pool.request = pool.reach = None
        self._end(request, left=left)

    def pop_blocks_for_free(self, request: Request) -> list[KVCacheBlock]:
        """The same, where the blocks are released later."""
        self._end(request, left=self.block_pool.last_states.pop(request.request_id, None) is not None)
        return super().pop_blocks_for_free(request)

    def _end(self, request: Request, *, left: bool) -> None:
        """Forget a request if it has finished, but for where it ended if it has ``left`` (or found) a state."""
        if self._refused and self._refused[0] is request:
            self._refused = None
        if not self.enable_caching or not request.is_finished():
            return
        second = self._second_states.pop(request.request_id, None)
        arrival = self._arrivals.pop(request.request_id, None)
        if arrival is None:
            return
        pool: ArenaBlockPool = self.block_pool
        pool.arena.finish(request.request_id)
        if not left:
            return
        end, checkpoint = self._last_places(request)
        unit = pool.pools[0].hash_block_size
        places = [(end, 0), (checkpoint, 0)]
        places += [(checkpoint - distance, distance) for distance in pool.partings.distances]
        pool.returns.ended(
            [
                Place(request.block_hashes[place // unit - 1], distance, kept=place in (end, checkpoint, second))
                for place, distance in places
                if place > 0
            ],
            pool.arena.turnover,
            arrival,
        )

    def _last_places(self, request: Request) -> tuple[int, int]:
        """Tokens up to the last place where a later prompt can go on from this one, and up to the last checkpoint."""
        # The last token is always computed anew, so nobody can go on from behind it.
        last = request.num_prompt_tokens - 1
        unit, spacing = self.block_pool.pools[0].hash_block_size, self.block_pool.checkpoint_tokens
        return last // unit * unit, last // spacing * spacing

    @property
    def watermark_blocks(self) -> int:
        """Extents to leave free when a waiting request is admitted beside running ones.

        A share of those that attention holds, for running requests will need about that much more before they end:
        for their answers, and for a second state at each checkpoint. Without it each of them preempts a request that
        has to be read again. Short chats hold little attention, so for them it is next to nothing.
        """
        if not self.enable_caching or not self.kv_cache_config.geometry:
            return 0
        return sum(pool.pinned for pool in self.block_pool.growing) // GROWING_PER_SPARE_EXTENT

    @watermark_blocks.setter
    def watermark_blocks(self, blocks: int) -> None:
        assert blocks == 0, "a watermark of the user's closes a gate"

    def take_new_block_ids(self) -> list[int]:
        """What workers do to blocks before the next step: poisoning first, then zeroing of new attention blocks."""
        pool: ArenaBlockPool = self.block_pool
        operations = pool.take_operations()
        for group, manager in enumerate(self.coordinator.single_type_managers):
            operations += pool.encode_zeroing(group, manager.take_new_block_ids())
        return operations

    def take_kv_cache_block_copies(self) -> tuple[list[KVCacheBlockCopy], list[KVCacheBlock]]:
        """Pending copies, and the blocks that stay referenced until they are done."""
        copies: list[KVCacheBlockCopy] = []
        retained: list[KVCacheBlock] = []
        groups = len(self.coordinator.single_type_managers)
        for group, manager in enumerate(self.coordinator.single_type_managers):
            for source, target in manager.take_pending_cow_copies():
                copies.append(
                    KVCacheBlockCopy(encode(group, source.block_id, groups), encode(group, target.block_id, groups))
                )
                retained += (source, target)
        return copies, retained

    def evict_blocks(self, block_ids: set[int]) -> None:
        """Refused, see `ArenaBlockPool.evict_blocks`."""
        self.block_pool.evict_blocks(block_ids)

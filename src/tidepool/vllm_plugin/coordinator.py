"""Seam 2: the scheduler's bookkeeping of blocks.

vLLM's coordinator gives every single-type manager the same pool and adds their needs up in blocks. Here each manager
holds its own group's pool, and needs are added up in extents, which is also what `ArenaBlockPool` counts as free: the
comparison in `KVCacheManager.allocate_slots` stays vLLM's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm.v1.core.kv_cache_coordinator import (
    HybridKVCacheCoordinator,
    KVCacheCoordinator,
    KVCacheCoordinatorNoPrefixCache,
)
from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock, KVCacheBlockCopy
from vllm.v1.core.single_type_kv_cache_manager import MambaManager
from vllm.v1.request import Request, RequestStatus

from tidepool.cache import (
    NO_ANSWER_STATE,
    AnswerLengths,
    GroupGrowth,
    Growth,
    Outlook,
    RetentionPolicy,
    Waiting,
    headroom,
)
from tidepool.vllm_plugin.host import HostMemory, TieredBlockPool, looking
from tidepool.vllm_plugin.planning import checkpoint_rules
from tidepool.vllm_plugin.pools import ArenaBlockPool, GroupBlockPool, RequestContext, Serving
from tidepool.vllm_plugin.settings import overcommit_requested, poison_requested
from tidepool.vllm_plugin.states import StateManager
from tidepool.vllm_plugin.versions import finds_one_more


class Need(NamedTuple):
    """What a request was found to need."""

    request_id: str
    blocks: Sequence[int]
    """New blocks of each group."""
    charges: Sequence[int] = ()
    """Extents for them; () where it needs no block."""
    postponed: bool = False
    """Refused for this step alone, whatever memory there is."""


class ArenaCoordinator(KVCacheCoordinator if TYPE_CHECKING else object):  # type: ignore[misc]
    """Mixed into vLLM's coordinators: own pools, needs in extents."""

    block_pool: ArenaBlockPool

    @property
    def _packed_groups(self) -> int:
        """Groups of the arena that vLLM has no manager for: those of packed states, behind the others."""
        return self.block_pool.groups - len(self.single_type_managers)

    def install_pools(self, hash_block_size: int) -> None:
        """Give every manager its group's pool in place of the shared one."""
        shared = self.block_pool
        host = bool(self.kv_cache_config.host_extents) and shared.enable_caching
        self.block_pool = ArenaBlockPool(
            self.kv_cache_config,
            enable_caching=shared.enable_caching,
            hash_block_size=hash_block_size,
            enable_kv_cache_events=shared.enable_kv_cache_events,
            poison=poison_requested(),
            pool_class=TieredBlockPool if host else GroupBlockPool,
            num_hash_lookahead_tokens=getattr(shared, "num_hash_lookahead_tokens", 0),
        )
        if host:
            self.block_pool.host = HostMemory(self.block_pool, self.kv_cache_config)
        for manager, pool in zip(self.single_type_managers, self.block_pool.pools, strict=True):
            manager.block_pool = pool
            manager._null_block = pool.null_block
            pool.blocks_of = manager.req_to_blocks
        self.block_pool.new_blocks = [manager.take_new_block_ids for manager in self.single_type_managers]
        self._overcommits = overcommit_requested()
        self.growth = Growth(
            [
                GroupGrowth(0)
                if isinstance(manager, MambaManager)
                else GroupGrowth(manager.block_size, manager.max_admission_blocks_per_request)
                for manager in self.single_type_managers
            ]
            + [GroupGrowth(0)] * self._packed_groups
        )
        self._nothing = Need("", [0] * self.block_pool.groups)
        self.need = self._nothing
        """What was counted last."""

    def states_to_come(self, request_id: str, tokens: int) -> int:
        """Blocks of states that a request whose prompt is read up to here will take beside the one that it has."""
        return 0

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
        needs = [0] * self.block_pool.groups
        touched: list[Sequence[int]] = [()] * self.block_pool.groups
        asked = [0] * self.block_pool.groups
        self.need = self._nothing
        anything = False
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
            asked[manager.kv_cache_group_id] = need
            anything |= need > 0
            if need > manager.block_pool.num_gpu_blocks:
                # More than the pool has: a manager's way to say "not in this step".
                self.need = Need(request_id, asked, postponed=need == manager.block_pool.num_gpu_blocks + 1)
                return self.block_pool.num_gpu_blocks + 1
            # Managers count the cached blocks that a hit will touch among the needed; the arena wants them by name.
            # What lies before a window was found and isn't touched.
            idle: list[KVCacheBlock] = []
            if computed:
                skipped = manager.get_num_skipped_tokens(total_computed_tokens) // manager.block_size
                idle = [block for block in computed[skipped:] if block.ref_cnt == 0 and not block.is_null]
            needs[manager.kv_cache_group_id] = need - len(idle)
            for group, blocks in manager.block_pool.by_core_group(idle):
                touched[group] = blocks
        if not anything:
            return 0
        arena = self.block_pool.arena
        charges, pinned = arena.extents_needed(needs, touched)
        self.need = Need(request_id, asked, charges)
        now = sum(charges) + pinned
        if request_id in self.growth:
            return now
        if self.growth:
            found = [len(computed) for computed in new_computed_blocks]
            self.growth.found(request_id, found + [0] * self._packed_groups)
        return self.extents_beside_others(request_id, num_tokens, needs, touched, now)

    def extents_beside_others(
        self, request_id: str, tokens: int, needs: Sequence[int], touched: Sequence[Sequence[int]], now: int
    ) -> int:
        """Extents that have to be free for a waiting request: it leaves to those under way what they will still take,
        and must find what it will take itself.

        Args:
            request_id: the request.
            tokens: that it gets blocks for now.
            needs, touched: as for `Arena.extents_needed`.
            now: what that says they take.
        """
        if not self.growth or self._overcommits:
            return now
        arena = self.block_pool.arena
        outlook = self._outlook(request_id, tokens)
        later = [self.growth.blocks, self.growth.total(outlook)]
        most = arena.extents_needed_at_most([[sum(each) for each in zip(needs, *later, strict=True)]], touched)
        if most > arena.available:
            moments = self.growth.needs(outlook)
            moments = [[need + more for need, more in zip(needs, moment, strict=True)] for moment in moments]
            most = arena.extents_needed_at_most(moments, touched)
        return max(most, now + self.headroom())

    def _outlook(self, request_id: str, tokens: int) -> Outlook:
        """What a request will still take once it has blocks for ``tokens`` tokens."""
        return self.growth.outlook(request_id, tokens, self.states_to_come(request_id, tokens))

    def headroom(self) -> int:
        """Extents that stay out of use when a waiting request is admitted beside running ones."""
        if not self.kv_cache_config.geometry or not self.block_pool.enable_caching:
            return 0
        return headroom(self.block_pool.growing)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any
    ) -> tuple[list[KVCacheBlock], ...]:
        """Allocate for every group what `get_num_blocks_to_allocate` has just counted."""
        if not self.need.charges:
            return super().allocate_new_blocks(request_id, num_tokens, *args, **kwargs)
        assert self.need.request_id == request_id, "blocks are allocated for whom they were counted"
        self.growth.set(request_id, self._outlook(request_id, num_tokens))
        arena = self.block_pool.arena
        arena.reserve(self.need.charges)
        try:
            return super().allocate_new_blocks(request_id, num_tokens, *args, **kwargs)
        finally:
            arena.release_reservation()
            self.need = self.need._replace(charges=())

    def reset_prefix_cache(self) -> bool:
        """Reset all groups or none."""
        return self.block_pool.reset_prefix_cache()


class TidepoolHybridCoordinator(ArenaCoordinator, HybridKVCacheCoordinator):
    """With prefix caching."""

    def __init__(self, *args: Any, hash_block_size: int, **kwargs: Any) -> None:
        super().__init__(*args, hash_block_size=hash_block_size, **kwargs)
        self.install_pools(hash_block_size)
        self._hit_tokens = 0
        """Up to where the last lookup found everything."""
        self._states = states = [each for each in self.single_type_managers if isinstance(each, StateManager)]
        self._copies_states = all(manager.mamba_cache_mode == "align" for manager in states)
        """Whether the state of a running request can be copied into the cache between two steps."""
        pool = self.block_pool
        self.retention = RetentionPolicy(
            checkpoint_rules(
                [manager.kv_cache_spec for manager in states],
                unit=self._cache_hit_alignment_tokens,
                spacing=self.kv_cache_config.checkpoint_tokens,
                drafter=finds_one_more(self),
                stock_block_tokens=self.kv_cache_config.stock_block_tokens,
                interval=self.retention_interval,
                host=pool.host is not None,
            ),
            pool.reuse,
            pool.arena,
            key_tokens=hash_block_size,
            state_tokens=pool.state_tokens,
        )
        pool.retention = self.retention
        if pool.first_states and self.kv_cache_config.hits_first:
            pool.waiting = Waiting()
        for manager in states:
            manager.retention = self.retention

    def cache_blocks(self, request: Request, num_computed_tokens: int) -> None:
        """As vLLM's, with the places of the request's states as those from which later prompts can continue.

        Groups with a window keep what lies before them.
        """
        self._keep_answer_state(request)
        plan = self.retention.checkpoints(request.request_id)
        places = (*plan.cuts, plan.within)
        for group, manager in enumerate(self.single_type_managers):
            manager.cache_blocks(
                request,
                self.get_num_cacheable_tokens(num_computed_tokens, group),
                retention_interval=self.retention_interval,
                replay_boundaries=places,
            )

    def _keep_answer_state(self, request: Request) -> None:
        """Keep the state of a request that answers, where the policy has it; see `RetentionPolicy.answer_state`.

        Only while a step of the request is being scheduled: vLLM 0.33 also caches when a step has ended, and by then
        the next one may be under way, which writes over the state.
        """
        if self.block_pool.serving is None or not self._copies_states:
            return
        name, tokens = request.request_id, request.num_computed_tokens
        kept = self.retention.answer_state(name, request.block_hashes, request.num_prompt_tokens, tokens)
        if kept == NO_ANSWER_STATE:
            return
        place = kept.in_place_of
        spare = [manager.spare_state(request, place) if place else None for manager in self._states]
        if None not in spare:
            for manager, block in zip(self._states, spare, strict=True):
                manager.block_pool.take_over(block)
                manager.copy_running(request, tokens, block)
        elif kept.added:
            added = [manager.block_for_copy(request, tokens) for manager in self._states]
            if None in added:
                self.block_pool.free_blocks([block for block in added if block is not None])
                return
            for manager, block in zip(self._states, added, strict=True):
                manager.copy_running(request, tokens, block)
        else:
            return
        self.retention.keeps_answer_state(name, tokens)

    def states_to_come(self, request_id: str, tokens: int) -> int:
        """One behind the state that the step leaves, and one for a state saved inside the last step."""
        return 1 + (tokens <= self.retention.checkpoints(request_id).within)

    def give_up_checkpoint(self, request_id: str, computed: int) -> bool:
        """Let a request that found no memory go on without a checkpoint that it would leave.

        Args:
            request_id: the request.
            computed: tokens that it has computed; their state may be one, in the block that the request goes on in.

        Returns:
            Whether there was one: it now needs less.
        """
        within = self.retention.checkpoints(request_id).within
        if within <= computed:
            within = 0  # It has been left.
        place = max([manager.give_up_checkpoint(request_id) for manager in self._states]) or within
        if place:
            self.retention.give_up(request_id, place)
        return place > 0

    def find_in_both_tiers(self, block_hashes: Sequence[BlockHash], tokens: int) -> tuple[tuple[list[Any], ...], int]:
        """The longest prefix of up to so many tokens that the device and the host hold together.

        With a drafter a lookup finds a block of attention more than it gives: that one is among the blocks, too, since
        without it the device's lookup would give less.

        Returns:
            (each group's blocks, of which those on the host alone are `OnHost`; tokens).
        """
        assert self.block_pool.host
        with looking(self.block_pool.host):
            found, tokens, _ = super().find_longest_cache_hit(block_hashes, tokens)
            unit = self.block_pool.pools[0].hash_block_size
            behind = range(tokens // unit, (tokens + self.retention.rules.ahead) // unit) if tokens else ()
            for manager, blocks in zip(self.single_type_managers, found, strict=True):
                if not isinstance(manager, MambaManager):
                    for index in behind:
                        key = block_hashes[index]
                        blocks += manager.block_pool.get_cached_block(key, [manager.kv_cache_group_id]) or ()
        return found, tokens

    def find_longest_cache_hit(self, *args: Any, **kwargs: Any) -> tuple[tuple[list[KVCacheBlock], ...], int, int]:
        """As vLLM's; remembers how much was found, which blocks alone don't tell."""
        found = super().find_longest_cache_hit(*args, **kwargs)
        self._hit_tokens = found[1]
        return found

    def emit_cached_block_events(self, request: Request, computed_blocks: tuple[list[KVCacheBlock], ...]) -> None:
        """Tell of what the last lookup found; vLLM would tell of states that aren't there."""
        for manager, blocks in zip(self.single_type_managers, computed_blocks, strict=True):
            manager.block_pool.tell_found(request, blocks, manager.block_size, self._hit_tokens)


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


class Lookup(NamedTuple):
    """What a request that waits has found in the cache."""

    found: tuple[KVCacheBlocks, int, int]
    attention: int
    """Up to where attention was found without a state behind it; 0 if that is nowhere."""
    released: int
    """`Arena.released` when there was no memory for it; -1 as long as it hasn't been refused."""


class TidepoolKVCacheManager(KVCacheManager):
    """vLLM's manager, with the group in every block id that goes to the workers, and room left to those who run.

    It also tells the core when requests begin and end: see `tidepool.cache.retention`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._answers = AnswerLengths()
        self._lookups: dict[str, Lookup] = {}
        """By request that waits."""

    def order_waiting(self, queue: deque[Request]) -> None:
        """Let a request that has much to lose go before the one that came first; see `Waiting.goes_before`."""
        name = self._waiting.goes_before(queue[0].request_id) if self._waiting else None
        if name is not None:
            request = next(each for each in queue if each.request_id == name)
            queue.remove(request)
            queue.appendleft(request)

    def note_waiting(self, queue: deque[Request]) -> None:
        """Requests are left waiting when a step has been scheduled."""
        waiting = self._waiting
        if waiting is None:
            return
        new = list(takewhile(lambda request: request.request_id not in waiting, reversed(queue)))
        for request in reversed(new):
            if not request.num_preemptions:
                waiting.arrives(request.request_id, request.block_hashes)

    def _waits_no_more(self, name: str) -> None:
        if self._waiting:
            self._waiting.leaves(name)

    @property
    def _waiting(self) -> Waiting | None:
        """The requests that were still waiting when a step had been scheduled, where hits go first."""
        waiting: Waiting | None = self.block_pool.waiting
        return waiting

    def get_computed_blocks(self, request: Request, *most: int | None) -> tuple[KVCacheBlocks, int, int]:
        """As vLLM's; it also plans where the request leaves checkpoints.

        vLLM names the branch point up to which attention alone is cached. From 0.33 on the scheduler also says how much
        may be found at most, which it limits for auxiliary outputs alone.
        """
        name = request.request_id
        if self.refused_before(name) or (self.host and self.host.loads_for(name)):
            return self._lookups[name].found
        blocks, tokens, branch = super().get_computed_blocks(request, *most)
        if not self.enable_caching:
            return blocks, tokens, branch
        attention = branch
        answer = min(request.max_tokens, self._answers.usual())
        branch = self._retention.plan(name, request.block_hashes, request.num_prompt_tokens, tokens, branch, answer)
        self._lookups[name] = Lookup((blocks, tokens, branch), attention, -1)
        return blocks, tokens, branch

    def estimate_cached_tokens(self, request: Request) -> int:
        """As vLLM's, without going through all blocks of attention: what is cached of those ends at the last one."""
        last: list[int] = []
        for pool, blocks in zip(self.block_pool.pools, self.get_blocks(request.request_id).blocks, strict=True):
            cached = (tokens for block in reversed(blocks) if (tokens := block.block_hash_num_tokens))
            last.append(max(cached, default=0) if pool.holds_states else next(cached, 0))
        return min(last, default=0)

    def computed_tokens(self, request: Request) -> int:
        """Tokens of a waiting request that its last lookup found."""
        lookup = self._lookups.get(request.request_id)
        return lookup.found[1] if lookup else 0

    @property
    def host(self) -> HostMemory | None:
        """The memory behind the pools, if there is any."""
        host: HostMemory | None = self.block_pool.host
        return host

    def step_end(self, request: Request, start: int, end: int, prompt_end: int) -> int:
        """Where a step of a request's prompt ends; see `RetentionPolicy.step_end`."""
        return self._retention.step_end(request.request_id, start, end, prompt_end)

    @property
    def _retention(self) -> RetentionPolicy:
        """What is kept; there is one with prefix caching only."""
        retention: RetentionPolicy = self.coordinator.retention
        return retention

    def allocate_slots(self, request: Request, *args: Any, **kwargs: Any) -> KVCacheBlocks | None:
        """As vLLM's; it files what the request leaves in the cache under its name."""
        name, pool = request.request_id, self.block_pool
        if request.status == RequestStatus.RUNNING:
            with Serving(pool, RequestContext(name)):
                return self._allocate_slots(request, *args, **kwargs)
        answer = min(request.max_tokens, max(self._answers.expected(), request.num_output_tokens))
        self.coordinator.growth.expect(name, request.num_prompt_tokens, request.num_prompt_tokens + answer)
        if self.refused_before(name):
            return None
        if self.enable_caching:
            record = self._retention.begin(name, request.block_hashes)
            context = RequestContext(name, not record.continues, record.checkpoints.last)
        else:
            context = RequestContext(name)
        with Serving(pool, context):
            slots = self._allocate_slots(request, *args, **kwargs)
        if slots is not None:
            self._waits_no_more(name)
        lookup = self._lookups.pop(name, None)
        if lookup and slots is not None:
            self._count_lookup(request, lookup)
        if lookup and slots is None and not self.coordinator.need.postponed:
            self._lookups[name] = lookup._replace(released=pool.arena.released)
        return slots

    def _allocate_slots(self, request: Request, *args: Any, **kwargs: Any) -> KVCacheBlocks | None:
        """As vLLM's `allocate_slots`; where there is no memory, tried again without a checkpoint."""
        slots = super().allocate_slots(request, *args, **kwargs)
        if slots is None and self._gives_up_checkpoint(request):
            slots = super().allocate_slots(request, *args, **kwargs)
        return slots

    def _gives_up_checkpoint(self, request: Request) -> bool:
        """Whether a request that found no memory needs less without a checkpoint, which it then doesn't leave.

        Behind host memory it waits for it: there the state lasts.
        """
        if not self.enable_caching or self.coordinator.need.postponed or self.host:
            return False
        return bool(self.coordinator.give_up_checkpoint(request.request_id, request.num_computed_tokens))

    def _count_lookup(self, request: Request, lookup: Lookup) -> None:
        """A request was admitted; one that was preempted finds what it has left itself, and doesn't count."""
        if request.num_preemptions or not request.prompt_token_ids or not self.prefix_cache_lookup_enabled(request):
            return
        name, found = request.request_id, lookup.found[1]
        loaded = self.host.loaded_for(name) if self.host else 0
        keys, prompt = request.block_hashes, request.prompt_token_ids
        self._retention.admitted(name, keys, prompt, found, lookup.attention, min(loaded, found))

    def refused_before(self, name: str) -> bool:
        """Whether a waiting request was refused memory, and no block has come free since.

        vLLM asks again in every step, and looking up a long prompt costs more than the rest of the step. The answer is
        only good for being refused again: what was found may have been evicted.
        """
        lookup = self._lookups.get(name)
        return lookup is not None and lookup.released == self.block_pool.arena.released

    def free(self, request: Request) -> None:
        """Release all blocks of a request that ends or is preempted."""
        last = self._give_up_memory(request)
        with Serving(self.block_pool, RequestContext(request.request_id, last_checkpoint=last)):
            super().free(request)
        self._leave(request)
        self._end(request, last)

    def pop_blocks_for_free(self, request: Request) -> list[KVCacheBlock]:
        """The same, where the blocks are released later."""
        self._end(request, self._give_up_memory(request))
        return super().pop_blocks_for_free(request)

    def _leave(self, request: Request) -> None:
        """A request has released its blocks: what it leaves in the cache goes to the host, too."""
        if self.host and (record := self._retention.requests.get(request.request_id)):
            self.host.leave(request.request_id, record.match.turn)

    def _give_up_memory(self, request: Request) -> int | None:
        """A request holds nothing from now on. Returns where its last state in the cache is; None if it has none."""
        self.coordinator.growth.end(request.request_id)
        return self._retention.release(request.request_id) if self.enable_caching else None

    def _end(self, request: Request, last_checkpoint: int | None) -> None:
        """Forget a request if it has finished, but for what is to be learned from it."""
        name = request.request_id
        self._lookups.pop(name, None)
        self._waits_no_more(name)
        if self.host:
            self.host.forget(name)
        if not request.is_finished():
            return
        if request.num_output_tokens:
            self._answers.ended(request.num_output_tokens)
        if self.enable_caching:
            self._retention.end(
                name, request.block_hashes, request.num_prompt_tokens, request.num_computed_tokens, last_checkpoint
            )
            if last_checkpoint and self._waiting:
                place = last_checkpoint // self.block_pool.pools[0].hash_block_size
                self._waiting.left(request.block_hashes[place - 1], place)

    def take_new_block_ids(self) -> list[int]:
        """What workers do to blocks before the next step."""
        pool: ArenaBlockPool = self.block_pool
        return pool.take_operations()

    def take_kv_cache_block_copies(self) -> tuple[list[KVCacheBlockCopy], list[KVCacheBlock]]:
        """Pending copies, and the blocks that stay referenced until they are done."""
        pool: ArenaBlockPool = self.block_pool
        pairs = [
            pair for manager in self.coordinator.single_type_managers for pair in manager.take_pending_cow_copies()
        ]
        copies = [KVCacheBlockCopy(*(pool.unique_id(block) for block in pair)) for pair in pairs]
        return copies, [block for pair in pairs for block in pair]

    def evict_blocks(self, block_ids: set[int]) -> None:
        """Refused, see `ArenaBlockPool.evict_blocks`."""
        self.block_pool.evict_blocks(block_ids)

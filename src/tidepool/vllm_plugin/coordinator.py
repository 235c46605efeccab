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

from tidepool.cache import (
    LONG_PROMPT,
    AnswerLengths,
    CheckpointRules,
    Checkpoints,
    FarPlaces,
    Growth,
    Outlook,
    PrefixMatch,
    Resumed,
    ResumePoint,
    TurnClass,
    plan_checkpoints,
)
from tidepool.vllm_plugin.planning import checkpoint_rules
from tidepool.vllm_plugin.pools import ArenaBlockPool
from tidepool.vllm_plugin.settings import overcommit_requested, poison_requested
from tidepool.vllm_plugin.states import CheckpointBooks, StateManager
from tidepool.vllm_plugin.worker import encode

GROWING_PER_SPARE_EXTENT = 8
"""Chosen by replay, see docs/prefix-caching.md."""


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
            if manager.use_eagle and not isinstance(manager, MambaManager):
                self.block_pool.ahead_tokens = max(self.block_pool.ahead_tokens, manager.block_size)
        self._overcommits = overcommit_requested()
        self.growth = Growth(
            [0 if isinstance(manager, MambaManager) else manager.block_size for manager in self.single_type_managers]
        )
        self._found_blocks: dict[str, list[int]] = {}
        """Blocks of each group that a request found cached."""
        self._expected: dict[str, tuple[int, int]] = {}
        """Of each request that was offered memory, tokens to its prompt's end, and how many it is expected to get."""
        self._no_charges = [0] * len(self.single_type_managers)
        self._charges = self._no_charges
        self.postponed = False
        """Whether the last need counted was refused for this step alone, whatever memory there is."""
        self.asked: Sequence[int] = self._no_charges
        """The last need counted, in blocks of each group."""

    def expect(self, request_id: str, prompt_end: int, tokens: int) -> None:
        """A request that waits for memory, whose prompt is ``prompt_end`` tokens, is expected to get so long."""
        self._expected[request_id] = prompt_end, tokens

    def ends(self, request_id: str) -> None:
        """A request gives up its memory."""
        self.growth.end(request_id)
        self._expected.pop(request_id, None)
        self._found_blocks.pop(request_id, None)

    def _outlook(self, request_id: str, tokens: int) -> Outlook:
        """What a request will take, and free at its end, once it has blocks for ``tokens`` tokens."""
        prompt_end, final = self._expected.get(request_id, (tokens, tokens))
        found = self._found_blocks.get(request_id) or [0] * len(self.single_type_managers)
        soon, frees = [], []
        for group, manager in enumerate(self.single_type_managers):
            if isinstance(manager, MambaManager):
                soon.append(self._states_to_come(request_id, tokens) if tokens < prompt_end else 0)
                frees.append(1)
                continue
            most = manager.max_admission_blocks_per_request
            held, needed = (-(-each // manager.block_size) for each in (tokens, max(prompt_end, tokens)))
            if most is not None:
                held, needed = min(held, most), min(needed, most)
            soon.append(needed - held)
            # What it found cached may be in use by others, too.
            frees.append(max(held - found[group], 0))
        return Outlook(tuple(soon), max(final - max(prompt_end, tokens), 0), tuple(frees))

    def _states_to_come(self, request_id: str, tokens: int) -> int:
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
        needs: list[int] = []
        touched: list[Sequence[int]] = []
        asked = [0] * len(self.single_type_managers)
        self.asked = asked
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
            asked[manager.kv_cache_group_id] = need
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
        arena = self.block_pool.arena
        self._charges, pinned = arena.extents_needed(needs, touched)
        if request_id in self.growth or not self.growth or self._overcommits:
            return sum(self._charges) + pinned
        # A waiting request leaves to those under way what they will still take, and must find what it will take itself.
        self._found_blocks[request_id] = [len(computed) for computed in new_computed_blocks]
        outlook = self._outlook(request_id, num_tokens)
        later = [self.growth.blocks, self.growth.total(outlook)]
        most = arena.extents_needed_at_most([[sum(each) for each in zip(needs, *later, strict=True)]], touched)
        if most > arena.available:
            moments = self.growth.needs(outlook)
            moments = [[need + more for need, more in zip(needs, moment, strict=True)] for moment in moments]
            most = arena.extents_needed_at_most(moments, touched)
        return max(most, sum(self._charges) + pinned + self.headroom())

    def headroom(self) -> int:
        """Extents that stay out of use when a waiting request is admitted beside running ones.

        A share of those that attention holds. Answers may get longer than expected; and what is cached there is worth
        more to later prompts than one more running request is to this one. Short chats hold little attention, so for
        them it is next to nothing.
        """
        if not self.kv_cache_config.geometry or not self.block_pool.enable_caching:
            return 0
        return sum(pool.pinned for pool in self.block_pool.growing) // GROWING_PER_SPARE_EXTENT

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any
    ) -> tuple[list[KVCacheBlock], ...]:
        """Allocate for every group what `get_num_blocks_to_allocate` last counted."""
        if self._charges is self._no_charges:
            return super().allocate_new_blocks(request_id, num_tokens, *args, **kwargs)
        self.growth.set(request_id, self._outlook(request_id, num_tokens))
        arena = self.block_pool.arena
        for manager, pool in zip(self.single_type_managers, self.block_pool.pools, strict=True):
            pool.request_blocks = manager.req_to_blocks.get(request_id, ())
        arena.reserve(self._charges)
        try:
            return super().allocate_new_blocks(request_id, num_tokens, *args, **kwargs)
        finally:
            arena.release_reservation()
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
        self._hit_tokens = 0
        """Up to where the last lookup found everything."""
        states = [manager for manager in self.single_type_managers if isinstance(manager, StateManager)]
        self.books = CheckpointBooks(
            checkpoint_rules(
                [manager.kv_cache_spec for manager in states],
                unit=self._cache_hit_alignment_tokens,
                spacing=self.kv_cache_config.checkpoint_tokens,
                drafter=bool(self.eagle_group_ids),
                stock_block_tokens=self.kv_cache_config.stock_block_tokens,
                interval=self.retention_interval,
            )
        )
        for manager in states:
            manager.books = self.books

    def cache_blocks(self, request: Request, num_computed_tokens: int) -> None:
        """As vLLM's, with the places of the request's states as those that later prompts can go on from.

        Groups with a window keep what lies before them.
        """
        plan = self.books.of.get(request.request_id, Checkpoints())
        places = (*plan.cuts, plan.within)
        for group, manager in enumerate(self.single_type_managers):
            manager.cache_blocks(
                request,
                self.get_num_cacheable_tokens(num_computed_tokens, group),
                retention_interval=self.retention_interval,
                replay_boundaries=places,
            )

    def _states_to_come(self, request_id: str, tokens: int) -> int:
        """One to go on in behind the state that the step leaves, and one for a state saved inside the last step."""
        plan = self.books.of.get(request_id)
        return 1 + (plan is not None and tokens <= plan.within)

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


class TidepoolKVCacheManager(KVCacheManager):
    """vLLM's manager, with the group in every block id that goes to the workers, and room left to those who run.

    It also tells the cache when prompts begin and end: see `tidepool.cache.reuse`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._matches: dict[str, PrefixMatch] = {}
        """Of each request that was offered memory and hasn't ended, what was known when it came."""
        self._answers = AnswerLengths()
        self._resumed: dict[str, Resumed] = {}
        """Of these requests, where they go on from earlier ones."""
        self._found: tuple[KVCacheBlocks, int, int] = (self.empty_kv_cache_blocks, 0, 0)
        """What the last lookup found."""
        self._refused: tuple[Request, int, tuple[KVCacheBlocks, int, int]] | None = None
        """The last waiting request that there was no memory for, `Arena.released` then, and what it found cached."""

    def _continues(self, request: Request) -> bool:
        """Whether a request goes on from an earlier one; looked up once, before its first blocks."""
        match = self._matches.get(request.request_id)
        if match is None:
            pool: ArenaBlockPool = self.block_pool
            match = pool.returns.began(request.block_hashes[::-1], pool.arena.bytes_allocated)
            if match.distance is not None:
                pool.partings.saw(match.distance)
            if match.place is not None:
                self._resumed[request.request_id] = pool.prompt_ends.began(match.place)
            self._matches[request.request_id] = match
            pool.arena.start(request.request_id, match.turn)
        return match.turn != TurnClass.FIRST

    def get_computed_blocks(self, request: Request) -> tuple[KVCacheBlocks, int, int]:
        """As vLLM's; it also plans where the request leaves checkpoints.

        vLLM names the place where a prompt parts from others, if no state is kept there yet. It isn't kept where a long
        prompt goes on from an earlier one: that shares the earlier one's answer as well, which looks like a place where
        prompts part; but the answer was given once, and a state there costs each turn a step and a block.
        """
        if found := self._refused_before(request):
            return found
        blocks, tokens, branch = super().get_computed_blocks(request)
        if not self.enable_caching:
            return blocks, tokens, branch
        if branch >= LONG_PROMPT and self._continues(request):
            branch = 0
        pool: ArenaBlockPool = self.block_pool
        if branch:
            branch = branch // self._rules.unit * self._rules.unit
            pool.remember_junction(request.block_hashes[branch // pool.pools[0].hash_block_size - 1])
        self._plan_checkpoints(request, tokens, branch or self._second_state(request, tokens))
        self._found = blocks, tokens, branch
        return self._found

    def _plan_checkpoints(self, request: Request, computed: int, branch: int) -> None:
        """Decide where a request leaves states, ``computed`` tokens of which are cached."""
        pool: ArenaBlockPool = self.block_pool
        books, name = self.coordinator.books, request.request_id
        self._continues(request)
        books.of[name] = plan_checkpoints(
            self._rules,
            pool.prompt_ends,
            request.num_prompt_tokens,
            computed,
            (branch,) if branch else (),
            self._resumed.get(name, Resumed.NOWHERE),
        )
        _, checkpoint = self._rules.last_places(request.num_prompt_tokens)
        books.far[name] = FarPlaces(checkpoint, pool.partings.distances[-1])

    def step_end(self, request: Request, start: int, end: int, prompt_end: int) -> int:
        """Where a step of a request's prompt ends; see `Checkpoints.step_end`."""
        plan = self.coordinator.books.of.get(request.request_id, Checkpoints())
        return plan.step_end(self._rules, start, end, prompt_end)

    @property
    def _rules(self) -> CheckpointRules:
        rules: CheckpointRules = self.coordinator.books.rules
        return rules

    def _second_state(self, request: Request, computed: int) -> int:
        """Tokens up to which a prompt should leave a second state, of which ``computed`` are cached; 0 for none."""
        pool: ArenaBlockPool = self.block_pool
        _, checkpoint = self._rules.last_places(request.num_prompt_tokens)
        distance = pool.partings.second_state(checkpoint, pool.state_tokens)
        place = checkpoint - distance
        return place if distance and place > computed and place >= LONG_PROMPT else 0

    def allocate_slots(self, request: Request, *args: Any, **kwargs: Any) -> KVCacheBlocks | None:
        """As vLLM's; it files what the request leaves in the cache under its name."""
        waits = request.status != RequestStatus.RUNNING
        if waits:
            answer = min(request.max_tokens, max(self._answers.expected(), request.num_output_tokens))
            self.coordinator.expect(request.request_id, request.num_prompt_tokens, request.num_prompt_tokens + answer)
        if not self.enable_caching:
            return super().allocate_slots(request, *args, **kwargs)
        pool: ArenaBlockPool = self.block_pool
        if waits:
            if self._refused_before(request):
                return None
            pool.finds_trunk = not self._continues(request)
            pool.state_to_come = self.coordinator.books.of[request.request_id].last
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
        reach = pool.reach
        self.coordinator.ends(request.request_id)
        super().free(request)
        pool.request = pool.reach = None
        self._end(request, reach)

    def pop_blocks_for_free(self, request: Request) -> list[KVCacheBlock]:
        """The same, where the blocks are released later."""
        self._end(request, self.block_pool.last_states.pop(request.request_id, None))
        self.coordinator.ends(request.request_id)
        return super().pop_blocks_for_free(request)

    def _end(self, request: Request, reach: int | None) -> None:
        """Forget a request if it has finished, but for where it ended.

        Args:
            request: the request.
            reach: tokens up to the last state that it left or found in the cache; None if there is none.
        """
        if self._refused and self._refused[0] is request:
            self._refused = None
        if not request.is_finished():
            return
        if request.num_output_tokens:
            self._answers.ended(request.num_output_tokens)
        if not self.enable_caching:
            return
        plan = self.coordinator.books.forget(request.request_id)
        self._resumed.pop(request.request_id, None)
        match = self._matches.pop(request.request_id, None)
        if match is None:
            return
        pool: ArenaBlockPool = self.block_pool
        pool.arena.finish(request.request_id)
        read = request.num_computed_tokens >= request.num_prompt_tokens
        if reach is None and not read:
            return
        end, checkpoint = self._rules.last_places(request.num_prompt_tokens)
        unit = pool.pools[0].hash_block_size

        def left(place: int) -> bool:
            return reach is not None and place <= reach and place in plan

        keys = {place: request.block_hashes[place // unit - 1] for place in (end, checkpoint) if place}
        # A return to one of the two is taken for one to the other: what comes back at all is what eviction asks.
        at_either = any(left(place) for place in keys)
        places = [ResumePoint(key, 0, at_either) for key in keys.values()]
        places += [
            ResumePoint(request.block_hashes[place // unit - 1], distance, left(place))
            for distance in pool.partings.distances
            if (place := checkpoint - distance) > 0
        ]
        pool.returns.ended(places, pool.arena.bytes_allocated, match)
        if end and read:
            pool.prompt_ends.ended(
                request.num_prompt_tokens, keys[end], keys.get(checkpoint), pool.arena.bytes_allocated
            )

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

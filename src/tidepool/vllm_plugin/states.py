"""The scheduler's books of states: which are kept for later prompts, and when a running one needs a new block.

vLLM keeps a state at multiples of the block size, so it ends steps there, and takes a new block at each. Here the place
of each checkpoint is decided for each prompt (`tidepool.cache.retention`), steps may end anywhere, and a running state
whose block nobody else wants stays in it: only its column in the block table moves on.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import MambaManager
from vllm.v1.request import Request

from tidepool.cache import CheckpointRules, Checkpoints, FarPlaces
from tidepool.vllm_plugin.planning import STATES_ROLE

UNUSED_SHARE = 16
"""States at far places are left while at least this part of the memory belongs to nobody."""


class CheckpointBooks:
    """What all groups of states of an engine have in common: where requests under way leave checkpoints."""

    def __init__(self, rules: CheckpointRules) -> None:
        self.rules = rules
        self.of: dict[str, Checkpoints] = {}
        """By request."""
        self.far: dict[str, FarPlaces] = {}
        """By request whose prompt takes several steps."""
        self._far_place: tuple[str, int, bool] = ("", 0, False)

    def forget(self, request_id: str) -> Checkpoints:
        """A request has ended. Returns where it was to leave checkpoints."""
        self.far.pop(request_id, None)
        return self.of.pop(request_id, Checkpoints())

    def keeps_far(self, request_id: str, place: int) -> bool:
        """Whether the state at a step's end is kept in case of a fork; all groups of states get the same answer."""
        if self._far_place[:2] != (request_id, place):
            far = self.far.get(request_id)
            self._far_place = request_id, place, far is not None and far.keeps(place)
        return self._far_place[2]


class StateManager(MambaManager):
    """vLLM's manager of states with prefix caching, by the books of `CheckpointBooks`."""

    books: CheckpointBooks

    def _stays_in_block(self, request_id: str, tokens: int) -> bool:
        """Whether the running state goes on in its block, under another column.

        Workers copy a state from its column to the next, which here is the same block; what they hold of the old
        column stays as it was, and nobody asks for it again.
        """
        if (
            self.num_speculative_blocks
            or request_id not in self._allocated_block_reqs
            or request_id in self._partial_hit_reqs
        ):
            return False
        blocks = self.req_to_blocks[request_id]
        return cdiv(tokens, self.block_size) > len(blocks) and bool(self.block_pool.is_block_writable(blocks[-1]))

    def _leaves_column(self, column: int, tokens: int) -> bool:
        """Whether a step to ``tokens`` writes its state elsewhere than to this column.

        A cached state at a place inside its column is copied before the request that left or found it writes there. One
        that goes on in a later column only reads it.
        """
        return bool(cdiv(tokens, self.block_size) - 1 > column)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        """As vLLM's, with the place of a state saved inside the step by our rules, and none for a state that stays."""
        need: int = super().get_num_blocks_to_allocate(
            request_id,
            num_tokens,
            new_computed_blocks,
            total_computed_tokens,
            num_local_computed_tokens,
            num_tokens_main_model,
            apply_admission_cap=apply_admission_cap,
            prefill_end=prefill_end,
        )
        if self.mamba_cache_mode != "align":
            return need
        saved = self._checkpoints.get(request_id)
        if saved is not None and not apply_admission_cap:
            place = self.books.rules.place_within(total_computed_tokens, num_tokens_main_model)
            self._checkpoints[request_id] = place, saved[1]
        column = None
        if request_id in self._partial_hit_reqs:
            column = self._partial_hit_reqs[request_id][0]
        elif self._has_partial_local_hit(new_computed_blocks, num_local_computed_tokens):
            column = num_local_computed_tokens // self.block_size
        if column is not None and self._leaves_column(column, num_tokens_main_model):
            return need - 1
        if need and saved is None and self._stays_in_block(request_id, num_tokens_main_model):
            return need - 1
        return need

    def _needs_internal_checkpoint(
        self, request_id: str, query_start: int, query_end: int, checkpoint_position: int, prefill_end: int
    ) -> bool:
        place = self.books.rules.place_within(query_start, query_end)
        plan = self.books.of.get(request_id, Checkpoints())
        return 0 < place == plan.within and bool(
            super()._needs_internal_checkpoint(request_id, query_start, query_end, place, prefill_end)
        )

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        """As vLLM's, but a state that stays in its block gets no other, and none is copied that is only read."""
        partial = self._partial_hit_reqs.get(request_id)
        if partial is not None and self._leaves_column(partial[0], num_tokens_main_model):
            del self._partial_hit_reqs[request_id]
        elif (
            self.mamba_cache_mode == "align"
            and request_id not in self._checkpoints
            and self._stays_in_block(request_id, num_tokens_main_model)
        ):
            blocks = self.req_to_blocks[request_id]
            before = len(blocks)
            state = blocks[-1]
            blocks[-1] = self._null_block
            blocks += [self._null_block] * (cdiv(num_tokens_main_model, self.block_size) - 1 - before)
            blocks.append(state)
            return blocks[before:]
        new: list[KVCacheBlock] = super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)
        return new

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        """Put the state that this step leaves into the prefix cache, if it is at a place where one is kept."""
        if self.mamba_cache_mode != "align":
            super().cache_blocks(request, num_tokens, retention_interval, replay_boundaries=replay_boundaries)
            return
        name = request.request_id
        # vLLM tells by this entry that a request is under way.
        self.num_cached_block[name] = num_tokens // self.block_size
        places = self.books.of.get(name)
        saved = self._checkpoints.get(name)
        if saved is not None:
            self._keep(request, *saved, spare=places is not None and saved[0] in places.spares)
        if places is None or num_tokens >= request.num_prompt_tokens or num_tokens % self.books.rules.unit:
            return
        column = cdiv(num_tokens, self.block_size) - 1
        if num_tokens in places or (self.books.rules.interval and num_tokens % self.books.rules.interval == 0):
            self._keep(request, num_tokens, column, spare=num_tokens in places.spares)
        elif self._has_room_for_far() and self.books.keeps_far(name, num_tokens):
            self._keep(request, num_tokens, column, spare=True)
        else:
            return
        if num_tokens % self.block_size:
            # The request goes on in this block: before the next step its contents are copied to one of the cache's own.
            self._partial_hit_reqs[name] = column, self.req_to_blocks[name][column]

    def _has_room_for_far(self) -> bool:
        """Whether there is memory without use: a state that hardly anybody asks for evicts nothing."""
        return bool(self.block_pool.arena.unowned * UNUSED_SHARE >= self.block_pool.memory.num_gpu_blocks)

    def _keep(self, request: Request, place: int, column: int, *, spare: bool = False) -> None:
        """Put the state at a place, which is in this column, into the prefix cache."""
        block = self.req_to_blocks[request.request_id][column]
        if block.is_null or block.block_hash_num_tokens == place:
            return
        key = self.block_pool.cache_partial_block(
            request=request,
            block=block,
            num_tokens=place,
            kv_cache_group_id=self.kv_cache_group_id,
            block_size=self.block_size,
            replace_existing_hashes=True,
        )
        if key is not None:
            # Nobody may read it before it has been computed.
            self.cached_blocks_this_step.add(key)
            if spare:
                self.block_pool.spares.add(block.block_id)


def register() -> None:
    """Let vLLM make a `StateManager` for groups of states that we planned."""
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    KVCacheSpecRegistry.register_role_manager(STATES_ROLE, StateManager)

"""The scheduler's manager of states: which are kept for later prompts, and when a running one needs a new block.

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

from tidepool.cache import Retention, RetentionPolicy


class StateManager(MambaManager):
    """vLLM's manager of states with prefix caching, by tidepool's policy of retention."""

    retention: RetentionPolicy

    def _stays_in_block(self, request_id: str, tokens: int) -> bool:
        """Whether the running state stays in its block, under another column.

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
        that continues in a later column only reads it.
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
        if self.mamba_cache_mode != "align" or need > self.block_pool.num_gpu_blocks:
            return need
        saved = self._checkpoints.get(request_id)
        if saved is not None and not apply_admission_cap:
            place = self.retention.rules.place_within(total_computed_tokens, num_tokens_main_model)
            self._checkpoints[request_id] = place, saved[1]
        column = None
        if request_id in self._partial_hit_reqs:
            column = self._partial_hit_reqs[request_id][0]
        elif self._has_partial_local_hit(new_computed_blocks, num_local_computed_tokens):
            column = num_local_computed_tokens // self.block_size
        if self._hits_packed(new_computed_blocks):
            column = len(new_computed_blocks) - 1
            if not self._leaves_column(column, num_tokens_main_model):
                return need
            partial = num_local_computed_tokens % self.block_size > 0
            return need - partial + (not self._shares_columns(request_id))
        if column is not None and self._leaves_column(column, num_tokens_main_model):
            return need - 1
        if need and saved is None and self._stays_in_block(request_id, num_tokens_main_model):
            return need - 1
        return need

    def _needs_internal_checkpoint(
        self, request_id: str, query_start: int, query_end: int, checkpoint_position: int, prefill_end: int
    ) -> bool:
        place = self.retention.rules.place_within(query_start, query_end)
        return 0 < place == self.retention.checkpoints(request_id).within and bool(
            super()._needs_internal_checkpoint(request_id, query_start, query_end, place, prefill_end)
        )

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        """As vLLM's, but a state that stays in its block gets no other, and none is copied that is only read.

        A packed one is unpacked first.
        """
        if self._hits_packed(self.req_to_blocks[request_id]) and request_id not in self._allocated_block_reqs:
            return self._continue_packed(request_id, num_tokens, num_tokens_main_model)
        partial = self._partial_hit_reqs.get(request_id)
        if partial is not None and self._leaves_column(partial[0], num_tokens_main_model):
            del self._partial_hit_reqs[request_id]
        elif partial is not None and request_id in self._allocated_block_reqs:
            self._pack_before_writing(request_id, partial[1])
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

    def _hits_packed(self, blocks: Sequence[KVCacheBlock]) -> bool:
        """Whether the last of a request's blocks, which a lookup found, is a packed state."""
        return bool(blocks) and bool(self.block_pool.is_packed(blocks[-1]))

    def _shares_columns(self, request_id: str) -> bool:
        """Whether a state that is unpacked can lie in the column where it was found and in the one that the step ends
        in, so that it stays in its block as in `_stays_in_block`."""
        return not self.num_speculative_blocks and request_id not in self._checkpoints

    def _continue_packed(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        """Allocate for a request that has found a packed state: it is unpacked into a block of the request's own."""
        blocks = self.req_to_blocks[request_id]
        column = len(blocks) - 1
        if not self._leaves_column(column, num_tokens_main_model):
            # A place inside the column: vLLM copies the state before the request writes there.
            new: list[KVCacheBlock] = super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)
            return new
        self._partial_hit_reqs.pop(request_id, None)
        (state,) = self.block_pool.get_new_blocks(1)
        self._apply_cow(request_id, column, blocks[column], state)
        if not self._shares_columns(request_id):
            return [state, *super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)]
        state.ref_cnt += 1
        blocks += [self._null_block] * (cdiv(num_tokens_main_model, self.block_size) - 2 - column)
        blocks.append(state)
        self.last_state_block_idx[request_id] = column
        self._allocated_block_reqs.add(request_id)
        return blocks[column:]

    def _pack_before_writing(self, request_id: str, state: KVCacheBlock) -> None:
        """Pack a state in the cache that a request is about to write over, so that vLLM needn't copy it as it is."""
        packed = self.block_pool.pack(state)
        if packed is not None:
            del self._partial_hit_reqs[request_id]
            self.block_pool.free_blocks([packed])

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
        saved = self._checkpoints.get(name)
        if saved is not None:
            self._keep(request, *saved, low=saved[0] in self.retention.checkpoints(name).low)
        kept = self.retention.at_step_end(name, num_tokens, request.num_prompt_tokens)
        if kept == Retention.DROP:
            return
        column = cdiv(num_tokens, self.block_size) - 1
        self._keep(request, num_tokens, column, low=kept == Retention.LOW)
        if num_tokens % self.block_size:
            # The request continues in this block: before the next step its contents are copied to one of the cache's.
            self._partial_hit_reqs[name] = column, self.req_to_blocks[name][column]

    def give_up_checkpoint(self, request_id: str) -> int:
        """Take the state that a request has left in its block out of the cache, so that it can go on there.

        Returns:
            Up to which token it is; 0 if there is none that only this request has.
        """
        blocks = self.req_to_blocks.get(request_id)
        state = blocks[-1] if blocks else self._null_block
        tokens = state.block_hash_num_tokens
        if self.num_speculative_blocks or state.is_null or state.ref_cnt > 1 or not tokens:
            return 0
        self.block_pool.evict_blocks({state.block_id})
        self._partial_hit_reqs.pop(request_id, None)
        return int(tokens)

    def spare_state(self, request: Request, place: int) -> KVCacheBlock | None:
        """The block of a state that a request has left, if nobody else wants it; None if there is none."""
        key = request.block_hashes[place // self.block_pool.hash_block_size - 1]
        found = self.block_pool.get_cached_block(key, [self.kv_cache_group_id])
        return found[0] if found and self.block_pool.is_spare(found[0]) else None

    def block_for_copy(self, request: Request, tokens: int) -> KVCacheBlock | None:
        """A block for `copy_running`; None if there is none for packed states."""
        if self.block_pool.packed is None:
            (block,) = self.block_pool.get_new_blocks(1)
            return block
        found: KVCacheBlock | None = self.block_pool.get_packed_block(self._running(request, tokens))
        return found

    def _running(self, request: Request, tokens: int) -> KVCacheBlock:
        """The block with the state that a request has now, after ``tokens`` tokens."""
        blocks = self.req_to_blocks[request.request_id]
        running = blocks[cdiv(tokens, self.block_size) - 1]
        # Where it is null, the state stayed in its block, whose column has moved on.
        return blocks[-1] if running.is_null else running

    def copy_running(self, request: Request, tokens: int, block: KVCacheBlock) -> None:
        """Keep the state that a request has now, after ``tokens`` tokens, in a block that it holds for that.

        It is copied there before the step that is being scheduled writes the next one, and then released.
        """
        running = self._running(request, tokens)
        self._insert(request, tokens, block, low=False)
        running.ref_cnt += 1
        self._pending_cow_copies.append((running, block))

    def _keep(self, request: Request, place: int, column: int, *, low: bool) -> None:
        """Put the state at a place, which is in this column, into the prefix cache."""
        block = self.req_to_blocks[request.request_id][column]
        if block.is_null or block.block_hash_num_tokens == place:
            return
        self._insert(request, place, block, low=low)

    def _insert(self, request: Request, place: int, block: KVCacheBlock, *, low: bool) -> None:
        """Put the state at a place into the prefix cache, in place of what was in its block."""
        key = self.block_pool.cache_partial_block(
            request=request,
            block=block,
            num_tokens=place,
            kv_cache_group_id=self.kv_cache_group_id,
            block_size=self.block_size,
            replace_existing_hashes=True,
        )
        # Nobody may read it before it has been computed.
        self.cached_blocks_this_step.add(key)
        if self.block_pool.memory.serving:
            self.retention.state_at(request.request_id, place)
        if low:
            self.block_pool.low.add(block.block_id)

"""KV events that say exactly what lookups can find, group by group. See docs/kv-events.md.

vLLM tells of the tokens that it went through, of which a group with states keeps few, and of blocks rather than of
hashes, of which several may have the same. Here a hash is stored when the first block of a group gets it and removed
when the last one loses it, and each comes with the tokens that end there. Nothing is done unless events are on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vllm.distributed.kv_events import BlockStored
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    BlockHashWithGroupId,
    KVCacheBlock,
    maybe_convert_block_hash,
)
from vllm.v1.request import Request

from tidepool.vllm_plugin.versions import event_details


class ExactEvents(BlockPool if TYPE_CHECKING else object):  # type: ignore[misc]
    """Mixed into a group's pool, before vLLM's."""

    event_tokens: int
    """Tokens told of for each hash: those of a block, or the last ones before a state."""
    _entered: list[int] | None = None
    """While blocks are being cached with events on: tokens up to the end of each whose hash is new to the group."""

    def cache_full_blocks(
        self,
        request: Request,
        blocks: list[KVCacheBlock],
        num_cached_blocks: int,
        num_full_blocks: int,
        block_size: int,
        kv_cache_group_id: int,
        block_mask: list[bool] | None = None,
    ) -> None:
        """As vLLM's, with events of its own."""
        arguments = (request, blocks, num_cached_blocks, num_full_blocks, block_size, kv_cache_group_id, block_mask)
        if not self.enable_kv_cache_events:
            super().cache_full_blocks(*arguments)
            return
        with self._retold(request, self.event_tokens, kv_cache_group_id):
            super().cache_full_blocks(*arguments)

    def cache_partial_block(
        self,
        request: Request,
        block: KVCacheBlock,
        num_tokens: int,
        kv_cache_group_id: int,
        block_size: int,
        replace_existing_hashes: bool = False,
    ) -> BlockHashWithGroupId | None:
        """As vLLM's, with events of its own."""
        arguments = (request, block, num_tokens, kv_cache_group_id, block_size, replace_existing_hashes)
        if not self.enable_kv_cache_events:
            return super().cache_partial_block(*arguments)
        with self._retold(request, self.hash_block_size, kv_cache_group_id):
            return super().cache_partial_block(*arguments)

    def cache_loaded(self, request: Request, loaded: Iterable[tuple[BlockHashWithGroupId, KVCacheBlock, int]]) -> None:
        """Blocks now have the contents of a request's hashes, each up to so many tokens; with events."""
        entered: list[int] = []
        self._entered = entered if self.enable_kv_cache_events else None
        for key, block, tokens in loaded:
            self._insert_block_hash(key, block, tokens)
        self._entered = None
        unit = self.event_tokens
        self._tell_stored(request, [end for end in entered if not end % unit], unit)
        self._tell_stored(request, [end for end in entered if end % unit], self.hash_block_size)

    def tell_found(self, request: Request, blocks: Iterable[KVCacheBlock], block_size: int, hit_tokens: int) -> None:
        """Tell of the blocks that a lookup found for a request, if it wants that: the last one may hold a part only."""
        ends = [(index + 1) * block_size for index, block in enumerate(blocks) if not block.is_null]
        whole = [end for end in ends if end <= hit_tokens]
        if self.event_tokens == block_size:
            self._tell_stored(request, whole, block_size)
        if ends and (ends[-1] > hit_tokens or self.event_tokens != block_size):
            self._tell_stored(request, [hit_tokens], self.hash_block_size)

    @contextmanager
    def _retold(self, request: Request, tokens: int, group: int) -> Iterator[None]:
        """Tell of what has entered the cache inside in place of what vLLM tells."""
        queue = self.kv_event_queue
        first = len(queue)
        entered: list[int] = []
        self._entered = entered
        try:
            yield
        finally:
            self._entered = None
        queue[first:] = [event for event in queue[first:] if not isinstance(event, BlockStored)]
        self._tell_stored(request, entered, tokens)

    def _tell_stored(self, request: Request, ends: Iterable[int], tokens: int) -> None:
        """Events for the blocks of so many tokens that end after these: one for each run of neighbours."""
        runs: list[list[int]] = []
        for end in ends:
            if runs and end == runs[-1][-1] + tokens:
                runs[-1].append(end)
            else:
                runs.append([end])
        for run in runs:
            start = run[0] - tokens
            self.kv_event_queue.append(
                self._build_block_stored_event(
                    request,
                    block_hashes=[maybe_convert_block_hash(self._hash_at(request, end)) for end in run],
                    parent_block_hash=maybe_convert_block_hash(self._hash_at(request, start)) if start else None,
                    start_token_idx=start,
                    end_token_idx=run[-1],
                    block_size=tokens,
                    kv_cache_group_id=self.group,
                    **event_details(self, request, run, tokens),
                )
            )

    def _hash_at(self, request: Request, tokens: int) -> BlockHash:
        """The hash of a request's first ``tokens`` tokens, whatever the block they end."""
        return request.block_hashes[tokens // self.hash_block_size - 1]

    def _insert_block_hash(
        self, block_hash_with_group_id: BlockHashWithGroupId, block: KVCacheBlock, num_tokens: int | None
    ) -> None:
        """As vLLM's; notes which hashes are new."""
        if self._entered is not None and not self.cached_block_hash_to_block.get_one_block(block_hash_with_group_id):
            assert num_tokens
            self._entered.append(num_tokens)
        super()._insert_block_hash(block_hash_with_group_id, block, num_tokens)

    def _emit_block_removed_events(self, block_hashes: list[BlockHashWithGroupId]) -> None:
        """As vLLM's, for hashes that no block of the group has any more."""
        if self.enable_kv_cache_events:
            gone = [key for key in block_hashes if not self.cached_block_hash_to_block.get_one_block(key)]
            super()._emit_block_removed_events(gone)

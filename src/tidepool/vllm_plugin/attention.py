"""The scheduler's manager of full attention: vLLM's, with quicker lookups.

Natural blocks are small: a prompt of 30,000 tokens has some two thousand. vLLM looks each up by itself; here they are
looked up by runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager


class AttentionManager(FullAttentionManager):
    """vLLM's manager of full attention, over a pool of its own."""

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Sequence[Any],
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: Any,
        kv_cache_spec: Any,
        drop_eagle_block: bool,
        alignment_tokens: int,
        **parallel: int,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """As vLLM's; one run of hashes where blocks, hashes and hits have one size and nothing is dropped."""
        tokens = kv_cache_spec.block_size
        plain = alignment_tokens == tokens == block_pool.hash_block_size and not drop_eagle_block
        plain &= max(parallel.values(), default=1) == 1
        run = block_pool.cached_run(block_hashes, max_length // tokens, kv_cache_group_ids) if plain else None
        if run is not None:
            return (run,), len(run) * tokens
        found: tuple[tuple[list[KVCacheBlock], ...], int] = super().find_longest_cache_hit(
            block_hashes,
            max_length,
            kv_cache_group_ids,
            block_pool,
            kv_cache_spec,
            drop_eagle_block,
            alignment_tokens,
            **parallel,
        )
        return found

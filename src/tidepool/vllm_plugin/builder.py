"""The class that vLLM asks, from 0.33 on, how the KV memory of an engine that tidepool serves is laid out.

vLLM's platform names it (`tidepool.vllm_plugin.wrappers.name_builder`). It is asked in the engine core, and by workers
for the small cache that CUDA graphs are measured with.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.kv_cache_config_builder import KVCacheConfigBuilder
from vllm.v1.kv_cache_interface import KVCacheGroupSpec, KVCacheSpec

from tidepool.vllm_plugin import planning
from tidepool.vllm_plugin.serving_plan import plan_of


class TidepoolBuilder(KVCacheConfigBuilder):
    """One group for each layer cache, over one arena; vLLM's ``num_blocks`` counts extents."""

    def get_kv_cache_groups(self, vllm_config: Any, kv_cache_spec: dict[str, KVCacheSpec]) -> list[KVCacheGroupSpec]:
        """See `planning.group_by_layer_cache`."""
        return planning.group_by_layer_cache(kv_cache_spec)

    def get_kv_cache_config_from_groups(
        self, vllm_config: Any, kv_cache_groups: list[KVCacheGroupSpec], num_blocks: int
    ) -> planning.TidepoolKVCacheConfig:
        """See `planning.make_kv_cache_config`."""
        plan = plan_of(vllm_config)
        assert plan is not None
        return planning.make_kv_cache_config(vllm_config, plan, kv_cache_groups, num_blocks)

    def _get_pool_bytes_per_block(self, vllm_config: Any, kv_cache_groups: list[KVCacheGroupSpec]) -> int:
        """An extent's bytes; without this vLLM would plan an arena of one extent to learn them."""
        return planning.extent_bytes(vllm_config, kv_cache_groups)

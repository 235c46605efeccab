"""Where an engine's KV memory is: the one module here that looks into block pools."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from vllm.v1.core.kv_cache_utils import get_group_id
from vllm.v1.kv_cache_interface import KVCacheSpec, MambaSpec

from tidepool.replay.job import GroupLayout
from tidepool.vllm_plugin.planning import TidepoolKVCacheConfig


class MemoryMeter:
    """Bytes by use of one engine's KV memory.

    With tidepool a look costs O(groups): its pools keep count. vLLM's own pool doesn't say which group holds a block,
    so there it costs O(blocks of the pool + running requests).
    """

    def __init__(self, scheduler: Any, kv_bytes: int, specs: Mapping[str, KVCacheSpec]) -> None:
        self._scheduler = scheduler
        self._kv_bytes = kv_bytes
        self.config = scheduler.kv_cache_config
        self.groups = layouts(self.config, specs)

    def uses(self) -> tuple[int, ...]:
        """Bytes now, in the order of `tidepool.replay.job.USES`."""
        tidepool = isinstance(self.config, TidepoolKVCacheConfig)
        in_use, cached = self._tidepool_blocks() if tidepool else self._stock_blocks()
        sums = {"state": [0, 0], "attention": [0, 0]}
        sums["packed state"] = sums["state"]
        padding = 0
        for group, *counts in zip(self.groups, in_use, cached, strict=True):
            for index, count in enumerate(counts):
                sums[group.kind][index] += count * group.natural_bytes
                padding += count * (group.block_bytes - group.natural_bytes)
        states, attention = sums["state"], sums["attention"]
        used = (states[0], attention[0], states[1], attention[1], padding)
        return (*used, self._kv_bytes - sum(used))

    @property
    def extents_moved(self) -> int | None:
        """Extents that changed hands so far, None where there are none."""
        if not isinstance(self.config, TidepoolKVCacheConfig) or self.config.geometry is None:
            return None
        return int(self._scheduler.kv_cache_manager.block_pool.arena.moves)

    def _tidepool_blocks(self) -> tuple[list[int], list[int]]:
        pools = self._scheduler.kv_cache_manager.block_pool.arena.pools
        return [pool.in_use for pool in pools], [pool.cached for pool in pools]

    def _stock_blocks(self) -> tuple[list[int], list[int]]:
        """Blocks of each group in use and cached. Groups of equal layer caches are told apart only when it matters:
        blocks in use that are no states count as the attention group's."""
        manager = self._scheduler.kv_cache_manager
        in_use, cached = [0] * len(self.groups), [0] * len(self.groups)
        rest = 0
        for block in manager.block_pool.blocks:
            if block.is_null:
                continue
            if block.ref_cnt:
                rest += 1
            elif block.block_hash is not None:
                cached[get_group_id(block.block_hash)] += 1
        for number, group in enumerate(self.groups):
            if group.kind == "state":
                tables = manager.coordinator.single_type_managers[number].req_to_blocks.values()
                in_use[number] = len({b.block_id for blocks in tables for b in blocks if not b.is_null})
                rest -= in_use[number]
        attention = [number for number, group in enumerate(self.groups) if group.kind == "attention"]
        if attention:
            in_use[attention[0]] += rest
        return in_use, cached


def layouts(config: Any, specs: Mapping[str, KVCacheSpec]) -> list[GroupLayout]:
    """The groups as planned.

    Args:
        config: the scheduler's KVCacheConfig. In vLLM's own, a group whose layers differ has the spec of one of them.
        specs: layer name to KVCacheSpec.
    """
    groups = config.kv_cache_groups
    if isinstance(config, TidepoolKVCacheConfig):
        sizes = list(zip(config.strides, config.block_bytes, strict=True))
    else:
        # One pool: every group's block is as large as the largest group's.
        pages = [[specs[name] for name in group.layer_names] for group in groups]
        block = max(sum(spec.page_size_bytes for spec in group) for group in pages)
        sizes = [(block, sum(map(_natural_bytes, group))) for group in pages]
    kinds: list[Literal["state", "attention", "packed state"]] = [
        "state" if isinstance(group.kv_cache_spec, MambaSpec) else "attention" for group in groups
    ]
    if isinstance(config, TidepoolKVCacheConfig):
        kinds += ["packed state"] * len(config.packed)
        groups = [*groups, *(groups[number] for number in config.packed)]
    return [
        GroupLayout(
            kind=kind,
            layers=len(group.layer_names),
            block_tokens=group.kv_cache_spec.block_size,
            block_bytes=block_bytes,
            natural_bytes=natural,
        )
        for kind, group, (block_bytes, natural) in zip(kinds, groups, sizes, strict=True)
    ]


def _natural_bytes(spec: Any) -> int:
    return int(replace(spec, page_size_padded=None).page_size_bytes)

"""What an engine tells others of its memory: how many tokens it holds, and how full it is.

Inside, memory is counted in extents. Routers and autoscalers know of blocks alone: they multiply ``num_gpu_blocks`` by
``block_size``, and take ``kv_cache_usage_perc`` for the share of it that is gone. See docs/metrics.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.request import Request, RequestStatus

from tidepool.vllm_plugin.coordinator import Need, TidepoolKVCacheManager
from tidepool.vllm_plugin.observing import Reporter
from tidepool.vllm_plugin.planning import TidepoolKVCacheConfig
from tidepool.vllm_plugin.startup import memory_of

NEARLY_FULL = 0.999
"""The usage told at most while no request waits for memory."""


def publish_capacity(vllm_config: Any, config: TidepoolKVCacheConfig) -> None:
    """Name as ``num_gpu_blocks`` what holds the tokens beside one request in blocks of ``cache_config.block_size``.

    For the engine core, when nothing reckons with ``num_gpu_blocks`` any more: what is told to front ends, metrics and
    routers is read from there. Where only windows grow, one request has no end: then requests of max_model_len count.
    """
    cache_config = vllm_config.cache_config
    tokens = memory_of(vllm_config, config, config.arena_bytes).tokens_with(1) or cache_config.kv_cache_size_tokens
    cache_config.num_gpu_blocks = max(1, tokens // cache_config.block_size)


@dataclass(frozen=True)
class Shortage:
    """A request that waits for memory."""

    request: Request
    blocks: Sequence[int]
    """What it asked for, in blocks of each group."""
    more: int
    """Extents that it needs beside those that so many new blocks take."""


class MeteredKVCacheManager(TidepoolKVCacheManager):
    """The manager, telling how full the memory is, as those see it who wait for it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._shortage: Shortage | None = None
        """The last request that was refused memory or preempted, until it gets some or ends."""
        self.reporter: Reporter | None = None
        """Tells others what is counted here, where vLLM's stats are on."""
        self.refusals = [0] * (self.block_pool.groups + 1)
        """Requests refused so far, by the group that was short; the last ones for what is kept for running requests.
        One that waits counts once."""

    @property
    def usage(self) -> float:
        """Share of the memory that no waiting request can have, 0 to 1; 1 if and only if one waits for it.

        In an elastic partition, extents in use and those that are kept free for running requests. In a fixed one,
        attention's blocks in use: states are set aside for as many requests as may run. Costs O(groups).
        """
        if self._shortage and self._is_short(self._shortage):
            return 1.0
        pool = self.block_pool
        if self.kv_cache_config.geometry:
            extents = pool.num_gpu_blocks - 1
            held = (extents - self._room()) / max(extents, 1)
        else:
            held = max(share.in_use / share.blocks_per_extent for share in pool.growing)
        return min(held, NEARLY_FULL)

    def allocate_slots(self, request: Request, *args: Any, **kwargs: Any) -> KVCacheBlocks | None:
        """As before; remembers who was refused."""
        if request.status == RequestStatus.RUNNING:
            return super().allocate_slots(request, *args, **kwargs)
        before = self.coordinator.need
        slots = super().allocate_slots(request, *args, **kwargs)
        need, last = self.coordinator.need, self._shortage_of(request)
        if slots is None and not need.postponed:
            # Refused as the last time: nothing was counted.
            blocks = last.blocks if last and need is before else need.blocks
            if not last and need is not before:
                self.refusals[self._short_group(need)] += 1
            self._shortage = Shortage(request, blocks, max(0, self._room() + 1 - self._extents_for(blocks)))
        elif last:
            self._shortage = None
        return slots

    def free(self, request: Request) -> None:
        """As before. A request that is preempted waits for what it held, until it is asked for what it needs."""
        if not request.is_finished():
            managers = self.coordinator.single_type_managers
            held = (manager.req_to_blocks.get(request.request_id, ()) for manager in managers)
            blocks = [sum(not block.is_null for block in blocks) for blocks in held]
            blocks += [0] * (self.block_pool.groups - len(blocks))
            self._shortage = Shortage(request, blocks, 0)
        elif self._shortage_of(request):
            self._shortage = None
        super().free(request)

    def _short_group(self, need: Need) -> int:
        """The group for which a request that was refused needs the most extents; -1 if all of them were there."""
        if need.charges and sum(need.charges) <= self.block_pool.arena.available:
            return -1
        needs = need.charges or need.blocks
        return max(range(len(needs)), key=needs.__getitem__)

    def _shortage_of(self, request: Request) -> Shortage | None:
        """What a request waits for, if it is the one that was refused last."""
        return self._shortage if self._shortage and self._shortage.request is request else None

    def _is_short(self, shortage: Shortage) -> bool:
        """Whether a request that was refused would be so now."""
        return self._extents_for(shortage.blocks) + shortage.more > self._room()

    def _room(self) -> int:
        """Extents that a waiting request may have."""
        return self.block_pool.arena.available - self.coordinator.headroom()

    def _extents_for(self, blocks: Sequence[int]) -> int:
        """Extents that new blocks of each group take from those free."""
        charges, _ = self.block_pool.arena.extents_needed(blocks, [()] * len(blocks))
        return sum(charges)

"""What the core's allocators make of a budget: the plugin's arithmetic, before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from math import lcm
from typing import Literal

from tidepool.cache import (
    CacheConfigError,
    FullAttention,
    Geometry,
    Group,
    LayerCache,
    SlidingWindow,
    State,
    choose_geometry,
    fixed_shares,
)
from tidepool.plan.memory import ElasticMemory, FixedMemory, Memory, PlannedGroup

Partition = Literal["elastic", "fixed"]


def predict(
    groups: Sequence[Group], budget_bytes: int, partition: Partition, max_num_seqs: int, max_model_len: int
) -> Memory:
    """Divide ``budget_bytes`` of KV memory on one device, as the plugin does.

    Args:
        groups: of all layers on the device.
        budget_bytes: KV memory.
        partition: ``elastic``: ``budget // E`` extents of E bytes, of which extent 0 is the null extent;
            ``fixed``: the shares of `tidepool.cache.fixed_shares`.
        max_num_seqs: requests that may run at once.
        max_model_len: tokens of the longest request.

    Raises:
        CacheConfigError: not one request of one token fits.
    """
    return predict_stages([groups], budget_bytes, partition, max_num_seqs, max_model_len)


def predict_stages(
    stages: Sequence[Sequence[Group]],
    budget_bytes: int,
    partition: Partition,
    max_num_seqs: int,
    max_model_len: int,
) -> Memory:
    """Like `predict`, over pipeline stages of ``budget_bytes`` each: the tightest stage decides.

    Blocks are counted by one scheduler for all stages, so every group has as many slots in an extent on
    each stage. They are those of the stage with which most extents fit; on the others the extent is only as
    large as its groups need. A group that has no layer on a stage takes nothing there.
    """
    if budget_bytes <= 0 or max_num_seqs <= 0 or max_model_len <= 0:
        raise CacheConfigError("Memory, max_num_seqs and the longest request must all be positive.")
    memory: Memory
    if partition == "elastic":
        memory = _elastic(stages, budget_bytes, max_num_seqs, max_model_len)
    else:
        memory = _fixed(stages, budget_bytes, max_num_seqs, max_model_len)
    if not memory.holds([(1, 1)]):
        need = sum(group.stride for group in memory.groups)
        raise CacheConfigError(
            f"{budget_bytes:,} bytes of KV memory don't hold one request: its first blocks take {need:,} "
            f"bytes, and the {partition} partition needs {_minimum(memory):,} to hand them out."
        )
    return memory


def _elastic(stages: Sequence[Sequence[Group]], budget: int, max_num_seqs: int, max_model_len: int) -> ElasticMemory:
    caches = list(dict.fromkeys(group.cache for stage in stages for group in stage))
    by_stage = [{group.cache: group for group in stage} for stage in stages]
    best: tuple[int, int, dict[LayerCache, int], int] | None = None  # extents, extent bytes, slots, stage
    for reference in by_stage:
        if len(reference) < len(caches):
            continue
        geometry = choose_geometry(list(reference.values()))
        slots: dict[LayerCache, int] = {c: cut.slots for c, cut in zip(reference, geometry.cuts, strict=True)}
        sizes = [_extent_bytes(stage, slots, geometry, stage is reference) for stage in by_stage]
        tightest = max(range(len(sizes)), key=sizes.__getitem__)
        candidate = (budget // sizes[tightest], sizes[tightest], slots, tightest)
        if best is None or candidate[0] > best[0]:
            best = candidate
    if best is None:
        raise CacheConfigError("No pipeline stage has layers of every group: use fewer stages.")
    extents, extent_bytes, slots, stage_index = best
    stage = by_stage[stage_index]
    planned = tuple(
        _planned(stage[cache], extent_bytes // slots[cache], max(0, extents - 1) * slots[cache])
        for cache in caches
        if cache in stage
    )
    return ElasticMemory(
        budget_bytes=budget,
        groups=planned,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        extent_bytes=extent_bytes,
        extents=extents,
        slots=tuple(slots[group.cache] for group in planned),
    )


def _extent_bytes(stage: dict[LayerCache, Group], slots: dict[LayerCache, int], geometry: Geometry, own: bool) -> int:
    """Bytes of an extent on a stage: its own geometry's, or the least that every group's slots tile."""
    if own:
        return geometry.extent_bytes
    need = max((slots[cache] * group.block_bytes for cache, group in stage.items()), default=1)
    step = lcm(*(slots[cache] * group.align for cache, group in stage.items()))
    return -(-need // step) * step


def _fixed(stages: Sequence[Sequence[Group]], budget: int, max_num_seqs: int, max_model_len: int) -> FixedMemory:
    plans = []
    for stage in stages:
        shares = fixed_shares(stage, budget, max_num_seqs, max_model_len)
        planned = tuple(_planned(group, share.stride, share.blocks) for group, share in zip(stage, shares, strict=True))
        plans.append(
            FixedMemory(
                budget_bytes=budget,
                groups=planned,
                max_num_seqs=max_num_seqs,
                max_model_len=max_model_len,
                null_bytes=max(share.stride for share in shares),
            )
        )
    return min(plans, key=lambda plan: [g.blocks for g in plan.groups if g.token_bytes])


def _planned(group: Group, stride: int, blocks: int) -> PlannedGroup:
    natural = len(group.layers) * group.cache.page_bytes(group.block_tokens)
    per_token = 0 if isinstance(group.cache, State) else len(group.layers) * group.cache.bytes_per_token
    return PlannedGroup(
        label=label(group.cache),
        cache=group.cache,
        layers=len(group.layers),
        block_tokens=group.block_tokens,
        token_bytes=per_token,
        natural_bytes=natural,
        page_padding=stride - natural,
        group_padding=0,
        blocks=blocks,
    )


def label(cache: LayerCache) -> str:
    """What kind of layer cache this is, in one word."""
    if isinstance(cache, FullAttention):
        return "attention"
    return "window" if isinstance(cache, SlidingWindow) else "state"


def _minimum(memory: Memory) -> int:
    if isinstance(memory, ElasticMemory):
        return (1 + memory.extents_for(memory.needs([(1, 1)]))) * memory.extent_bytes
    return sum(group.stride for group in memory.groups) + memory.overhead_bytes

"""What the core's allocators make of a budget: the plugin's arithmetic, before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tidepool.cache import (
    CacheConfigError,
    FullAttention,
    Group,
    LayerCache,
    PackedState,
    SlidingWindow,
    choose_stage_geometries,
    fixed_stage_shares,
)
from tidepool.capacity import Partition
from tidepool.capacity.memory import ElasticMemory, FixedMemory, Memory, PlannedGroup


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

    One scheduler counts blocks for all stages: see `tidepool.cache.choose_stage_geometries` and `fixed_stage_shares`.
    """
    if budget_bytes <= 0 or max_num_seqs <= 0 or max_model_len <= 0:
        raise CacheConfigError("Memory, max_num_seqs and the longest request must all be positive.")
    memory: Memory
    stages = _same_groups(stages)
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
    geometries = choose_stage_geometries(stages, [budget] * len(stages), max_model_len)
    groups, geometry = max(zip(stages, geometries, strict=True), key=lambda stage: stage[1].extent_bytes)
    extents = budget // geometry.extent_bytes
    return ElasticMemory(
        budget_bytes=budget,
        groups=tuple(
            planned_group(group, layout.stride, max(0, extents - 1) * layout.blocks_per_extent)
            for group, layout in zip(groups, geometry.layouts, strict=True)
        ),
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        extent_bytes=geometry.extent_bytes,
        extents=extents,
        blocks_per_extent=tuple(layout.blocks_per_extent for layout in geometry.layouts),
    )


def _fixed(stages: Sequence[Sequence[Group]], budget: int, max_num_seqs: int, max_model_len: int) -> FixedMemory:
    by_stage = fixed_stage_shares(stages, [budget] * len(stages), max_num_seqs, max_model_len)
    groups, shares = max(
        zip(stages, by_stage, strict=True), key=lambda stage: sum(share.blocks * share.stride for share in stage[1])
    )
    return FixedMemory(
        budget_bytes=budget,
        groups=tuple(
            planned_group(group, share.stride, share.blocks) for group, share in zip(groups, shares, strict=True)
        ),
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        null_bytes=max(share.stride for share in shares),
    )


def _same_groups(stages: Sequence[Sequence[Group]]) -> list[list[Group]]:
    """The stages' groups in one order, that in which the model's layers come; a stage may have no layer of a group."""
    examples = {group.cache: group for stage in reversed(stages) for group in stage}
    order = dict.fromkeys(group.cache for stage in stages for group in stage)
    found = [{group.cache: group for group in stage} for stage in stages]
    return [[stage.get(cache) or replace(examples[cache], layers=()) for cache in order] for stage in found]


def planned_group(group: Group, stride: int, blocks: int) -> PlannedGroup:
    """A group whose blocks lie ``stride`` bytes apart, and of which it may hold ``blocks``."""
    natural = len(group.layers) * group.cache.page_bytes(group.block_tokens)
    per_token = 0
    if isinstance(group.cache, FullAttention | SlidingWindow):
        per_token = len(group.layers) * group.cache.bytes_per_token
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
    if isinstance(cache, PackedState):
        return "packed"
    return "window" if isinstance(cache, SlidingWindow) else "state"


def _minimum(memory: Memory) -> int:
    if isinstance(memory, ElasticMemory):
        return (1 + memory.extents_for(memory.needs([(1, 1)]))) * memory.extent_bytes
    return sum(group.stride for group in memory.groups) + memory.overhead_bytes

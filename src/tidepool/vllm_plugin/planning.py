"""Seam 1, in the engine core: how the KV memory of an engine that tidepool serves is laid out.

In an elastic partition ``KVCacheConfig.num_blocks`` counts *extents*: vLLM's memory check, its override and its minimum
over ranks then work unchanged with the extent as the block that they divide memory by. In a fixed one it is the number
of block ids that every group has, since vLLM warms kernels up with made-up requests, whose ids are any below it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import lcm
from typing import Any

from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    KVCacheTensor,
    MambaSpec,
    SlidingWindowSpec,
)

from tidepool.cache import (
    Arena,
    CacheConfigError,
    CheckpointRules,
    ExpectedReturn,
    ExtentLayout,
    FullAttention,
    Geometry,
    Group,
    LeastRecentlyUsed,
    Marconi,
    Policy,
    PrefixSizes,
    ReuseModel,
    Share,
    SlidingWindow,
    State,
    StateFormat,
    block_align,
    choose_geometry,
    fixed_shares,
    geometry_by_counts,
    packed_groups,
    seglen,
    tail_optimized,
)
from tidepool.capacity import Partition
from tidepool.vllm_plugin.serving_plan import CHECKPOINT_TOKENS, ServingPlan, note_plan, plan_of
from tidepool.vllm_plugin.settings import Eviction
from tidepool.vllm_plugin.state_parts import state_parts
from tidepool.vllm_plugin.versions import planner_of_vllm

PROFILING_EXTENTS = 64
"""Extents at most in the KV cache that vLLM makes to measure CUDA graphs with, and throws away again: one for each
request of a captured step, it thinks, which would take gigabytes."""
STATES_ROLE = "tidepool-states"
"""The role by which vLLM finds the manager of a group of states, `tidepool.vllm_plugin.states.StateManager`."""
ATTENTION_ROLE = "tidepool-attention"
"""The same of full attention, `tidepool.vllm_plugin.attention.AttentionManager`."""


@dataclass
class TidepoolKVCacheConfig(KVCacheConfig):
    """A KVCacheConfig whose groups have pools of their own over one arena.

    ``num_blocks`` counts extents, or in a fixed partition the block ids that every group has.
    """

    partition: Partition = "elastic"
    eviction: Eviction = "returns"
    hits_first: bool = False
    """Of the requests that wait, those with much in the cache go first."""
    checkpoint_tokens: int = CHECKPOINT_TOKENS
    """From one checkpoint to the next, with prefix caching."""
    stock_block_tokens: int = 0
    """Tokens of a block as vLLM alone would have it: with prefix caching it cuts longer prompts."""
    geometry: Geometry | None = None
    """Of the elastic partition."""
    shares: tuple[Share, ...] = ()
    """Of the fixed partition."""
    arena_bytes: int = 0
    block_bytes: tuple[int, ...] = field(default=())
    """Bytes of one block of each group, without padding. As in all that goes by group here, those of packed states
    come behind vLLM's."""
    packed: tuple[int, ...] = ()
    """The groups of states whose cached states are packed, in the order of the groups that hold those."""
    checkpoint_states: StateFormat = "same"
    """Their format."""
    host_geometry: Geometry | None = None
    """How host memory behind the pools is divided; None where there is none."""
    host_extents: int = 0
    """Extents of the host's memory, on each rank; 0 without any."""

    @property
    def strides(self) -> tuple[int, ...]:
        """Bytes from one block of each group to the next."""
        parts: Sequence[ExtentLayout | Share] = self.geometry.layouts if self.geometry else self.shares
        return tuple(part.stride for part in parts)

    @property
    def pool_blocks(self) -> tuple[int, ...]:
        """For each group, how many block ids its pool has, the null block included."""
        if self.geometry:
            return tuple(self.num_blocks * layout.blocks_per_extent for layout in self.geometry.layouts)
        return tuple(share.first + share.blocks for share in self.shares)

    @property
    def packed_numbers(self) -> dict[int, int]:
        """By group of states, the group of the arena that has its packed ones: behind vLLM's groups, in their order."""
        return {group: number for number, group in enumerate(self.packed, len(self.kv_cache_groups))}

    @property
    def state_groups(self) -> tuple[int, ...]:
        """The groups whose blocks are states, packed ones behind the others."""
        specs = enumerate(group.kv_cache_spec for group in self.kv_cache_groups)
        return (*(group for group, spec in specs if isinstance(spec, MambaSpec)), *self.packed_numbers.values())

    @property
    def state_bytes(self) -> int:
        """Bytes of one cached state in each group of states."""
        packed = self.packed_numbers
        running = self.state_groups[: len(self.state_groups) - len(packed)]
        return sum(self.strides[packed.get(group, group)] for group in running)

    @property
    def token_bytes(self) -> float:
        """Bytes of the attention of one token."""
        specs = [group.kv_cache_spec for group in self.kv_cache_groups]
        return sum(
            stride / spec.block_size
            for stride, spec in zip(self.strides, specs, strict=False)
            if not isinstance(spec, MambaSpec)
        )

    def num_blocks_of(self, tensor: KVCacheTensor) -> int:
        """Blocks that the strided view of ``tensor``'s group has."""
        group = next(i for i, g in enumerate(self.kv_cache_groups) if tensor.layers[0] in g.layer_names)
        return self.pool_blocks[group]

    def make_policy(self, reuse: ReuseModel) -> Policy:
        """The eviction policy that this configuration names."""
        sizes = PrefixSizes(self.token_bytes, self.state_bytes)
        match self.eviction:
            case "returns":
                return ExpectedReturn(reuse)
            case "marconi":
                return Marconi(sizes, reuse)
            case "seglen":
                return seglen(sizes)
            case "t-lru":
                return tail_optimized(sizes)
            case "lru" | "lru-states":
                return LeastRecentlyUsed(low_together=self.eviction == "lru")

    def make_arena(self, **callbacks: Any) -> Arena:
        """The arena that this configuration describes; policy and callbacks as in `Arena`."""
        if self.geometry:
            return Arena.elastic(self.geometry, self.num_blocks, state_groups=self.state_groups, **callbacks)
        for moving in ("on_move", "on_relocate", "relocatable"):
            callbacks.pop(moving, None)
        return Arena.fixed(self.shares, self.arena_bytes, state_groups=self.state_groups, **callbacks)


# Groups -------------------------------------------------------------------------------------------------------


def group_by_layer_cache(specs: Mapping[str, KVCacheSpec]) -> list[KVCacheGroupSpec]:
    """One group for each layer cache, none padded or split, in the order in which each first appears."""
    layers: dict[KVCacheSpec, list[str]] = {}
    for name, spec in specs.items():
        layers.setdefault(spec, []).append(name)
    return [KVCacheGroupSpec(names, type(spec).merge([spec] * len(names))) for spec, names in layers.items()]


def core_groups(vllm_config: Any, groups: Sequence[KVCacheGroupSpec]) -> list[Group]:
    """vLLM's groups in the core's terms."""
    return [_core_group(vllm_config, group) for group in groups]


def arena_groups(vllm_config: Any, groups: Sequence[KVCacheGroupSpec]) -> list[Group]:
    """The groups of the arena: vLLM's, and behind them those of packed states."""
    core = core_groups(vllm_config, groups)
    return [*core, *packed_groups(core)]


def _core_group(vllm_config: Any, group: KVCacheGroupSpec) -> Group:
    spec, names = group.kv_cache_spec, tuple(group.layer_names)
    if isinstance(spec, MambaSpec):
        copies = spec.max_memory_usage_bytes(vllm_config) // spec.page_size_bytes
        state = State(spec.page_size_bytes, copies, _packed_bytes(vllm_config, spec))
        return Group(state, names, spec.block_size, block_align(spec.page_size_bytes))
    assert isinstance(spec, AttentionSpec)
    per_token = replace(spec, page_size_padded=None).copy_with_new_block_size(1).page_size_bytes
    cache: FullAttention | SlidingWindow = FullAttention(per_token)
    if isinstance(spec, SlidingWindowSpec):
        # What is computed in a step is held beside the window until the step has ended.
        cache = SlidingWindow(per_token, spec.sliding_window, vllm_config.max_in_flight_tokens)
    align = block_align(spec.page_size_bytes)
    plan = plan_of(vllm_config)
    if plan and plan.setup and "FLASHINFER" in plan.setup.attention:
        # Its XQA kernels count the distance of blocks in heads, and round it down.
        align = lcm(align, spec.head_size * spec.dtype.itemsize)
    return Group(cache, names, spec.block_size, align, page_bytes=spec.page_size_bytes)


def _packed_bytes(vllm_config: Any, spec: MambaSpec) -> int:
    """Bytes of a cached state of one layer, if it is packed; else 0."""
    plan = plan_of(vllm_config)
    if not plan or spec.mamba_cache_mode != "align":
        return 0
    return state_parts(spec).packed_page_bytes(plan.checkpoint_states)


def checkpoint_rules(
    states: Sequence[MambaSpec],
    *,
    unit: int,
    spacing: int,
    drafter: bool,
    stock_block_tokens: int = 0,
    interval: int | None = 0,
    host: bool = False,
) -> CheckpointRules:
    """What decides where an engine's prompts can leave checkpoints: the same for scheduler and workers.

    Args:
        states: the specs of its groups of states.
        unit: a hit ends at a multiple of so many tokens.
        spacing: tokens from one checkpoint to the next.
        drafter: whether drafts come from a head that reads the model's hidden states, so that lookups find one unit
            more than they give.
        stock_block_tokens: the block that vLLM alone would have; only the scheduler asks for it, as for
        interval: the user's retention interval in tokens; None for the ends of all steps.
        host: whether there is host memory behind the pools.
    """
    within = 0
    if all(spec.num_prefill_checkpoint_blocks and spec.prefill_checkpoint_alignment for spec in states):
        within = lcm(*(spec.prefill_checkpoint_alignment for spec in states))
    return CheckpointRules(
        unit=unit,
        spacing=-(-spacing // unit) * unit,
        ahead=unit if drafter else 0,
        within=within,
        column=max(spec.block_size for spec in states),
        stock_block=stock_block_tokens,
        interval=unit if interval is None else interval,
        # It isn't known which drafts will have been accepted when a step's state could be copied.
        answers=not drafter and not any(spec.num_speculative_blocks for spec in states),
        stored=host,
    )


# The layout ---------------------------------------------------------------------------------------------------


def make_kv_cache_config(
    vllm_config: Any, plan: ServingPlan, groups: list[KVCacheGroupSpec], extents: int
) -> TidepoolKVCacheConfig:
    """Plan the arena and its views for so many extents of KV memory.

    Args:
        vllm_config: vLLM's configuration of the engine.
        plan: the engine's. Without ``memory_bytes`` this is for CUDA graphs to be measured with, and thrown away again.
        groups: one for each layer cache.
        extents: as vLLM divides the memory. A fixed partition takes what is beyond the last whole one as well.

    Raises:
        CacheConfigError: no geometry fits these sizes, a fixed partition doesn't fit this memory, or blocks are larger
            than the kernels take.
    """
    cache_config = vllm_config.cache_config
    _require_whole_pages(cache_config, groups)
    _name_managers(groups)
    core = arena_groups(vllm_config, groups)
    geometry = _geometry(plan, core)
    if plan.memory_bytes is None:
        extents = min(extents, PROFILING_EXTENTS)
    num_blocks, arena_bytes = extents, extents * geometry.extent_bytes
    shares: tuple[Share, ...] = ()
    if plan.partition == "fixed" and plan.memory_bytes is not None:
        # It isn't cut into extents, so it needn't end with a whole one.
        available = plan.memory_bytes if cache_config.num_gpu_blocks_override is None else arena_bytes
        shares, arena_bytes = _fixed_partition(vllm_config, plan, core, available)
        num_blocks = min(share.first + share.blocks for share in shares)
    host_extents = 0 if plan.memory_bytes is None else host_bytes_of_rank(vllm_config) // geometry.extent_bytes
    return TidepoolKVCacheConfig(
        num_blocks=num_blocks,
        kv_cache_tensors=_tensors(groups, core, shares or geometry.layouts, arena_bytes),
        kv_cache_groups=groups,
        prefix_cache_retention_interval=cache_config.prefix_cache_retention_interval,
        partition=plan.partition,
        eviction=plan.eviction,
        hits_first=plan.hits_first,
        checkpoint_tokens=plan.checkpoint_tokens,
        stock_block_tokens=plan.stock.block_tokens if plan.stock else 0,
        geometry=None if shares else geometry,
        shares=shares,
        arena_bytes=arena_bytes,
        block_bytes=tuple(member.block_bytes for member in core),
        packed=tuple(
            number for number, each in enumerate(core) if isinstance(each.cache, State) and each.cache.packed_bytes
        ),
        checkpoint_states=plan.checkpoint_states,
        host_geometry=geometry if host_extents else None,
        host_extents=host_extents,
    )


def host_bytes_of_rank(vllm_config: Any) -> int:
    """Bytes of host memory behind the pools of one rank: an equal part of what all have together."""
    size = vllm_config.cache_config.kv_offloading_size
    if size is None or not vllm_config.cache_config.enable_prefix_caching:
        return 0
    return int(size * (1 << 30)) // int(vllm_config.parallel_config.world_size)


def own_connector(vllm_config: Any) -> None:
    """Let the scheduler free blocks at once, although it has a connector: a load into them is ordered behind the steps
    that may still write to them (`tidepool.vllm_plugin.host_copies`)."""
    if vllm_config.kv_transfer_config is not None:
        vllm_config.kv_transfer_config.kv_role = "kv_producer"


def _require_whole_pages(cache_config: Any, groups: Sequence[KVCacheGroupSpec]) -> None:
    """A page lies in one piece, and kernels take it as one block.

    Raises:
        CacheConfigError: the layout or the attention block doesn't allow it.
    """
    layout = cache_config.get_resolved_kv_cache_layout()
    if not layout.is_block_compact:
        raise CacheConfigError(
            f"The KV cache layout {layout.name} spreads a page over the memory; set VLLM_KV_CACHE_LAYOUT=BLHNC, or "
            "TIDEPOOL=off."
        )
    for spec in (group.kv_cache_spec for group in groups):
        if isinstance(spec, AttentionSpec) and spec.get_block_stride_alignment() > 1:
            # vLLM would split such a block for its kernels, which only works where blocks are dense pages of one layer.
            raise CacheConfigError(
                f"An attention block of {spec.block_size} tokens is more than the attention kernels take at once: "
                "change block_tokens (or --block-size)."
            )


def _name_managers(groups: Sequence[KVCacheGroupSpec]) -> None:
    """Give groups of states their manager. Here and not where layers are grouped: vLLM makes the groups anew for each
    rank, without their roles."""
    for group in groups:
        if isinstance(group.kv_cache_spec, MambaSpec):
            group.role = STATES_ROLE
        elif type(group.kv_cache_spec) is FullAttentionSpec:
            group.role = ATTENTION_ROLE


def _fixed_partition(
    vllm_config: Any, plan: ServingPlan, core: Sequence[Group], available_bytes: int
) -> tuple[tuple[Share, ...], int]:
    """Each group's share, and the bytes of all: those that the ranks have agreed on, or what this memory holds.

    Raises:
        CacheConfigError: the memory is too small.
    """
    longest = vllm_config.model_config.max_model_len
    if plan.places:
        shares = tuple(
            Share(group.block_bytes, -(-group.block_bytes // group.align) * group.align, *place)
            for group, place in zip(core, plan.places, strict=True)
        )
        available_bytes = max((share.first + share.blocks) * share.stride for share in shares)
    else:
        shares = fixed_shares(core, available_bytes, vllm_config.scheduler_config.max_num_seqs, longest)
    _require_room_for_one(core, shares, longest)
    return shares, available_bytes


def _tensors(
    groups: Sequence[KVCacheGroupSpec],
    core: Sequence[Group],
    layouts: Sequence[ExtentLayout | Share],
    arena_bytes: int,
) -> list[KVCacheTensor]:
    """One strided view of the arena for each group that has layers on this rank."""
    return [
        KVCacheTensor(
            size=arena_bytes,
            layers=list(group.layer_names),
            layer_stride=member.page_bytes,
            block_stride=layout.stride,
        )
        for group, member, layout in zip(groups, core, layouts, strict=False)
        if group.layer_names
    ]


def _require_room_for_one(groups: Sequence[Group], shares: Sequence[Share], tokens: int) -> None:
    """A request that no share holds would wait for good, and all others behind it.

    Raises:
        CacheConfigError: a share is too small for one request of ``tokens`` tokens.
    """
    for group, share in zip(groups, shares, strict=True):
        needed = group.blocks_for(tokens)
        if group.layers and share.blocks < needed:
            raise CacheConfigError(
                f"The fixed partition leaves {share.blocks:,} blocks to {group.layers[0]!r} and its like, and one "
                f"request of max_model_len ({tokens:,} tokens) needs {needed:,}: give it more memory, lower "
                "max_num_seqs or max_model_len, or use the elastic partition."
            )


# In vLLM's terms ----------------------------------------------------------------------------------------------


def extent_bytes(vllm_config: Any, groups: Sequence[KVCacheGroupSpec]) -> int:
    """Bytes of an extent."""
    return _geometry(plan_of(vllm_config), arena_groups(vllm_config, groups)).extent_bytes


def extents_of_longest_request(vllm_config: Any, groups: Sequence[KVCacheGroupSpec]) -> int:
    """Extents that one request of max_model_len tokens needs."""
    core = arena_groups(vllm_config, groups)
    longest = vllm_config.model_config.max_model_len
    return _geometry(plan_of(vllm_config), core).extents_for([group.blocks_for(longest) for group in core])


def _geometry(plan: ServingPlan | None, core: Sequence[Group]) -> Geometry:
    """How this rank's extents are divided."""
    if plan and plan.blocks_per_extent:
        return geometry_by_counts(core, plan.blocks_per_extent)
    return choose_geometry(core)


def requests_with_states(config: TidepoolKVCacheConfig) -> int:
    """Requests whose states fit in the memory: one state each, and one for each draft token."""
    return min(
        (blocks - 1) // (1 + group.kv_cache_spec.num_speculative_blocks)
        for blocks, group in zip(config.pool_blocks, config.kv_cache_groups, strict=False)
        if isinstance(group.kv_cache_spec, MambaSpec)
    )


def max_concurrency(vllm_config: Any, config: TidepoolKVCacheConfig) -> float:
    """How many requests of max_model_len tokens fit at once."""
    core = arena_groups(vllm_config, config.kv_cache_groups)
    needs = [group.blocks_for(vllm_config.model_config.max_model_len) for group in core]
    if config.geometry:
        # Requests share extents, so this counts in fractions of them.
        each = sum(need / layout.blocks_per_extent for need, layout in zip(needs, config.geometry.layouts, strict=True))
        return (config.num_blocks - 1) / each
    return min(share.blocks / need for share, need in zip(config.shares, needs, strict=True))


# For comparison -----------------------------------------------------------------------------------------------


def stock_kv_cache_config(
    vllm_config: Any, plan: ServingPlan, specs: Mapping[str, KVCacheSpec], memory_bytes: int
) -> KVCacheConfig:
    """What vLLM alone would have planned on the same bytes, by its own functions.

    Raises:
        ValueError: vLLM can't serve this model with pages of one size.
        NotImplementedError: the same.
    """
    stock = plan.stock
    assert stock, "the engine core's plan comes from a rank with attention"
    stock_config = copy.copy(vllm_config)
    stock_config.cache_config = copy.copy(vllm_config.cache_config)
    stock_config.cache_config.block_size = stock.block_tokens
    stock_config.cache_config.num_gpu_blocks_override = None
    note_plan(stock_config, None)
    aligned = vllm_config.cache_config.mamba_cache_mode == "align"
    stock_specs: dict[str, KVCacheSpec] = {
        name: replace(
            spec,
            block_size=stock.block_tokens if aligned else spec.block_size,
            page_size_padded=stock.state_page_bytes,
        )
        if isinstance(spec, MambaSpec)
        else replace(spec, block_size=stock.block_tokens)
        for name, spec in specs.items()
    }
    # Where these are patched, they go vLLM's way for a configuration without a plan.
    vllm = planner_of_vllm()
    groups = vllm.get_kv_cache_groups(stock_config, stock_specs)
    return vllm.get_kv_cache_config_from_groups(stock_config, groups, memory_bytes)

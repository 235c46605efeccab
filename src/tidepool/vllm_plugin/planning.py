"""Seam 1: how vLLM plans the KV cache.

vLLM inflates the attention block of a hybrid model until all pages are equally large, in each worker, right after the
model is loaded. There tidepool decides whether it serves the engine; if so it leaves the pages natural and notes a
`ServingPlan` in the configuration. Later steps look for that plan and go vLLM's way without it.

A served engine's ``KVCacheConfig.num_blocks`` counts *extents*: vLLM's memory check, its override and its minimum over
ranks then work unchanged with the extent as the block that they divide memory by.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import lcm
from typing import Any, NamedTuple

from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
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
    ExtentLayout,
    FullAttention,
    Geometry,
    Group,
    Share,
    SlidingWindow,
    State,
    block_align,
    choose_geometry,
    choose_stage_geometries,
    fixed_shares,
    fixed_stage_shares,
    geometry_by_counts,
    spacing_within,
)
from tidepool.vllm_plugin.asked import asked_of
from tidepool.vllm_plugin.gates import closed_gates, unservable_backends, unservable_specs
from tidepool.vllm_plugin.notes import read_note, write_note
from tidepool.vllm_plugin.settings import Eviction, Partition, Settings, read_settings

logger = init_logger("vllm.tidepool")

CHECKPOINT_TOKENS = 512
"""From one checkpoint that different prompts may share to the next; it costs no padding. Chosen by replay
(docs/prefix-caching.md): few enough for shared system prompts."""
COLUMN_TOKENS = 128
"""What a column of the states' block table stands for at most: vLLM's block size of states. Layers that save a state
inside a step can do so from two columns on; and a running state moves to the next column at each multiple."""
PROFILING_EXTENTS = 64
"""Extents at most in the KV cache that vLLM makes to measure CUDA graphs with, and throws away again: one for each
request of a captured step, it thinks, which would take gigabytes."""
STATES_ROLE = "tidepool-states"
"""The role by which vLLM finds the manager of a group of states, `tidepool.vllm_plugin.states.StateManager`."""
_PLAN = "plan"
_ASIDE = "stepped aside"
_PLAN_OF_SPEC = "tidepool_plan"


class StockBlocks(NamedTuple):
    """What vLLM alone would have set for this model."""

    block_tokens: int
    state_page_bytes: int | None
    """The padded page of one state layer; None if it needs no padding."""


class ServingPlan(NamedTuple):
    """tidepool serves this engine, and how."""

    partition: Partition
    eviction: Eviction
    stock: StockBlocks | None
    """None on a pipeline stage without attention, which vLLM doesn't inflate."""
    checkpoint_tokens: int = CHECKPOINT_TOKENS
    """From one checkpoint to the next, with prefix caching."""
    blocks_per_extent: tuple[int, ...] = ()
    """Blocks of each group in an extent, where several pipeline stages share them."""
    places: tuple[tuple[int, int], ...] = ()
    """(first block, blocks) of each group's fixed share, where several ranks share them."""


@dataclass(frozen=True)
class RankView:
    """What one rank knows about an engine before anyone has decided on it."""

    settings: Settings
    specs: Mapping[str, KVCacheSpec]
    """Of the layers that this rank has; none where it is switched off."""
    kernel_tokens: int
    """The fewest tokens of an attention block that its kernels take; 1 without attention."""
    backends: tuple[str, ...] = ()
    """Names of its attention backends' classes."""


@dataclass
class TidepoolKVCacheConfig(KVCacheConfig):
    """A KVCacheConfig whose groups have pools of their own over one arena; ``num_blocks`` counts extents."""

    partition: Partition = "elastic"
    eviction: Eviction = "returns"
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
    """Bytes of one block of each group, without padding."""

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

    def num_blocks_of(self, tensor: KVCacheTensor) -> int:
        """Blocks that the strided view of ``tensor``'s group has."""
        group = next(i for i, g in enumerate(self.kv_cache_groups) if tensor.layers[0] in g.layer_names)
        return self.pool_blocks[group]

    def make_arena(self, **callbacks: Any) -> Arena:
        """The arena that this configuration describes; policy and callbacks as in `Arena`."""
        if self.geometry:
            return Arena.elastic(self.geometry, self.num_blocks, **callbacks)
        callbacks.pop("on_move", None)
        return Arena.fixed(self.shares, self.arena_bytes, **callbacks)


def plan_of(vllm_config: Any) -> ServingPlan | None:
    """The plan of an engine that tidepool serves, else None."""
    plan: ServingPlan | None = read_note(vllm_config, _PLAN)
    return plan


def step_aside(vllm_config: Any, settings: Settings, closed: str | None) -> None:
    """Leave an engine to vLLM, and say so once.

    Args:
        vllm_config: vLLM's configuration of the engine; `stepped_aside` tells the reason from now on.
        settings: they may have switched tidepool off, which needs no other reason.
        closed: why it isn't served, as ``name: reason``.
    """
    if not settings.enabled:
        closed = "off: TIDEPOOL or additional_config says so"
        logger.info_once("tidepool is switched off: vLLM's own KV cache is used.", scope="global")
    else:
        logger.warning_once("tidepool steps aside, vLLM's own KV cache is used. %s.", closed, scope="global")
    write_note(vllm_config, _ASIDE, closed)


def stepped_aside(vllm_config: Any) -> str | None:
    """Why the worker of this configuration left its engine to vLLM, as ``name: reason``; None if it didn't."""
    reason: str | None = read_note(vllm_config, _ASIDE)
    return reason


def send_plan(vllm_config: Any, specs: Mapping[str, KVCacheSpec]) -> None:
    """In a worker: let the plan travel to the engine core, which may be another process, with the layers' specs."""
    plan = plan_of(vllm_config)
    if plan is not None:
        for spec in specs.values():
            object.__setattr__(spec, _PLAN_OF_SPEC, plan)


def has_plan(specs: Iterable[KVCacheSpec]) -> bool:
    """Whether a plan came with the specs: tidepool serves their engine."""
    return any(getattr(spec, _PLAN_OF_SPEC, None) for spec in specs)


def receive_plan(vllm_config: Any, specs: Mapping[str, KVCacheSpec]) -> ServingPlan | None:
    """In the engine core: take over the plan that came with the specs. Returns `plan_of`."""
    plans = [plan for spec in specs.values() if (plan := getattr(spec, _PLAN_OF_SPEC, None))]
    plan = next((plan for plan in plans if plan.stock), None)
    if plan is not None and plan_of(vllm_config) is None:
        write_note(vllm_config, _PLAN, plan)
        if vllm_config.cache_config.mamba_cache_mode == "align":
            spacing = next(spec.block_size for spec in specs.values() if isinstance(spec, MambaSpec))
            vllm_config.cache_config.mamba_block_size = spacing
    return plan_of(vllm_config)


def agree(
    vllm_config: Any, specs_of_ranks: Sequence[Mapping[str, KVCacheSpec]], memory_of_ranks: Sequence[int]
) -> None:
    """In the engine core: settle what all ranks' memory must have in common, before each is planned by itself.

    One scheduler hands out blocks for all ranks, so a block id must name the same extent and slot on each.

    Args:
        vllm_config: vLLM's configuration of the engine; its plan is completed.
        specs_of_ranks: layer name to KVCacheSpec, for each rank.
        memory_of_ranks: bytes of KV memory of each rank.

    Raises:
        CacheConfigError: tidepool serves only some ranks, or there is no plan that suits all.
    """
    plans = {
        rank: getattr(next(iter(specs.values())), _PLAN_OF_SPEC, None)
        for rank, specs in enumerate(specs_of_ranks)
        if specs
    }
    views = {plan and (plan.partition, plan.eviction) for plan in plans.values()}
    if len(views) > 1:
        raise CacheConfigError(
            "The ranks don't agree on whose memory this engine uses ("
            + "; ".join(f"rank {rank}: {plan.partition if plan else 'vLLM'}" for rank, plan in plans.items())
            + "): install the same tidepool and set the same TIDEPOOL on every node, or set TIDEPOOL=off on all."
        )
    specs = {name: spec for each in specs_of_ranks for name, spec in each.items()}
    plan = receive_plan(vllm_config, specs)
    if plan is None or len(specs_of_ranks) == 1:
        return
    groups = group_by_layer_cache(specs)
    budgets: dict[tuple[str, ...], int] = {}
    for each, memory in zip(specs_of_ranks, memory_of_ranks, strict=True):
        budgets[tuple(each)] = min(memory, budgets.get(tuple(each), memory))
    stages = [core_groups(vllm_config, _groups_on(groups, names)) for names in budgets]
    longest = vllm_config.model_config.max_model_len
    geometries = choose_stage_geometries(stages, list(budgets.values()), longest)
    if len(stages) > 1:
        plan = plan._replace(blocks_per_extent=tuple(layout.blocks_per_extent for layout in geometries[0].layouts))
    if plan.partition == "fixed":
        override = vllm_config.cache_config.num_gpu_blocks_override
        arenas = [
            memory if override is None else override * geometry.extent_bytes
            for memory, geometry in zip(budgets.values(), geometries, strict=True)
        ]
        shares = fixed_stage_shares(stages, arenas, vllm_config.scheduler_config.max_num_seqs, longest)[0]
        plan = plan._replace(places=tuple((share.first, share.blocks) for share in shares))
    write_note(vllm_config, _PLAN, plan)


def over_stages(config: TidepoolKVCacheConfig, configs: Sequence[TidepoolKVCacheConfig]) -> None:
    """Let the scheduler's configuration, a copy of one rank's, stand for all pipeline stages: bytes are sums over them.

    Block ids are the same on every stage, so nothing but the accounts of bytes changes.
    """
    stages = list({tuple(tuple(g.layer_names) for g in each.kv_cache_groups): each for each in configs}.values())
    if len(stages) == 1:
        return
    config.arena_bytes = sum(stage.arena_bytes for stage in stages)
    config.block_bytes = tuple(map(sum, zip(*(stage.block_bytes for stage in stages), strict=True)))
    strides = tuple(map(sum, zip(*(stage.strides for stage in stages), strict=True)))
    if config.geometry:
        layouts = zip(config.block_bytes, strides, config.geometry.layouts, strict=True)
        config.geometry = Geometry(
            sum(stage.geometry.extent_bytes for stage in stages if stage.geometry),
            tuple(
                ExtentLayout(block_bytes, stride, layout.blocks_per_extent) for block_bytes, stride, layout in layouts
            ),
        )
    config.shares = tuple(
        Share(block_bytes, stride, share.first, share.blocks)
        for block_bytes, stride, share in zip(config.block_bytes, strides, config.shares, strict=False)
    )
    for index, group in enumerate(config.kv_cache_groups):
        group.layer_names = [name for stage in stages for name in stage.kv_cache_groups[index].layer_names]


def keep_pages_natural(platform: Any, vllm_config: Any, inflate: Callable[[Any], None] | None) -> bool:
    """Decide whether tidepool serves this engine, and if so set its block sizes.

    Called in place of the inflation, with the model loaded, on every rank; all decide alike. Attention blocks become as
    small as the kernels take (or as the user said), checkpoints lie `CHECKPOINT_TOKENS` apart, and no page is padded.

    Args:
        platform: vLLM's platform class.
        vllm_config: vLLM's configuration of the engine; changed only when the answer is True.
        inflate: vLLM's own inflation of a configuration; None on a pipeline stage without attention.

    Returns:
        False if the engine is left to vLLM; one log line has said why.
    """
    cache_config = vllm_config.cache_config
    if plan_of(vllm_config) is not None:
        return True
    settings = read_settings(vllm_config.additional_config)
    closed = next(closed_gates(vllm_config, settings.allow), None)
    # Gates look at the configuration, which is the same on every rank; the environment and the layers may not be.
    views = [] if closed else views_of_ranks(vllm_config, _view(platform, vllm_config, settings))
    if len({view.settings for view in views}) > 1:
        raise CacheConfigError("TIDEPOOL isn't the same on every node: set it alike, or TIDEPOOL=off on all.")
    closed = closed or unservable_specs({name: spec for view in views for name, spec in view.specs.items()})
    closed = closed or unservable_backends([backend for view in views for backend in view.backends])
    if closed or not settings.enabled:
        step_aside(vllm_config, settings, closed)
        return False

    stock = None
    if inflate is not None:
        stock_config = copy.copy(vllm_config)
        stock_config.cache_config = copy.copy(cache_config)
        inflate(stock_config)
        stock = StockBlocks(stock_config.cache_config.block_size, stock_config.cache_config.mamba_page_size_padded)

    kernel = lcm(*(view.kernel_tokens for view in views))
    block_tokens = settings.block_tokens or (
        cache_config.block_size if cache_config.user_specified_block_size else kernel
    )
    if block_tokens % kernel:
        raise CacheConfigError(
            f"An attention block of {block_tokens} tokens isn't a multiple of the {kernel} that the attention kernels "
            "take: change block_tokens (or --block-size)."
        )
    if cache_config.mamba_cache_mode == "align":
        spacing = _spacing(vllm_config, settings, block_tokens)
        cache_config.mamba_block_size = _column_tokens(spacing, block_tokens)
    else:
        spacing = CHECKPOINT_TOKENS
    cache_config.block_size = block_tokens
    write_note(vllm_config, _PLAN, ServingPlan(settings.partition, settings.eviction, stock, spacing))
    return True


def checkpoint_rules(
    states: Sequence[MambaSpec],
    *,
    unit: int,
    spacing: int,
    drafter: bool,
    stock_block_tokens: int = 0,
    interval: int | None = 0,
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
    )


def _column_tokens(spacing: int, block_tokens: int) -> int:
    """The widest column up to `COLUMN_TOKENS` (or else the attention block) of which checkpoints lie at multiples."""
    blocks = spacing // block_tokens
    widths = [width for width in range(1, blocks + 1) if blocks % width == 0 and width * block_tokens <= COLUMN_TOKENS]
    return max(widths, default=1) * block_tokens


def _spacing(vllm_config: Any, settings: Settings, block_tokens: int) -> int:
    """How far checkpoints lie apart, in tokens: as the user said, or about `CHECKPOINT_TOKENS`.

    Raises:
        CacheConfigError: it isn't a multiple of the attention block, or doesn't divide the retention interval.
    """
    interval = vllm_config.cache_config.prefix_cache_retention_interval
    named = {
        "checkpoint_tokens": settings.checkpoint_tokens,
        "--mamba-block-size": asked_of(vllm_config).mamba_block_size,
        "prefix_cache_retention_interval": interval,
    }
    name, tokens = next(((name, tokens) for name, tokens in named.items() if tokens), ("", block_tokens))
    if tokens % block_tokens:
        raise CacheConfigError(f"{name} ({tokens}) must be a multiple of the attention block ({block_tokens} tokens).")
    if not name:
        return -(-CHECKPOINT_TOKENS // block_tokens) * block_tokens
    if interval and name == "prefix_cache_retention_interval":
        return spacing_within(interval, block_tokens, CHECKPOINT_TOKENS)
    if interval and interval % tokens:
        raise CacheConfigError(f"prefix_cache_retention_interval ({interval}) must be a multiple of {name} ({tokens}).")
    return tokens


def views_of_ranks(vllm_config: Any, mine: RankView) -> list[RankView]:
    """What every rank knows, in order of ranks; the same list on all. Waits for all ranks."""
    if vllm_config.parallel_config.world_size == 1:
        return [mine]
    from torch.distributed import all_gather_object
    from vllm.distributed import get_world_group

    world = get_world_group()
    views: list[RankView] = [mine] * world.world_size
    all_gather_object(views, mine, group=world.cpu_group)
    return views


def _view(platform: Any, vllm_config: Any, settings: Settings) -> RankView:
    if not settings.enabled:
        return RankView(settings, {}, 1)
    backends = _attention_backends(platform, vllm_config)
    names = tuple(backend.__name__ for backend in backends)
    return RankView(settings, layer_specs_of(vllm_config), _smallest_kernel_block(vllm_config, backends), names)


def group_by_layer_cache(specs: Mapping[str, KVCacheSpec]) -> list[KVCacheGroupSpec]:
    """One group for each layer cache, none padded or split, in the order in which each first appears."""
    layers: dict[KVCacheSpec, list[str]] = {}
    for name, spec in specs.items():
        layers.setdefault(spec, []).append(name)
    return [KVCacheGroupSpec(names, type(spec).merge([spec] * len(names))) for spec, names in layers.items()]


def core_groups(vllm_config: Any, groups: Sequence[KVCacheGroupSpec]) -> list[Group]:
    """vLLM's groups in the core's terms."""
    return [_core_group(vllm_config, group) for group in groups]


def make_kv_cache_config(
    vllm_config: Any, plan: ServingPlan, groups: list[KVCacheGroupSpec], memory_bytes: int
) -> TidepoolKVCacheConfig:
    """Plan the arena and its views for ``memory_bytes`` of KV memory.

    Raises:
        CacheConfigError: no geometry fits these sizes, a fixed partition doesn't fit this memory, or blocks are larger
            than the kernels take.
    """
    layout = vllm_config.cache_config.get_resolved_kv_cache_layout()
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
    for group in groups:
        # Here and not where layers are grouped: vLLM makes the groups anew for each rank, without their roles.
        if isinstance(group.kv_cache_spec, MambaSpec):
            group.role = STATES_ROLE
    core = core_groups(vllm_config, groups)
    geometry = _geometry(plan, core)
    override = vllm_config.cache_config.num_gpu_blocks_override
    extents = override if override is not None else memory_bytes // geometry.extent_bytes
    profiling = override is not None and memory_bytes == 0
    if profiling:
        extents = min(extents, PROFILING_EXTENTS)
    arena_bytes = extents * geometry.extent_bytes
    shares: tuple[Share, ...] = ()
    if plan.partition == "fixed" and not profiling:
        # A fixed partition isn't cut into extents, so it needn't end with a whole one.
        arena_bytes = arena_bytes if override is not None else memory_bytes
        if plan.places:
            shares = tuple(
                Share(group.block_bytes, -(-group.block_bytes // group.align) * group.align, *place)
                for group, place in zip(core, plan.places, strict=True)
            )
            arena_bytes = max((share.first + share.blocks) * share.stride for share in shares)
        else:
            shares = fixed_shares(
                core,
                arena_bytes,
                vllm_config.scheduler_config.max_num_seqs,
                vllm_config.model_config.max_model_len,
            )
        _require_room_for_one(core, shares, vllm_config.model_config.max_model_len)
    layouts: Sequence[ExtentLayout | Share] = shares or geometry.layouts
    tensors = [
        KVCacheTensor(
            size=arena_bytes,
            layers=list(group.layer_names),
            layer_stride=member.page_bytes,
            block_stride=layout.stride,
        )
        for group, member, layout in zip(groups, core, layouts, strict=True)
        if group.layer_names
    ]
    return TidepoolKVCacheConfig(
        num_blocks=extents,
        kv_cache_tensors=tensors,
        kv_cache_groups=groups,
        prefix_cache_retention_interval=vllm_config.cache_config.prefix_cache_retention_interval,
        partition=plan.partition,
        eviction=plan.eviction,
        checkpoint_tokens=plan.checkpoint_tokens,
        stock_block_tokens=plan.stock.block_tokens if plan.stock else 0,
        geometry=None if shares else geometry,
        shares=shares,
        arena_bytes=arena_bytes,
        block_bytes=tuple(member.block_bytes for member in core),
    )


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


def extent_bytes(vllm_config: Any, groups: Sequence[KVCacheGroupSpec]) -> int:
    """Bytes of an extent."""
    return _geometry(plan_of(vllm_config), core_groups(vllm_config, groups)).extent_bytes


def extents_of_longest_request(vllm_config: Any, groups: Sequence[KVCacheGroupSpec]) -> int:
    """Extents that one request of max_model_len tokens needs."""
    core = core_groups(vllm_config, groups)
    longest = vllm_config.model_config.max_model_len
    return _geometry(plan_of(vllm_config), core).extents_for([group.blocks_for(longest) for group in core])


def _geometry(plan: ServingPlan | None, core: Sequence[Group]) -> Geometry:
    """How this rank's extents are divided."""
    return (
        geometry_by_counts(core, plan.blocks_per_extent) if plan and plan.blocks_per_extent else choose_geometry(core)
    )


def _groups_on(groups: Sequence[KVCacheGroupSpec], layers: Sequence[str]) -> list[KVCacheGroupSpec]:
    """The groups with the layers that one rank has."""
    held = set(layers)
    return [replace(group, layer_names=[n for n in group.layer_names if n in held]) for group in groups]


def requests_with_states(config: TidepoolKVCacheConfig) -> int:
    """Requests whose states fit in the memory: one state each, and one for each draft token."""
    return min(
        (blocks - 1) // (1 + group.kv_cache_spec.num_speculative_blocks)
        for blocks, group in zip(config.pool_blocks, config.kv_cache_groups, strict=True)
        if isinstance(group.kv_cache_spec, MambaSpec)
    )


def max_concurrency(vllm_config: Any, config: TidepoolKVCacheConfig) -> float:
    """How many requests of max_model_len tokens fit at once."""
    core = core_groups(vllm_config, config.kv_cache_groups)
    needs = [group.blocks_for(vllm_config.model_config.max_model_len) for group in core]
    if config.geometry:
        # Requests share extents, so this counts in fractions of them.
        each = sum(need / layout.blocks_per_extent for need, layout in zip(needs, config.geometry.layouts, strict=True))
        return (config.num_blocks - 1) / each
    return min(share.blocks / need for share, need in zip(config.shares, needs, strict=True))


def stock_kv_cache_config(
    vllm_config: Any,
    plan: ServingPlan,
    specs: Mapping[str, KVCacheSpec],
    memory_bytes: int,
    grouping: Callable[[Any, dict[str, KVCacheSpec]], list[KVCacheGroupSpec]],
    configure: Callable[[Any, list[KVCacheGroupSpec], int], KVCacheConfig],
) -> KVCacheConfig:
    """What vLLM alone would have planned on the same bytes, by its own functions ``grouping`` and ``configure``."""
    stock = plan.stock
    assert stock, "the engine core's plan comes from a rank with attention"
    stock_config = copy.copy(vllm_config)
    stock_config.cache_config = copy.copy(vllm_config.cache_config)
    stock_config.cache_config.block_size = stock.block_tokens
    stock_config.cache_config.num_gpu_blocks_override = None
    write_note(stock_config, _PLAN, None)
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
    return configure(stock_config, grouping(stock_config, stock_specs), memory_bytes)


def _core_group(vllm_config: Any, group: KVCacheGroupSpec) -> Group:
    spec, names = group.kv_cache_spec, tuple(group.layer_names)
    if isinstance(spec, MambaSpec):
        copies = spec.max_memory_usage_bytes(vllm_config) // spec.page_size_bytes
        return Group(State(spec.page_size_bytes, copies), names, spec.block_size, block_align(spec.page_size_bytes))
    assert isinstance(spec, AttentionSpec)
    per_token = replace(spec, page_size_padded=None).copy_with_new_block_size(1).page_size_bytes
    cache: FullAttention | SlidingWindow = FullAttention(per_token)
    if isinstance(spec, SlidingWindowSpec):
        # What is computed in a step is held beside the window until the step has ended.
        cache = SlidingWindow(per_token, spec.sliding_window, vllm_config.max_in_flight_tokens)
    return Group(cache, names, spec.block_size, block_align(spec.page_size_bytes), page_bytes=spec.page_size_bytes)


def layer_specs_of(vllm_config: Any) -> dict[str, KVCacheSpec]:
    """Layer name to KVCacheSpec, from the loaded model: as the model runner makes them, packed as its backends do."""
    from vllm.config.vllm import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.v1.worker.utils import customize_attention_spec

    layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase)
    specs = {name: layer.get_kv_cache_spec(vllm_config) for name, layer in layers.items()}
    return {
        name: customize_attention_spec(layers[name].get_attn_backend(), spec)
        if isinstance(spec, AttentionSpec)
        else spec
        for name, spec in specs.items()
        if spec is not None
    }


def _attention_backends(platform: Any, vllm_config: Any) -> list[Any]:
    """The attention backends in the model."""
    from vllm.config.vllm import set_current_vllm_config

    with set_current_vllm_config(vllm_config):
        return list(platform._find_non_ssm_backends(vllm_config))


def _smallest_kernel_block(vllm_config: Any, backends: Sequence[Any]) -> int:
    """The fewest tokens that a block of all these attention backends may have."""
    from vllm.config.vllm import set_current_vllm_config
    from vllm.v1.attention.backend import MultipleOf

    with set_current_vllm_config(vllm_config):
        sizes = [backend.get_supported_kernel_block_sizes() for backend in backends]
    return lcm(*(min(s.base if isinstance(s, MultipleOf) else s for s in each) for each in sizes if each))

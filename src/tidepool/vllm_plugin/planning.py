"""Seam 1: how vLLM plans the KV cache.

vLLM inflates the attention block of a hybrid model until all pages are equally large, in each worker, right after the
model is loaded. There tidepool decides whether it serves the engine; if so it leaves the pages natural and hangs a
`Plan` on the CacheConfig. Later steps look for that plan and go vLLM's way without it.

A served engine's ``KVCacheConfig.num_blocks`` counts *extents*: vLLM's memory check, its override and its minimum over
ranks then work unchanged with the extent as the block that they divide memory by.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import lcm
from typing import Any

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
    Cut,
    FullAttention,
    Geometry,
    Group,
    Share,
    SlidingWindow,
    State,
    choose_geometry,
    fixed_shares,
)
from tidepool.vllm_plugin.gates import closed_gates, unservable_specs
from tidepool.vllm_plugin.settings import Eviction, Partition, read_settings

logger = init_logger("vllm.tidepool")

STRIDE_ALIGN = 64
"""Bytes. A cache line, and a multiple of every vector load that attention kernels do."""
CHECKPOINT_TOKENS = 512
"""How far apart states are kept at most; it costs no padding. Chosen by replay (docs/prefix-caching.md): few enough for
shared system prompts, many enough that states are seldom copied."""
PROFILING_EXTENTS = 64
"""Extents at most in the KV cache that vLLM makes to measure CUDA graphs with, and throws away again: one for each
request of a captured step, it thinks, which would take gigabytes."""
_PLAN = "tidepool_plan"


@dataclass(frozen=True)
class StockBlocks:
    """What vLLM alone would have set for this model."""

    block_tokens: int
    state_page_bytes: int | None
    """The padded page of one state layer; None if it needs no padding."""


@dataclass(frozen=True)
class Plan:
    """tidepool serves this engine, and how."""

    partition: Partition
    eviction: Eviction
    stock: StockBlocks


@dataclass
class TidepoolKVCacheConfig(KVCacheConfig):
    """A KVCacheConfig whose groups have pools of their own over one arena; ``num_blocks`` counts extents."""

    partition: Partition = "elastic"
    eviction: Eviction = "returns"
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
        parts: Sequence[Cut | Share] = self.geometry.cuts if self.geometry else self.shares
        return tuple(part.stride for part in parts)

    @property
    def pool_blocks(self) -> tuple[int, ...]:
        """For each group, how many block ids its pool has, the null block included."""
        if self.geometry:
            return tuple(self.num_blocks * cut.slots for cut in self.geometry.cuts)
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


def plan_of(vllm_config: Any) -> Plan | None:
    """The plan of an engine that tidepool serves, else None."""
    return getattr(vllm_config.cache_config, _PLAN, None)


def send_plan(vllm_config: Any, specs: Mapping[str, KVCacheSpec]) -> None:
    """In a worker: let the plan travel to the engine core, which may be another process, with the layers' specs."""
    plan = plan_of(vllm_config)
    if plan is not None:
        for spec in specs.values():
            object.__setattr__(spec, _PLAN, plan)


def receive_plan(vllm_config: Any, specs: Mapping[str, KVCacheSpec]) -> Plan | None:
    """In the engine core: take over the plan that came with the specs. Returns `plan_of`."""
    plan = next((plan for spec in specs.values() if (plan := getattr(spec, _PLAN, None))), None)
    if plan is not None and plan_of(vllm_config) is None:
        object.__setattr__(vllm_config.cache_config, _PLAN, plan)
        if vllm_config.cache_config.mamba_cache_mode == "align":
            spacing = next(spec.block_size for spec in specs.values() if isinstance(spec, MambaSpec))
            vllm_config.cache_config.mamba_block_size = spacing
    return plan_of(vllm_config)


def keep_pages_natural(platform: Any, vllm_config: Any, inflate: Callable[[Any], None]) -> bool:
    """Decide whether tidepool serves this engine, and if so set its block sizes.

    Called in place of the inflation, with the model loaded. Attention blocks become as small as the kernels take
    (or as the user said), checkpoints lie `CHECKPOINT_TOKENS` apart, and no page is padded.

    Args:
        platform: vLLM's platform class.
        vllm_config: vLLM's configuration of the engine; changed only when the answer is True.
        inflate: vLLM's own inflation of a configuration.

    Returns:
        False if the engine is left to vLLM; one log line has said why.
    """
    cache_config = vllm_config.cache_config
    if plan_of(vllm_config) is not None:
        return True
    settings = read_settings(vllm_config.additional_config)
    if not settings.enabled:
        logger.info("tidepool is switched off: vLLM's own KV cache is used.")
        return False
    specs = layer_specs_of(vllm_config)
    closed = next(closed_gates(vllm_config, settings.allow), None) or unservable_specs(specs)
    if closed:
        logger.warning("tidepool steps aside, vLLM's own KV cache is used. %s.", closed)
        return False

    stock_config = copy.copy(vllm_config)
    stock_config.cache_config = copy.copy(cache_config)
    inflate(stock_config)
    stock = StockBlocks(stock_config.cache_config.block_size, stock_config.cache_config.mamba_page_size_padded)

    kernel = _smallest_kernel_block(platform, vllm_config)
    block_tokens = settings.block_tokens or (
        cache_config.block_size if cache_config.user_specified_block_size else kernel
    )
    if block_tokens % kernel:
        raise CacheConfigError(
            f"An attention block of {block_tokens} tokens isn't a multiple of the {kernel} that the attention kernels "
            "take: change block_tokens (or --block-size)."
        )
    if cache_config.mamba_cache_mode == "align":
        spacing = settings.checkpoint_tokens or -(-CHECKPOINT_TOKENS // block_tokens) * block_tokens
        if spacing % block_tokens:
            raise CacheConfigError(
                f"checkpoint_tokens ({spacing}) must be a multiple of the attention block ({block_tokens} tokens)."
            )
        cache_config.mamba_block_size = spacing
    cache_config.block_size = block_tokens
    object.__setattr__(cache_config, _PLAN, Plan(settings.partition, settings.eviction, stock))
    return True


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
    vllm_config: Any, plan: Plan, groups: list[KVCacheGroupSpec], memory_bytes: int
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
    core = core_groups(vllm_config, groups)
    geometry = choose_geometry(core)
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
        shares = fixed_shares(
            core,
            arena_bytes,
            vllm_config.scheduler_config.max_num_seqs,
            vllm_config.model_config.max_model_len,
        )
        _require_room_for_one(core, shares, vllm_config.model_config.max_model_len)
    cuts: Sequence[Cut | Share] = shares or geometry.cuts
    tensors = [
        KVCacheTensor(
            size=arena_bytes,
            layers=list(group.layer_names),
            layer_stride=member.page_bytes,
            block_stride=cut.stride,
        )
        for group, member, cut in zip(groups, core, cuts, strict=True)
    ]
    return TidepoolKVCacheConfig(
        num_blocks=extents,
        kv_cache_tensors=tensors,
        kv_cache_groups=groups,
        prefix_cache_retention_interval=vllm_config.cache_config.prefix_cache_retention_interval,
        partition=plan.partition,
        eviction=plan.eviction,
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
        if share.blocks < needed:
            raise CacheConfigError(
                f"The fixed partition leaves {share.blocks:,} blocks to {group.layers[0]!r} and its like, and one "
                f"request of max_model_len ({tokens:,} tokens) needs {needed:,}: give it more memory, lower "
                "max_num_seqs or max_model_len, or use the elastic partition."
            )


def extent_bytes(vllm_config: Any, groups: Sequence[KVCacheGroupSpec]) -> int:
    """Bytes of an extent."""
    return choose_geometry(core_groups(vllm_config, groups)).extent_bytes


def extents_of_longest_request(vllm_config: Any, groups: Sequence[KVCacheGroupSpec]) -> int:
    """Extents that one request of max_model_len tokens needs."""
    core = core_groups(vllm_config, groups)
    longest = vllm_config.model_config.max_model_len
    return choose_geometry(core).extents_for([group.blocks_for(longest) for group in core])


def max_concurrency(vllm_config: Any, config: TidepoolKVCacheConfig) -> float:
    """How many requests of max_model_len tokens fit at once."""
    core = core_groups(vllm_config, config.kv_cache_groups)
    needs = [group.blocks_for(vllm_config.model_config.max_model_len) for group in core]
    if config.geometry:
        # Requests share extents, so this counts in fractions of them.
        each = sum(need / cut.slots for need, cut in zip(needs, config.geometry.cuts, strict=True))
        return (config.num_blocks - 1) / each
    return min(share.blocks / need for share, need in zip(config.shares, needs, strict=True))


def stock_kv_cache_config(
    vllm_config: Any,
    plan: Plan,
    specs: Mapping[str, KVCacheSpec],
    memory_bytes: int,
    grouping: Callable[[Any, dict[str, KVCacheSpec]], list[KVCacheGroupSpec]],
    configure: Callable[[Any, list[KVCacheGroupSpec], int], KVCacheConfig],
) -> KVCacheConfig:
    """What vLLM alone would have planned on the same bytes, by its own functions ``grouping`` and ``configure``."""
    stock_config = copy.copy(vllm_config)
    stock_config.cache_config = copy.copy(vllm_config.cache_config)
    stock_config.cache_config.block_size = plan.stock.block_tokens
    stock_config.cache_config.num_gpu_blocks_override = None
    object.__setattr__(stock_config.cache_config, _PLAN, None)
    aligned = vllm_config.cache_config.mamba_cache_mode == "align"
    stock_specs: dict[str, KVCacheSpec] = {
        name: replace(
            spec,
            block_size=plan.stock.block_tokens if aligned else spec.block_size,
            page_size_padded=plan.stock.state_page_bytes,
        )
        if isinstance(spec, MambaSpec)
        else replace(spec, block_size=plan.stock.block_tokens)
        for name, spec in specs.items()
    }
    return configure(stock_config, grouping(stock_config, stock_specs), memory_bytes)


def _core_group(vllm_config: Any, group: KVCacheGroupSpec) -> Group:
    spec, names = group.kv_cache_spec, tuple(group.layer_names)
    if isinstance(spec, MambaSpec):
        copies = spec.max_memory_usage_bytes(vllm_config) // spec.page_size_bytes
        return Group(State(spec.page_size_bytes, copies), names, spec.block_size, STRIDE_ALIGN)
    assert isinstance(spec, AttentionSpec)
    per_token = replace(spec, page_size_padded=None).copy_with_new_block_size(1).page_size_bytes
    cache: FullAttention | SlidingWindow = FullAttention(per_token)
    if isinstance(spec, SlidingWindowSpec):
        # What is computed in a step is held beside the window until the step has ended.
        cache = SlidingWindow(per_token, spec.sliding_window, vllm_config.max_in_flight_tokens)
    return Group(cache, names, spec.block_size, STRIDE_ALIGN, page_bytes=spec.page_size_bytes)


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


def _smallest_kernel_block(platform: Any, vllm_config: Any) -> int:
    """The fewest tokens that a block of every attention backend in the model may have."""
    from vllm.config.vllm import set_current_vllm_config
    from vllm.v1.attention.backend import MultipleOf

    with set_current_vllm_config(vllm_config):
        sizes = [b.get_supported_kernel_block_sizes() for b in platform._find_non_ssm_backends(vllm_config)]
    return lcm(*(min(s.base if isinstance(s, MultipleOf) else s for s in each) for each in sizes if each))

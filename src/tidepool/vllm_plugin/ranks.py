"""What several ranks must have in common: tensor parallelism and pipeline stages.

One scheduler hands out blocks for all ranks, so a block id must name the same extent and slot on each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vllm.v1.kv_cache_interface import KVCacheGroupSpec, KVCacheSpec, MambaSpec

from tidepool.cache import (
    CacheConfigError,
    ExtentLayout,
    Geometry,
    Share,
    choose_stage_geometries,
    fixed_stage_shares,
)
from tidepool.vllm_plugin.deciding import may_be_served
from tidepool.vllm_plugin.planning import TidepoolKVCacheConfig, arena_groups, group_by_layer_cache
from tidepool.vllm_plugin.serving_plan import ServingPlan, detach_plans, fallback_reason, note_plan, plan_of


def agree(vllm_config: Any, specs_of_ranks: Sequence[Mapping[str, KVCacheSpec]]) -> None:
    """In the engine core: take over the plan that came with the specs, before any memory is planned.

    Args:
        vllm_config: vLLM's configuration of the engine; `plan_of` tells the plan from now on.
        specs_of_ranks: layer name to KVCacheSpec, for each rank.

    Raises:
        CacheConfigError: tidepool serves only some ranks, or their word was lost.
    """
    plans = detach_plans(specs_of_ranks)
    _require_word(vllm_config, specs_of_ranks, plans)
    _require_one_plan(plans)
    _take_over(vllm_config, plans, specs_of_ranks)


def settle(
    vllm_config: Any, specs_of_ranks: Sequence[Mapping[str, KVCacheSpec]], memory_of_ranks: Sequence[int]
) -> None:
    """In the engine core: add to the plan what depends on memory, before each rank's is planned by itself.

    Args:
        vllm_config: vLLM's configuration of the engine.
        specs_of_ranks: layer name to KVCacheSpec, for each rank.
        memory_of_ranks: bytes of KV memory of each rank.

    Raises:
        CacheConfigError: there is no plan that suits all ranks.
    """
    plan = plan_of(vllm_config)
    if plan is None:
        return
    if len(specs_of_ranks) > 1:
        plan = _plan_for_all(vllm_config, plan, specs_of_ranks, memory_of_ranks)
    note_plan(vllm_config, plan._replace(memory_bytes=min(memory_of_ranks)))


def _require_word(
    vllm_config: Any, specs_of_ranks: Sequence[Mapping[str, KVCacheSpec]], plans: Mapping[int, ServingPlan | None]
) -> None:
    """Refuse an engine whose workers may have set natural pages, which this process doesn't know of.

    Raises:
        CacheConfigError: nothing came with the specs, and nothing is known otherwise.
    """
    known = plans or plan_of(vllm_config) or fallback_reason(vllm_config)
    if not known and any(specs_of_ranks) and may_be_served(vllm_config):
        raise CacheConfigError(
            "The workers sent no word whether tidepool serves this engine: let vLLM load the same tidepool in all its "
            "processes (VLLM_PLUGINS), or set TIDEPOOL=off on every node."
        )


def _require_one_plan(plans: Mapping[int, ServingPlan | None]) -> None:
    if len({plan and (plan.partition, plan.eviction, plan.checkpoint_states) for plan in plans.values()}) > 1:
        raise CacheConfigError(
            "The ranks don't agree on whose memory this engine uses ("
            + "; ".join(f"rank {rank}: {plan.partition if plan else 'vLLM'}" for rank, plan in plans.items())
            + "): install the same tidepool and set the same TIDEPOOL on every node, or set TIDEPOOL=off on all."
        )


def _take_over(
    vllm_config: Any, plans: Mapping[int, ServingPlan | None], specs_of_ranks: Sequence[Mapping[str, KVCacheSpec]]
) -> None:
    """Note the workers' plan, and set what they have set, unless they did so in this very configuration."""
    plan = next((plan for plan in plans.values() if plan and plan.stock), None)
    if plan is None or plan_of(vllm_config) is not None:
        return
    note_plan(vllm_config, plan)
    if vllm_config.cache_config.mamba_cache_mode == "align":
        specs = (spec for specs in specs_of_ranks for spec in specs.values())
        vllm_config.cache_config.mamba_block_size = next(s.block_size for s in specs if isinstance(s, MambaSpec))


def _plan_for_all(
    vllm_config: Any,
    plan: ServingPlan,
    specs_of_ranks: Sequence[Mapping[str, KVCacheSpec]],
    memory_of_ranks: Sequence[int],
) -> ServingPlan:
    """The plan with what all ranks lay out alike.

    Raises:
        CacheConfigError: nothing suits all ranks' memory.
    """
    groups = group_by_layer_cache({name: spec for specs in specs_of_ranks for name, spec in specs.items()})
    budgets: dict[tuple[str, ...], int] = {}
    for specs, memory in zip(specs_of_ranks, memory_of_ranks, strict=True):
        budgets[tuple(specs)] = min(memory, budgets.get(tuple(specs), memory))
    stages = [arena_groups(vllm_config, _groups_on(groups, names)) for names in budgets]
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
    return plan


def _groups_on(groups: Sequence[KVCacheGroupSpec], layers: Sequence[str]) -> list[KVCacheGroupSpec]:
    """The groups with the layers that one rank has."""
    held = set(layers)
    return [replace(group, layer_names=[n for n in group.layer_names if n in held]) for group in groups]


def over_stages(config: TidepoolKVCacheConfig, configs: Sequence[TidepoolKVCacheConfig]) -> None:
    """Let the scheduler's configuration, a copy of one rank's, stand for all pipeline stages: bytes are sums over them.

    Block ids are the same on every stage, so nothing but the accounts of bytes changes.
    """
    config.host_extents = min(each.host_extents for each in configs)
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
        config.host_geometry = config.geometry if config.host_extents else None
    config.shares = tuple(
        Share(block_bytes, stride, share.first, share.blocks)
        for block_bytes, stride, share in zip(config.block_bytes, strides, config.shares, strict=False)
    )
    for index, group in enumerate(config.kv_cache_groups):
        group.layer_names = [name for stage in stages for name in stage.kv_cache_groups[index].layer_names]

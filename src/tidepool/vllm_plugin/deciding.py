"""Seam 1, in the workers: whether tidepool serves an engine, and the sizes of its blocks.

vLLM inflates the attention block of a hybrid model until all pages are equally large, in each worker, right after the
model is loaded. There tidepool decides. If it serves the engine it leaves the pages natural and notes a `ServingPlan`;
later steps look for that plan and go vLLM's way without it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import lcm
from typing import Any

from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec

from tidepool.cache import CacheConfigError, spacing_within
from tidepool.certificates import Setup, proven
from tidepool.vllm_plugin.asked import asked_of
from tidepool.vllm_plugin.gates import (
    offloads,
    unsupported_backends,
    unsupported_features,
    unsupported_layers,
    unsupported_setup,
)
from tidepool.vllm_plugin.serving_plan import (
    CHECKPOINT_TOKENS,
    ServingPlan,
    StockBlocks,
    fall_back,
    note_plan,
    plan_of,
)
from tidepool.vllm_plugin.settings import Settings, read_settings
from tidepool.vllm_plugin.setups import command_for, needs_certificate, setup_of, setup_of_ranks
from tidepool.vllm_plugin.versions import state_export_tokens

COLUMN_TOKENS = 128
"""What a column of the states' block table stands for at most: vLLM's block size of states. Layers that save a state
inside a step can do so from two columns on; and a running state moves to the next column at each multiple."""


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
    export_tokens: int = 1
    """Its layers save states inside steps at multiples of so many tokens."""
    setup: Setup | None = None
    """Its part of the engine's; None where it is switched off."""
    proven: tuple[Setup, ...] = ()
    """The setups that it finds certificates for, where it needs one."""


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

    Raises:
        CacheConfigError: the ranks' settings differ, or a size that the user set doesn't go with the others.
    """
    if plan_of(vllm_config) is not None:
        return True
    settings = read_settings(vllm_config.additional_config)
    reason = next(unsupported_features(vllm_config, settings.allow), None)
    # Gates look at the configuration, which is the same on every rank; the environment and the layers may not be.
    views = [] if reason else views_of_ranks(vllm_config, _view(platform, vllm_config, settings))
    setups = [view.setup for view in views if view.setup]
    setup = setup_of_ranks(setups) if setups else None
    reason = reason or _why_not(views) or _uncertified(vllm_config, settings, setup, views)
    if reason or not settings.enabled:
        fall_back(vllm_config, settings, reason)
        return False
    stock = _stock_blocks(vllm_config, inflate) if inflate else None
    kernel, export = (lcm(*each) for each in zip(*((v.kernel_tokens, v.export_tokens) for v in views), strict=True))
    spacing = _set_blocks(vllm_config, settings, kernel, export)
    plan = ServingPlan(
        settings.partition,
        settings.eviction,
        stock,
        spacing,
        hits_first=settings.queue == "hits-first",
        checkpoint_states=settings.checkpoint_states,
        setup=setup,
    )
    note_plan(vllm_config, plan)
    return True


def may_be_served(vllm_config: Any) -> bool:
    """Whether nothing in the configuration keeps tidepool from serving the engine; its layers may."""
    settings = read_settings(vllm_config.additional_config)
    if not settings.enabled or not vllm_config.model_config.is_hybrid:
        return False
    if next(unsupported_features(vllm_config, settings.allow), None) is not None:
        return False
    return not needs_certificate(vllm_config) or "device" in settings.allow or bool(proven())


# What the ranks know -----------------------------------------------------------------------------------------


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
    specs, kernel = layer_specs_of(vllm_config), _smallest_kernel_block(vllm_config, backends)
    setup = setup_of(vllm_config, specs, _block_tokens(vllm_config, settings, kernel))
    certified = proven() if needs_certificate(vllm_config) else ()
    return RankView(settings, specs, kernel, names, state_export_tokens(vllm_config), setup, certified)


def _why_not(views: Sequence[RankView]) -> str | None:
    """Why these ranks' layers aren't served, or None.

    Raises:
        CacheConfigError: the ranks' settings differ.
    """
    if len({view.settings for view in views}) > 1:
        raise CacheConfigError("TIDEPOOL isn't the same on every node: set it alike, or TIDEPOOL=off on all.")
    layers = {name: spec for view in views for name, spec in view.specs.items()}
    return unsupported_layers(layers) or unsupported_backends([name for view in views for name in view.backends])


def _uncertified(vllm_config: Any, settings: Settings, setup: Setup | None, views: Sequence[RankView]) -> str | None:
    """Why an engine isn't served for want of a certificate, or None. Every rank must have found it."""
    if setup is None or not needs_certificate(vllm_config):
        return None
    found = tuple(each for each in views[0].proven if all(each in view.proven for view in views))
    return unsupported_setup(
        setup,
        found,
        command_for(vllm_config, setup),
        settings.allow,
        drafts=vllm_config.speculative_config is not None,
        host_memory=offloads(vllm_config),
    )


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


# Block sizes -------------------------------------------------------------------------------------------------


def _stock_blocks(vllm_config: Any, inflate: Callable[[Any], None]) -> StockBlocks:
    """What vLLM's inflation sets, found on a copy."""
    stock_config = copy.copy(vllm_config)
    stock_config.cache_config = copy.copy(vllm_config.cache_config)
    inflate(stock_config)
    return StockBlocks(stock_config.cache_config.block_size, stock_config.cache_config.mamba_page_size_padded)


def _set_blocks(vllm_config: Any, settings: Settings, kernel: int, export: int) -> int:
    """Set the sizes of attention blocks and of states' columns.

    Args:
        vllm_config: vLLM's configuration of the engine; changed.
        settings: the user's.
        kernel: the fewest tokens of an attention block that all ranks' kernels take.
        export: tokens at multiples of which layers save states inside steps.

    Returns:
        Tokens from one checkpoint to the next.

    Raises:
        CacheConfigError: a size that the user set doesn't go with the others.
    """
    cache_config = vllm_config.cache_config
    block_tokens = _block_tokens(vllm_config, settings, kernel)
    if block_tokens % kernel:
        raise CacheConfigError(
            f"An attention block of {block_tokens} tokens isn't a multiple of the {kernel} that the attention kernels "
            "take: change block_tokens (or --block-size)."
        )
    spacing = CHECKPOINT_TOKENS
    if cache_config.mamba_cache_mode == "align":
        spacing = _spacing(vllm_config, settings, block_tokens, export)
        cache_config.mamba_block_size = _column_tokens(spacing, lcm(block_tokens, export))
    cache_config.block_size = block_tokens
    return spacing


def _block_tokens(vllm_config: Any, settings: Settings, kernel: int) -> int:
    """Tokens of an attention block: as the user said, or the fewest that the kernels take."""
    cache_config = vllm_config.cache_config
    return settings.block_tokens or (cache_config.block_size if cache_config.user_specified_block_size else kernel)


def _column_tokens(spacing: int, unit: int) -> int:
    """The widest column up to `COLUMN_TOKENS` (or else the unit) of which checkpoints lie at multiples."""
    units = spacing // unit
    widths = [width for width in range(1, units + 1) if units % width == 0 and width * unit <= COLUMN_TOKENS]
    return max(widths, default=1) * unit


def _spacing(vllm_config: Any, settings: Settings, block_tokens: int, export: int) -> int:
    """How far checkpoints lie apart, in tokens: as the user said, or about `CHECKPOINT_TOKENS`.

    Raises:
        CacheConfigError: it isn't a multiple of the attention block and of ``export``, or doesn't divide the retention
            interval.
    """
    unit = lcm(block_tokens, export)
    interval = vllm_config.cache_config.prefix_cache_retention_interval
    named = {
        "checkpoint_tokens": settings.checkpoint_tokens,
        "--mamba-block-size": asked_of(vllm_config).mamba_block_size,
        "prefix_cache_retention_interval": interval,
    }
    name, tokens = next(((name, tokens) for name, tokens in named.items() if tokens), ("", unit))
    if tokens % unit:
        layers = f" and of the {export} at which layers save states" if export > 1 else ""
        raise CacheConfigError(
            f"{name} ({tokens}) must be a multiple of the attention block ({block_tokens} tokens){layers}."
        )
    if not name:
        return -(-CHECKPOINT_TOKENS // unit) * unit
    if interval and name == "prefix_cache_retention_interval":
        return spacing_within(interval, unit, CHECKPOINT_TOKENS)
    if interval and interval % tokens:
        raise CacheConfigError(f"prefix_cache_retention_interval ({interval}) must be a multiple of {name} ({tokens}).")
    return tokens

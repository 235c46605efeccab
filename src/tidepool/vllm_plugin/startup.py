"""The one log block at start: what this engine's memory looks like, and what vLLM alone would have had."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

from tidepool.cache import Group, PackedState, SlidingWindow
from tidepool.capacity.memory import ElasticMemory, FixedMemory, Memory, PlannedGroup, StockMemory
from tidepool.capacity.predict import label, planned_group
from tidepool.sizes import size
from tidepool.vllm_plugin import planning
from tidepool.vllm_plugin.asked import WITHOUT_EFFECT, asked_of
from tidepool.vllm_plugin.serving_plan import CHECKPOINT_TOKENS, plan_of
from tidepool.vllm_plugin.settings import read_settings

logger = init_logger("vllm.tidepool")


def log_start(vllm_config: Any, config: planning.TidepoolKVCacheConfig) -> None:
    """Log the groups, the geometry and the capacity of a served engine.

    Args:
        vllm_config: vLLM's configuration of the engine.
        config: the memory as planned.
    """
    plan = plan_of(vllm_config)
    assert plan is not None
    groups = planning.arena_groups(vllm_config, config.kv_cache_groups)
    stages = vllm_config.parallel_config.pipeline_parallel_size
    stock: Memory | None = None
    # vLLM raises one of these where pages can't be made equal.
    with suppress(ValueError, NotImplementedError):
        if stages == 1:
            specs = {name: group.kv_cache_spec for group in config.kv_cache_groups for name in group.layer_names}
            stock_config = planning.stock_kv_cache_config(vllm_config, plan, specs, config.arena_bytes)
            stock = _stock_memory_of(vllm_config, stock_config, config.arena_bytes)
    served = "tidepool serves this model." + (f" Bytes are sums over {stages} pipeline stages." if stages > 1 else "")
    capacity = _capacity(memory_of(vllm_config, config, config.arena_bytes), stock)
    logger.info("%s", "\n".join([served, *_groups(config, groups), *capacity, *_settings(vllm_config, config)]))


def memory_of(vllm_config: Any, config: KVCacheConfig, memory_bytes: int) -> Memory:
    """An engine's KV memory in the planner's terms, whoever planned it.

    Args:
        vllm_config: vLLM's configuration of the engine.
        config: the memory as planned.
        memory_bytes: what it was planned for.
    """
    if not isinstance(config, planning.TidepoolKVCacheConfig):
        return _stock_memory_of(vllm_config, config, memory_bytes)
    blocks = [share.blocks for share in config.shares]
    if config.geometry:
        blocks = [(config.num_blocks - 1) * layout.blocks_per_extent for layout in config.geometry.layouts]
    groups = planning.arena_groups(vllm_config, config.kv_cache_groups)
    planned = tuple(planned_group(*each) for each in zip(groups, config.strides, blocks, strict=True))
    limits = (vllm_config.scheduler_config.max_num_seqs, vllm_config.model_config.max_model_len)
    if config.geometry is None:
        return FixedMemory(config.arena_bytes, planned, *limits, null_bytes=max(config.strides))
    blocks_per_extent = tuple(layout.blocks_per_extent for layout in config.geometry.layouts)
    return ElasticMemory(
        config.arena_bytes,
        planned,
        *limits,
        config.geometry.extent_bytes,
        extents=config.num_blocks,
        blocks_per_extent=blocks_per_extent,
    )


def _stock_memory_of(vllm_config: Any, config: KVCacheConfig, memory_bytes: int) -> StockMemory:
    """vLLM's own plan in the planner's terms: one pool, whose blocks all groups draw."""
    block_bytes = config.kv_cache_tensors[0].size // config.num_blocks
    groups = []
    for group in config.kv_cache_groups:
        # Layers of one group may keep pages of different sizes, which lie side by side in its blocks.
        specs = dict.fromkeys(group.layer_names, group.kv_cache_spec)
        specs |= getattr(group.kv_cache_spec, "kv_cache_specs", {})
        layers = planning.core_groups(vllm_config, [KVCacheGroupSpec([name], spec) for name, spec in specs.items()])
        natural = sum(layer.block_bytes for layer in layers)
        groups.append(
            PlannedGroup(
                label=label(layers[0].cache),
                cache=layers[0].cache,
                layers=len(layers),
                block_tokens=layers[0].block_tokens,
                token_bytes=sum(layer.cache.page_bytes(1) for layer in layers if not layer.constant),
                natural_bytes=natural,
                page_padding=0,
                group_padding=block_bytes - natural,
                blocks=config.num_blocks - 1,
            )
        )
    return StockMemory(
        budget_bytes=memory_bytes,
        groups=tuple(groups),
        max_num_seqs=vllm_config.scheduler_config.max_num_seqs,
        max_model_len=vllm_config.model_config.max_model_len,
        block_bytes=block_bytes,
        pool_blocks=config.num_blocks,
    )


def _groups(config: planning.TidepoolKVCacheConfig, groups: Sequence[Group]) -> list[str]:
    if config.geometry:
        lines = [
            f"  {config.partition} partition: {config.num_blocks:,} extents of {size(config.geometry.extent_bytes)} "
            f"in {size(config.arena_bytes)}; extent 0 holds the null blocks"
        ]
    else:
        lines = [f"  {config.partition} partition of {size(config.arena_bytes)}: every group keeps its share"]
    for index, group in enumerate(groups):
        kind = "states" if group.constant else f"attention, blocks of {group.block_tokens} tokens"
        if isinstance(group.cache, SlidingWindow):
            kind = f"attention to the last {group.cache.window:,} tokens, blocks of {group.block_tokens}"
        if isinstance(group.cache, PackedState):
            kind = f"packed states, {config.checkpoint_states}"
        blocks = config.geometry.layouts[index].blocks_per_extent if config.geometry else config.shares[index].blocks
        share = f"{blocks:,} block{'' if blocks == 1 else 's'}" + (" in an extent" if config.geometry else "")
        padding = 1 - group.block_bytes / config.strides[index]
        lines.append(
            f"  group {index}: {kind}; {len(group.layers)} layers x page of {group.page_bytes:,} B = block of "
            f"{group.block_bytes:,} B; {share}, padded by {padding:.2%}"
        )
    return lines


def _settings(vllm_config: Any, config: planning.TidepoolKVCacheConfig) -> Iterator[str]:
    """What became of the user's settings where that may surprise."""
    if config.host_geometry:
        each = config.host_geometry.extent_bytes
        yield f"  host memory behind it: {config.host_extents:,} extents in {size(config.host_extents * each)}"
    asked, cache_config = asked_of(vllm_config), vllm_config.cache_config
    settings = read_settings(vllm_config.additional_config)
    if not (settings.block_tokens or cache_config.user_specified_block_size):
        yield f"  block_size: {cache_config.block_size:,} tokens, the fewest that the attention kernels take"
    if cache_config.enable_prefix_caching and not (settings.checkpoint_tokens or asked.mamba_block_size):
        interval = cache_config.prefix_cache_retention_interval
        why = "the default" if config.checkpoint_tokens == CHECKPOINT_TOKENS else "what kernels and layers take"
        if interval:
            why = f"the part of prefix_cache_retention_interval ({interval:,}) nearest to {CHECKPOINT_TOKENS:,}"
        yield f"  checkpoint_tokens: {config.checkpoint_tokens:,}, {why}"
    if settings.checkpoint_states != "same":
        words = _packed_words(settings.checkpoint_states, config, cache_config.enable_prefix_caching)
        yield f"  checkpoint_states: {words}"
    fitting = planning.requests_with_states(config)
    if asked.max_num_seqs is not None and fitting < asked.max_num_seqs:
        yield (
            f"  max_num_seqs: lowered from {asked.max_num_seqs:,} to {max(1, fitting):,}, the requests whose states "
            "fit in this memory"
        )
    if vllm_config.cache_config.num_gpu_blocks_override is not None and config.geometry:
        yield (
            f"  num_gpu_blocks_override: counts extents of {size(config.geometry.extent_bytes)}, not vLLM's blocks; "
            f"{size(config.arena_bytes)} in all"
        )
    for name in asked.without_effect:
        yield f"  {name}: without effect here ({WITHOUT_EFFECT[name]})"


def _packed_words(state_format: str, config: planning.TidepoolKVCacheConfig, caching: bool) -> str:
    """What the user's format of cached states does here."""
    if not config.packed:
        why = "it makes no state smaller" if caching else "nothing is cached"
        return f"{state_format}, without effect here ({why})"
    whole, packed = (
        sum(config.strides[group] for group in groups)
        for groups in (config.packed, range(len(config.kv_cache_groups), len(config.block_bytes)))
    )
    return (
        f"{state_format}, which rounds states that are only cached and holds {whole / packed:.1f} times as many; "
        "answers behind a hit may differ"
    )


def _capacity(ours: Memory, stock: Memory | None) -> list[str]:
    most = ours.max_num_seqs

    def line(words: str, answer: Callable[[Memory], str], blocks: str = "") -> str:
        return f"  {words}: {answer(ours)}" + (f" (vLLM alone{blocks}: {answer(stock)})" if stock else "")

    blocks = ""
    if stock:
        largest = max(group.block_tokens for group in stock.groups if group.token_bytes)
        blocks = f", with blocks of {largest:,} tokens in {len(stock.groups)} groups"
    return [
        line("tokens beside 1 request", lambda memory: _tokens(memory, 1), blocks),
        line(f"tokens in {most:,} requests (max_num_seqs)", lambda memory: _tokens(memory, most)),
        line("requests of 100 tokens at once", lambda memory: f"{memory.requests_of(100):,}"),
    ]


def _tokens(memory: Memory, requests: int) -> str:
    tokens = memory.tokens_with(requests)
    return f"{tokens:,}" if tokens else "they don't fit"

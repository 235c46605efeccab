"""The one log block at start: what this engine's memory looks like, and what vLLM alone would have had."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

from tidepool.cache import Group, SlidingWindow
from tidepool.plan.memory import Memory, PlannedGroup, StockMemory
from tidepool.plan.predict import label, predict
from tidepool.plan.words import size
from tidepool.vllm_plugin import planning

logger = init_logger("vllm.tidepool")


def log_start(
    vllm_config: Any,
    config: planning.TidepoolKVCacheConfig,
    stock_grouping: Callable[..., Any],
    stock_configure: Callable[..., Any],
) -> None:
    """Log the groups, the geometry and the capacity of a served engine.

    Args:
        vllm_config: vLLM's configuration of the engine.
        config: the memory as planned.
        stock_grouping, stock_configure: vLLM's own planning functions, for the comparison.
    """
    plan = planning.plan_of(vllm_config)
    assert plan is not None
    groups = planning.core_groups(vllm_config, config.kv_cache_groups)
    ours = memory_of(vllm_config, config, config.arena_bytes)
    specs = {name: group.kv_cache_spec for group in config.kv_cache_groups for name in group.layer_names}
    stock: Memory | None = None
    # vLLM raises one of these where pages can't be made equal.
    with suppress(ValueError, NotImplementedError):
        stock_config = planning.stock_kv_cache_config(
            vllm_config, plan, specs, config.arena_bytes, stock_grouping, stock_configure
        )
        stock = _stock_memory_of(vllm_config, stock_config, config.arena_bytes)
    logger.info("%s", "\n".join(["tidepool serves this model.", *_groups(config, groups), *_capacity(ours, stock)]))


def memory_of(vllm_config: Any, config: KVCacheConfig, memory_bytes: int) -> Memory:
    """An engine's KV memory in the planner's terms, whoever planned it.

    Args:
        vllm_config: vLLM's configuration of the engine.
        config: the memory as planned.
        memory_bytes: what it was planned for.
    """
    if not isinstance(config, planning.TidepoolKVCacheConfig):
        return _stock_memory_of(vllm_config, config, memory_bytes)
    groups = planning.core_groups(vllm_config, config.kv_cache_groups)
    limits = (vllm_config.scheduler_config.max_num_seqs, vllm_config.model_config.max_model_len)
    return predict(groups, config.arena_bytes, config.partition, *limits)


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
        blocks = config.geometry.cuts[index].slots if config.geometry else config.shares[index].blocks
        share = f"{blocks:,} block{'' if blocks == 1 else 's'}" + (" in an extent" if config.geometry else "")
        padding = 1 - group.block_bytes / config.strides[index]
        lines.append(
            f"  group {index}: {kind}; {len(group.layers)} layers x page of {group.page_bytes:,} B = block of "
            f"{group.block_bytes:,} B; {share}, padded by {padding:.2%}"
        )
    return lines


def _capacity(ours: Memory, stock: Memory | None) -> list[str]:
    most = ours.max_num_seqs
    lines = [
        f"  tokens beside 1 request: {_tokens(ours, 1)}",
        f"  tokens in {most:,} requests (max_num_seqs): {_tokens(ours, most)}",
        f"  requests of 100 tokens at once: {ours.requests_of(100):,}",
    ]
    if stock is None:
        return [*lines, "  vLLM alone: it can't make these pages equally large"]
    block = max(group.block_tokens for group in stock.groups if group.token_bytes)
    others = [
        f"vLLM alone, with blocks of {block:,} tokens in {len(stock.groups)} groups: {_tokens(stock, 1)}",
        f"vLLM alone: {_tokens(stock, most)}",
        f"vLLM alone: {stock.requests_of(100):,}",
    ]
    return [f"{line} ({other})" for line, other in zip(lines, others, strict=True)]


def _tokens(memory: Memory, requests: int) -> str:
    tokens = memory.tokens_with(requests)
    return f"{tokens:,}" if tokens else "they don't fit"

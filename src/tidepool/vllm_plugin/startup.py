"""The one log block at start: what this engine's memory looks like, and what vLLM alone would have had."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.logger import init_logger

from tidepool.vllm_plugin import planning

logger = init_logger("vllm.tidepool")


def log_start(
    vllm_config: Any,
    config: planning.TidepoolKVCacheConfig,
    stock_grouping: Callable[..., Any],
    stock_configure: Callable[..., Any],
) -> None:
    """Log the groups, the geometry and the capacity of a served engine."""
    logger.info("tidepool %s", config.partition)

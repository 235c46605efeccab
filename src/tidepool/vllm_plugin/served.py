"""Whose memory an engine really uses, for everything that compares: figures are called tidepool's if tidepool served.

An unsupported feature, a model without states or a plugin that vLLM didn't load leave an engine to vLLM, as they
should, and its figures would then be stock vLLM's under another name.
"""

from __future__ import annotations

import os
from typing import Any


class NotServedError(RuntimeError):
    """An engine uses another memory than the one that its figures would be called by; one sentence."""


def require_served(side: str, vllm_config: Any, kv_cache_config: Any) -> None:
    """Refuse an engine that isn't what it was started as.

    Args:
        side: ``stock``, ``elastic`` or ``fixed``.
        vllm_config: vLLM's configuration of the engine, in the process of its worker.
        kv_cache_config: its scheduler's KVCacheConfig.

    Raises:
        NotServedError: its memory is another one.
    """
    from tidepool.vllm_plugin.planning import TidepoolKVCacheConfig

    found = kv_cache_config.partition if isinstance(kv_cache_config, TidepoolKVCacheConfig) else "stock"
    if found == side:
        return
    if found != "stock":
        raise NotServedError(f"{side} was asked for, and the engine uses tidepool's {found} partition.")
    raise NotServedError(f"tidepool falls back to vLLM's own KV cache. {reason(vllm_config)}.")


def require_plugin() -> None:
    """Refuse a vLLM without tidepool, where a setting of tidepool's would be ignored.

    Raises:
        NotServedError: the plugin isn't loaded in this process.
    """
    if missing := _not_loaded():
        raise NotServedError(f"tidepool isn't there. {missing}.")


def reason(vllm_config: Any) -> str:
    """Why an engine that vLLM serves alone was left to it, as ``name: reason``."""
    from tidepool.vllm_plugin.gates import NO_STATES
    from tidepool.vllm_plugin.serving_plan import fallback_reason

    # Where nobody was asked, the model isn't a hybrid one.
    return _not_loaded() or fallback_reason(vllm_config) or NO_STATES


def _not_loaded() -> str | None:
    from tidepool.vllm_plugin import obstacle

    if cause := obstacle():
        return cause
    from tidepool.vllm_plugin.patches import is_installed

    if is_installed():
        return None
    if "tidepool" not in (named := os.environ.get("VLLM_PLUGINS", "tidepool")).split(","):
        return f"plugin: vLLM didn't load it, for VLLM_PLUGINS={named} doesn't name tidepool"
    return "plugin: vLLM didn't load it; is tidepool installed beside it?"

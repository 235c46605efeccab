"""Managers of real engine cores without a model, asked as the scheduler would: shared by tests of the plugin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def make_manager(engine: Any, **changes: Any) -> Any:
    """A KV cache manager of its own on an engine's memory."""
    from tidepool.vllm_plugin.coordinator import TidepoolKVCacheManager

    scheduler = engine.scheduler
    arguments = {
        "kv_cache_config": scheduler.kv_cache_config,
        "max_model_len": 4096,
        "scheduler_block_size": scheduler.block_size,
        "hash_block_size": scheduler.hash_block_size,
        "enable_caching": True,
        "enable_kv_cache_events": True,
    }
    return TidepoolKVCacheManager(**arguments | changes)


def make_request(engine: Any, name: str, tokens: Sequence[int], answer: int = 8) -> Any:
    """A request with this prompt, and an answer of so many tokens at most."""
    from vllm import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

    sampling = SamplingParams(max_tokens=answer)
    request = EngineCoreRequest(name, list(tokens), None, sampling, None, 0.0, None, None, None)
    return engine.preprocess_add_request(request)[0]


def ask_for(manager: Any, request: Any, tokens: int) -> Any:
    """As the scheduler does for the first tokens of a waiting request; None if it was refused."""
    hit, hit_tokens, _ = manager.get_computed_blocks(request)
    return manager.allocate_slots(request, tokens - hit_tokens, hit_tokens, hit, full_sequence_must_fit=True)

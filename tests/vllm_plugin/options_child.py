"""Starts engines without a model with options of vLLM's, one after the other; run by test_options.py.

For each option it writes what became of an engine: the error, or why tidepool fell back, or the lines of the log
that name the option and whatever a probe finds.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import pickle
import sys
from collections.abc import Callable
from typing import Any

from vllm.config import KVEventsConfig
from vllm.envs import disable_envs_cache

from tidepool.replay.engine import EngineShape, add_request, make_engine
from tidepool.replay.step import take_step
from tidepool.vllm_plugin.asked import asked_of
from tidepool.vllm_plugin.planning import TidepoolKVCacheConfig
from tidepool.vllm_plugin.served import reason

PATIENCE = 200
"""Steps after which requests that haven't ended never will."""
Probe = Callable[[Any], Any]


def blocks(engine: Any) -> dict[str, int]:
    """Tokens in the blocks of each group; of states, from one checkpoint to the next."""
    config = engine.scheduler.kv_cache_config
    specs = [group.kv_cache_spec for group in config.kv_cache_groups]
    spacing = getattr(config, "checkpoint_tokens", None)
    return {type(spec).__name__: (type(spec).__name__ == "MambaSpec" and spacing) or spec.block_size for spec in specs}


def state_bytes(engine: Any) -> int:
    specs = [group.kv_cache_spec for group in engine.scheduler.kv_cache_config.kv_cache_groups]
    return int(next(spec.page_size_bytes for spec in specs if type(spec).__name__ == "MambaSpec"))


def extents(engine: Any) -> int:
    return int(engine.scheduler.kv_cache_config.num_blocks)


def serve(engine: Any, lengths: list[int]) -> list[list[int]]:
    """Tokens of each request in each step; they come at once and all have other prompts."""
    for number, length in enumerate(lengths):
        add_request(engine, str(number), [1_000 * number + place for place in range(length)], 4)
    steps: list[list[int]] = []
    while engine.scheduler.has_unfinished_requests():
        assert len(steps) < PATIENCE, "requests are left that aren't scheduled"
        steps.append(list(take_step(engine).output.num_scheduled_tokens.values()))
    return steps


def most_at_once(engine: Any) -> int:
    return max(len(step) for step in serve(engine, [20] * 12))


def most_in_a_step(engine: Any) -> int:
    return max(sum(step) for step in serve(engine, [900] * 3))


def longest_chunk(engine: Any) -> int:
    return max(max(step) for step in serve(engine, [3_000] * 3))


def forks(engine: Any) -> int:
    """Tokens that a prompt hits which parts from an earlier one of 3,000 tokens after 2,200."""
    serve(engine, [3_000])
    add_request(engine, "fork", [*range(2_200), *range(50_000, 50_100)], 4)
    return int(take_step(engine).output.scheduled_new_reqs[0].num_computed_tokens)


def events(engine: Any) -> list[str]:
    """Kinds of events that a reset makes."""
    serve(engine, [900])
    engine.scheduler.reset_prefix_cache()
    return [type(event).__name__ for event in engine.scheduler.kv_cache_manager.take_events()]


def asked_elsewhere(engine: Any) -> int | None:
    """The checkpoint spacing that another process of this engine knows to be asked for."""
    config = copy.copy(engine.vllm_config)
    config.compilation_config = copy.copy(config.compilation_config)
    config.compilation_config.static_forward_context = {}
    return asked_of(pickle.loads(pickle.dumps(config))).mamba_block_size


def done(engine: Any) -> bool:
    return bool(serve(engine, [900, 20, 3_000, 500]))


CASES: dict[str, tuple[dict[str, Any], Probe]] = {
    "nothing": ({}, lambda e: [blocks(e), state_bytes(e)]),
    "block_size": ({"block_size": 64}, blocks),
    "block_size, odd": ({"block_size": 24}, blocks),
    "mamba_block_size": ({"mamba_block_size": 256}, lambda e: [blocks(e), asked_elsewhere(e)]),
    "mamba_block_size, as the block": ({"mamba_block_size": 16}, blocks),
    "mamba_block_size, odd": ({"mamba_block_size": 250}, blocks),
    "mamba_block_size, twice": (
        {"mamba_block_size": 256, "additional_config": {"tidepool": {"checkpoint_tokens": 512}}},
        blocks,
    ),
    "mamba_block_size, agreed": (
        {"mamba_block_size": 256, "additional_config": {"tidepool": {"checkpoint_tokens": 256}}},
        blocks,
    ),
    "prefix_cache_retention_interval": (
        {"prefix_cache_retention_interval": 1_056, "max_num_batched_tokens": 1_200},
        lambda e: [blocks(e), forks(e)],
    ),
    "prefix_cache_retention_interval, dense": (
        {"prefix_cache_retention_interval": None, "max_num_batched_tokens": 1_200},
        lambda e: [blocks(e), forks(e)],
    ),
    "prefix_cache_retention_interval, odd": ({"prefix_cache_retention_interval": 1_000}, blocks),
    "prefix_cache_retention_interval, apart": (
        {"prefix_cache_retention_interval": 1_024, "mamba_block_size": 384},
        blocks,
    ),
    "prefix_match_unit": ({"prefix_match_unit": 16}, done),
    "enable_prefix_caching": ({"enable_prefix_caching": False}, forks),
    "prefix_caching_hash_algo": ({"prefix_caching_hash_algo": "sha256_cbor"}, done),
    "gpu_memory_utilization": ({"gpu_memory_utilization": 0.5}, done),
    "kv_cache_memory_bytes": ({"kv_cache_memory_bytes": 32 << 20}, done),
    "num_gpu_blocks_override": ({"num_gpu_blocks_override": 20}, extents),
    "kv_cache_dtype": ({"kv_cache_dtype": "fp8"}, done),
    "kv_cache_dtype_skip_layers": ({"kv_cache_dtype_skip_layers": ["3"]}, done),
    "kv_cache_dtype_skip_layers, kv": (
        {"kv_cache_dtype_skip_layers": ["3"], "additional_config": {"tidepool": {"kv": "tqkv-k4v4"}}},
        done,
    ),
    "mamba_cache_dtype": ({"mamba_cache_dtype": "float32"}, state_bytes),
    "mamba_ssm_cache_dtype": ({"mamba_ssm_cache_dtype": "bfloat16"}, state_bytes),
    "enable_mamba_shared_prefix_checkpoint": ({"enable_mamba_shared_prefix_checkpoint": True}, done),
    "replayssm_buffer_len": ({"replayssm_buffer_len": 32}, done),
    "swa_bounded_replay": ({"swa_bounded_replay": False}, done),
    "kv_offloading_size": ({"kv_offloading_size": 1.0}, done),
    "kv_offloading_backend": ({"kv_offloading_backend": "lmcache"}, done),
    "max_num_seqs": ({"max_num_seqs": 256}, done),
    "max_num_active_seqs": ({"max_num_active_seqs": 3}, most_at_once),
    "max_num_batched_tokens": ({"max_num_batched_tokens": 1_024}, most_in_a_step),
    "max_num_scheduled_tokens": ({"max_num_scheduled_tokens": 1_024}, most_in_a_step),
    "long_prefill_token_threshold": ({"long_prefill_token_threshold": 600}, longest_chunk),
    "long_prefill_token_threshold_adaptive": (
        {"long_prefill_token_threshold": 600, "long_prefill_token_threshold_adaptive": True},
        longest_chunk,
    ),
    "enable_chunked_prefill": ({"enable_chunked_prefill": False, "enable_prefix_caching": False}, longest_chunk),
    "scheduling_policy": ({"scheduling_policy": "priority"}, done),
    "scheduler_reserve_full_isl": ({"scheduler_reserve_full_isl": False}, done),
    "watermark": ({"watermark": 0.05}, done),
    "async_scheduling": ({"async_scheduling": True}, done),
    "scheduler_cls": ({"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, done),
    "disable_chunked_mm_input": ({"disable_chunked_mm_input": True}, done),
    "prefill_schedule_interval": ({"prefill_schedule_interval": 2}, done),
    "max_model_len": ({"max_model_len": -1}, done),
    "kv_events_config": ({"kv_events_config": KVEventsConfig(enable_kv_cache_events=True, publisher="null")}, events),
    "kv_cache_metrics": ({"kv_cache_metrics": True}, done),
    "kv_cache_metrics_sample": ({"kv_cache_metrics_sample": 0.5}, done),
    "data_parallel_size": ({"data_parallel_size": 2}, done),
    "cp_kv_cache_interleave_size": ({"cp_kv_cache_interleave_size": 4}, done),
    "dcp_kv_cache_interleave_size": ({"dcp_kv_cache_interleave_size": 4}, done),
    "VLLM_KV_CACHE_LAYOUT": ({"VLLM_KV_CACHE_LAYOUT": "BLHNC"}, done),
    "VLLM_KV_CACHE_LAYOUT, odd": ({"VLLM_KV_CACHE_LAYOUT": "BHLNC"}, done),
    "VLLM_SSM_CONV_STATE_LAYOUT": ({"VLLM_SSM_CONV_STATE_LAYOUT": "DS"}, done),
}


def main() -> None:
    work = json.load(sys.stdin)
    log: list[str] = []

    def note(record: logging.LogRecord) -> bool:
        log.append(record.getMessage())
        return True

    logging.getLogger("vllm.tidepool").addFilter(note)
    found: dict[str, dict[str, Any]] = {}
    for name, (given, probe) in CASES.items():
        log.clear()
        environ = {key: value for key, value in given.items() if key.startswith("VLLM_")}
        options = {key: value for key, value in given.items() if key not in environ}
        disable_envs_cache()
        os.environ |= environ
        shape = EngineShape(work["config"], 64 << 20, "elastic", max_num_seqs=16, max_model_len=4_096, options=options)
        try:
            engine = make_engine(shape)
        except (ValueError, AssertionError) as error:
            found[name] = {"refused": str(error)}
        else:
            if isinstance(engine.scheduler.kv_cache_config, TidepoolKVCacheConfig):
                option = name.partition(",")[0]
                lines = [line.strip() for text in log for line in text.splitlines() if line.strip().startswith(option)]
                found[name] = {"served": probe(engine), "log": lines}
            else:
                found[name] = {"gate": reason(engine.vllm_config).partition(":")[0]}
        for key in environ:
            del os.environ[key]
    with open(work["answer"], "w", encoding="utf-8") as file:
        json.dump(found, file)


main()

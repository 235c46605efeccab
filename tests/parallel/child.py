"""Serves batches with real vLLM over several workers; run by test_parallel.py.

Reads a list of engines to start, one after the other, on standard input, and writes what each answered and allocated
to the file named in it.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import quick_kernels
from asking import ask
from tidepool.running.engine import core_of


def main() -> None:
    job: dict[str, Any] = json.load(sys.stdin)
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    quick_kernels.install()
    note_copies()
    results = {name: run(job, shape) for name, shape in job["engines"].items()}
    with open(job["answer"], "w", encoding="utf-8") as file:
        json.dump(results, file)


def run(job: dict[str, Any], shape: dict[str, Any]) -> dict[str, Any]:
    os.environ["TIDEPOOL"] = shape["side"]
    os.environ["TIDEPOOL_POISON"] = "1" if shape.get("poison") else "0"
    os.environ.pop("VLLM_PP_LAYER_PARTITION", None)
    if "layers" in shape:
        os.environ["VLLM_PP_LAYER_PARTITION"] = shape["layers"]
    from vllm import LLM

    llm = LLM(
        model=job["model"],
        max_model_len=2048,
        max_num_seqs=shape.get("max_num_seqs", 64),
        kv_cache_memory_bytes=shape["kv_bytes"],
        tensor_parallel_size=shape.get("tp", 1),
        pipeline_parallel_size=shape.get("pp", 1),
        distributed_executor_backend="mp",
        # Prompts are never layout, so that every engine computes the same chunks.
        max_num_batched_tokens=65_536,
        enable_prefix_caching=shape.get("caching", False),
        kv_offloading_size=shape.get("host_gib"),
        enforce_eager=True,
        seed=0,
        disable_log_stats=False,
    )
    core = core_of(llm.llm_engine)
    host = getattr(core.scheduler.kv_cache_manager, "host", None)
    if host:
        # Whatever this machine's speeds are.
        host.speeds.worth_loading = lambda *_: True
    result: dict[str, Any] = {"in_flight": core.batch_queue_size}
    for workload in shape["workloads"]:
        result[workload] = ask(llm, **job["workloads"][workload])
    metrics = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    result["preemptions"] = metrics["vllm:num_preemptions"]
    while host and host.busy:
        llm.llm_engine.step()
    if host:
        result |= {
            "traffic": vars(host.traffic),
            "host_in_use_at_end": host.tier.arena.usage().in_use,
            "copies": core.model_executor.collective_rpc(copies_made),
        }
    if arena := getattr(core.scheduler.kv_cache_manager.block_pool, "arena", None):
        config = core.scheduler.kv_cache_config
        result |= {
            "extents": config.num_blocks,
            "blocks": [
                (config.num_blocks - 1 if config.geometry else 1)
                * (layout.blocks_per_extent if config.geometry else layout.blocks)
                for layout in (config.geometry.layouts if config.geometry else config.shares)
            ],
            "told": core.vllm_config.cache_config.num_gpu_blocks * core.vllm_config.cache_config.block_size,
            "moves": arena.moves,
            "in_use_at_end": arena.usage().in_use,
            "ranks": core.model_executor.collective_rpc(check_rank),
        }
    llm.llm_engine.engine_core.shutdown()
    return result


def note_copies() -> None:
    """Have this process and those that it starts remember the copies that they make from and to the host."""
    from tidepool.vllm_plugin.host_copies import HostBytes

    pieces = HostBytes.pieces

    def noted(self: HostBytes, copy: Any) -> Any:
        vars(self).setdefault("made", []).append([copy.number, copy.to_host, sorted(copy.blocks)])
        yield from pieces(self, copy)

    HostBytes.pieces = noted  # type: ignore[method-assign]


def copies_made(worker: Any) -> list[Any]:
    """On a worker: what it has copied from and to the host."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return list(get_kv_transfer_group()._memory.made)


def check_rank(worker: Any) -> dict[str, Any]:
    """On a worker: what it allocated, and whether zeroing, poisoning and copying hit what its layers see, no more."""
    import torch

    from tidepool.vllm_plugin.worker import arena_bytes_of, encode, encode_poison

    runner = worker.model_runner
    config, arena = runner.kv_cache_config, arena_bytes_of(runner)
    assert arena is not None
    groups = len(config.kv_cache_groups)
    layers = runner.compilation_config.static_forward_context
    hits = []
    for index, group in enumerate(config.kv_cache_groups):
        first = config.shares[index].first if config.shares else 2 * config.geometry.layouts[index].blocks_per_extent
        source, target = first, first + 1
        views = [view for name in group.layer_names for view in tensors(layers[name].kv_cache)]
        for block, value in ((source, 1), (target, 2)):
            for view in views:
                view[block].fill_(value)
        arena.apply([encode_poison(index, source, groups)])
        poisoned = all(bool((view[source] != 1).all()) for view in views)
        kept = all(bool((view[target] == 2).all()) for view in views)
        arena.copy([(encode(index, source, groups), encode(index, target, groups))])
        bits = [
            (view[source].reshape(-1).view(torch.uint8), view[target].reshape(-1).view(torch.uint8)) for view in views
        ]
        copied = all(bool((a == b).all()) for a, b in bits)
        arena.apply([encode(index, source, groups)])
        zeroed = all(bool((view[source] == 0).all()) for view in views)
        left = all(bool((view[target] != 0).all()) for view in views)
        hits.append([poisoned, kept, copied, zeroed, left])
    return {
        "layers": [len(group.layer_names) for group in config.kv_cache_groups],
        "extents": config.num_blocks,
        "pool_blocks": list(config.pool_blocks),
        "arena_bytes": config.arena_bytes,
        "allocated": runner.kv_caches[0].untyped_storage().nbytes() if runner.kv_caches else 0,
        "max_num_seqs": runner.vllm_config.scheduler_config.max_num_seqs,
        "hits": hits,
    }


def tensors(cache: Any) -> list[Any]:
    """A layer's cache as a list of tensors, blocks first: one for attention, several for a state."""
    return list(cache) if isinstance(cache, list | tuple) else [cache]


if __name__ == "__main__":
    main()
else:  # a worker imports this file
    quick_kernels.install()
    note_copies()

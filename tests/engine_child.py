"""An engine of real vLLM in a process of its own; started by engines.py.

Reads a job on standard input, writes the result to the file named in it, both JSON.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from itertools import pairwise
from typing import Any

import quick_kernels
from asking import ask
from tidepool.running.engine import core_of
from tidepool.sides import switch


def main() -> None:
    job: dict[str, Any] = json.load(sys.stdin)
    os.environ |= {
        **switch(job["side"]),
        "TIDEPOOL_POISON": "1" if job["poison"] else "0",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    from vllm import LLM

    quick_kernels.install()
    if job["fault"]:
        FAULTS[job["fault"]]()
    packed = count_packed()
    llm = LLM(
        model=job["model"],
        max_num_seqs=job["max_num_seqs"],
        kv_cache_memory_bytes=job["kv_bytes"],
        # Prompts are never cut, so that every side computes the same chunks.
        max_num_batched_tokens=65_536,
        enable_prefix_caching=job["prefix_caching"],
        enforce_eager=True,
        seed=0,
        disable_log_stats=False,
        **{"max_model_len": 2048} | job["engine"],
    )
    scheduler = core_of(llm.llm_engine).scheduler
    held = watch(scheduler) if job["watch"] else {}
    drafts = [spec_counts(llm)]
    result: dict[str, Any] = {"answers": [], "cached": []}
    for _ in range(job["rounds"]):
        for key, values in ask(llm, job["prompts"], output_tokens=job["output_tokens"]).items():
            result[key] += values
        drafts.append(spec_counts(llm))
    pool = scheduler.kv_cache_manager.block_pool
    arena, retention = getattr(pool, "arena", None), getattr(pool, "retention", None)
    result |= held | {
        "cached_tokens": sum(result["cached"]),
        "drafted": drafts[-1][0],
        "accepted": drafts[-1][1],
        "accepted_share": [(after[1] - before[1]) / max(after[0] - before[0], 1) for before, after in pairwise(drafts)],
        "preemptions": metrics_of(llm)["vllm:num_preemptions"],
        "served": arena is not None,
        "moves": arena.moves if arena else 0,
        "given_up": retention.given_up if retention else 0,
        "extents": scheduler.kv_cache_config.num_blocks,
        "pool_blocks": [each.num_gpu_blocks for each in pool.pools] if arena else [],
        **packed,
        "in_use_at_end": arena.usage().in_use if arena else 0,
    }
    with open(job["answer"], "w", encoding="utf-8") as file:
        json.dump(result, file)


def metrics_of(llm: Any) -> dict[str, float]:
    """vLLM's counters by name."""
    return {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}


def spec_counts(llm: Any) -> tuple[float, float]:
    """Tokens drafted and accepted so far."""
    metrics = metrics_of(llm)
    drafted, accepted = (metrics.get(f"vllm:spec_decode_num_{kind}_tokens", 0) for kind in ("draft", "accepted"))
    return drafted, accepted


def watch(scheduler: Any) -> dict[str, Any]:
    """Look at the blocks of running requests after each step is scheduled.

    Returns:
        Filled as steps go by. ``states``: how often a request held so many states; ``wrong_attention``: where a request
        held more or fewer blocks of attention than its tokens take; ``unaccounted``: steps in which a pool had another
        number of blocks in use than the requests held.
    """
    from vllm.v1.core.single_type_kv_cache_manager import MambaManager

    states: Counter[int] = Counter()
    result: dict[str, Any] = {"states": states, "wrong_attention": [], "unaccounted": []}
    most: dict[tuple[str, int], int] = {}
    schedule = scheduler.schedule

    def watched(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        for manager in scheduler.kv_cache_manager.coordinator.single_type_managers:
            blocks = {
                request.request_id: [b for b in manager.req_to_blocks[request.request_id] if not b.is_null]
                for request in scheduler.running
            }
            if isinstance(manager, MambaManager):
                states.update(map(len, blocks.values()))
            else:
                for request in scheduler.running:
                    key = request.request_id, request.num_preemptions
                    tokens = request.num_computed_tokens + scheduler.num_lookahead_tokens
                    most[key] = max(most.get(key, 0), min(tokens, scheduler.max_model_len))
                    got, due = len(blocks[request.request_id]), -(-most[key] // manager.block_size)
                    if got != due:
                        result["wrong_attention"].append([got, due])
            pool = getattr(manager.block_pool, "arena", None)
            if pool:
                in_use = pool.pools[manager.block_pool.group].in_use
                due = len({block.block_id for each in blocks.values() for block in each})
                if in_use != due:
                    result["unaccounted"].append([manager.kv_cache_group_id, in_use, due])
        return output

    scheduler.schedule = watched
    return result


def drop_state_copies() -> None:
    """The deliberate fault: a request that resumes at a shared state gets a block with something else in it."""
    from tidepool.vllm_plugin.worker import ArenaBytes

    def copy(self: ArenaBytes, copies: Any) -> None:
        pass

    ArenaBytes.copy = copy  # type: ignore[method-assign]


def accept_nothing() -> None:
    """The deliberate fault: every step goes on from the state of the last step's first token."""
    from tidepool.vllm_plugin import rollback

    step = rollback.gdn_draft_step

    def gdn_draft_step(layer: Any, metadata: Any, *args: Any) -> Any:
        metadata.num_accepted_tokens.fill_(1)
        return step(layer, metadata, *args)

    rollback.gdn_draft_step = gdn_draft_step  # type: ignore[assignment]


def pack_wrong() -> None:
    """The deliberate fault: a packed state has its rows in another order."""
    from tidepool.vllm_plugin.state_parts import StatePacker

    pack = StatePacker.pack

    def wrong(self: StatePacker, state: Any, packed: Any) -> None:
        pack(self, state, packed)
        packed.copy_(packed.flip(0))

    StatePacker.pack = wrong  # type: ignore[method-assign]


def unpack_nothing() -> None:
    """The deliberate fault: a request goes on from what its block held before."""
    from tidepool.vllm_plugin.state_parts import StatePacker

    StatePacker.unpack = lambda self, packed, state: None  # type: ignore[method-assign]


def count_packed() -> dict[str, int]:
    """How many states were packed and unpacked; counted as the engine runs."""
    from tidepool.vllm_plugin.state_parts import StatePacker

    counts = {"packed": 0, "unpacked": 0}
    pack, unpack = StatePacker.pack, StatePacker.unpack

    def counted_pack(self: StatePacker, state: Any, packed: Any) -> None:
        counts["packed"] += 1
        pack(self, state, packed)

    def counted_unpack(self: StatePacker, packed: Any, state: Any) -> None:
        counts["unpacked"] += 1
        unpack(self, packed, state)

    StatePacker.pack, StatePacker.unpack = counted_pack, counted_unpack  # type: ignore[method-assign]
    return counts


FAULTS = {
    "state copies dropped": drop_state_copies,
    "drafts not rolled on": accept_nothing,
    "states packed wrong": pack_wrong,
    "states not unpacked": unpack_nothing,
}


if __name__ == "__main__":
    main()
else:  # a worker imports this file
    quick_kernels.install()

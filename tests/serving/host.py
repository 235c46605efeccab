"""Chats that come back through real vLLM with a small device cache and host memory behind it; run by test_host.py.

Reads a job on standard input. Writes answers and what was copied to the file that the job names.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from typing import Any

import quick_kernels
from asking import ask

SYSTEM, ADDED, ANSWER, TURNS = 150, 300, 12, 4


def swapped() -> None:
    """The deliberate fault: what is loaded has its bytes in another order."""
    from tidepool.vllm_plugin.host_copies import HostBytes

    pieces = HostBytes.pieces

    def wrong(self: HostBytes, copy: Any) -> Any:
        for target, source in pieces(self, copy):
            yield target, source if copy.to_host else source.flip(-1)

    HostBytes.pieces = wrong  # type: ignore[method-assign]


def dropped() -> None:
    """The deliberate fault: what is loaded stays what it was."""
    from tidepool.vllm_plugin.host_copies import HostBytes

    pieces = HostBytes.pieces
    HostBytes.pieces = lambda self, copy: pieces(self, copy) if copy.to_host else iter(())  # type: ignore[method-assign]


def slow() -> None:
    """Copies take a while, so that steps, ends and preemptions fall into them."""
    from tidepool.vllm_plugin.host_copies import HostBytes

    pieces = HostBytes.pieces

    def late(self: HostBytes, copy: Any) -> Any:
        time.sleep(0.02)
        yield from pieces(self, copy)

    HostBytes.pieces = late  # type: ignore[method-assign]


def count_poisoned() -> list[tuple[int, int]]:
    """The host's blocks that have nothing but poison in them once they were poisoned; filled as the engine runs."""
    from tidepool.vllm_plugin.host_copies import HostBytes

    poison, found = HostBytes.poison, list[tuple[int, int]]()

    def noted(self: HostBytes, blocks: Any) -> None:
        poison(self, blocks)
        for group, block in blocks:
            start = block * self.strides[group]
            contents = self.bytes[start : start + self.device.block_bytes[group]]
            if bool((contents == self.device.poison[group]).all()):
                found.append((group, block))

    HostBytes.poison = noted  # type: ignore[method-assign]
    return found


def main() -> None:
    job = json.load(sys.stdin)
    os.environ |= {
        "TIDEPOOL": "elastic",
        "TIDEPOOL_POISON": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    from vllm import LLM

    from tidepool.running.engine import core_of

    quick_kernels.install()
    poisoned = count_poisoned()
    if job["fault"]:
        {"swapped": swapped, "dropped": dropped}[job["fault"]]()
    if job["slow"]:
        slow()
    llm = LLM(
        model=job["model"],
        max_model_len=4096,
        max_num_seqs=4,
        max_num_batched_tokens=512,
        # States at the ends of steps, whatever was learned so far.
        prefix_cache_retention_interval=256,
        kv_cache_memory_bytes=job["kv_bytes"],
        kv_offloading_size=job["host_gib"],
        enable_prefix_caching=True,
        enforce_eager=True,
        seed=0,
        **job["engine"],
    )
    scheduler = core_of(llm.llm_engine).scheduler
    manager = scheduler.kv_cache_manager
    if manager.host:
        # Whatever this machine's speeds are.
        manager.host.speeds.worth_loading = lambda *args: True
    rng = random.Random(0)

    def some(count: int) -> list[int]:
        return [rng.randrange(5, 500) for _ in range(count)]

    system = some(SYSTEM)
    chats = [system + some(ADDED) for _ in range(job["chats"])]
    added = [[some(ADDED) for _ in chats] for _ in range(TURNS)]
    answers: list[Any] = []
    cached = 0
    for turn in range(TURNS):
        found = ask(llm, chats, output_tokens=ANSWER)
        cached += sum(found["cached"])
        answers += found["answers"]
        # The same continuation on every side, whatever was answered.
        chats = [chat + more for chat, more in zip(chats, added[turn], strict=True)]
    result: dict[str, Any] = {"answers": answers, "cached": cached, "served": hasattr(manager.block_pool, "arena")}
    if manager.host:
        host = manager.host
        while host.busy:
            llm.llm_engine.step()
        result |= {
            "traffic": vars(host.traffic),
            "held": len(host.tier),
            "in_use": manager.block_pool.arena.usage().in_use,
            "host_in_use": host.tier.arena.usage().in_use,
            "poisoned": len(poisoned),
        }
    with open(job["answer"], "w", encoding="utf-8") as file:
        json.dump(result, file)


main()

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
SHORT = 270
"""Tokens of a prompt that has its last checkpoint shortly before its end."""


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


def slow(seconds: float) -> None:
    """Copies take a while, so that steps, ends and preemptions fall into them."""
    from tidepool.vllm_plugin.host_copies import HostBytes

    pieces = HostBytes.pieces

    def late(self: HostBytes, copy: Any) -> Any:
        time.sleep(seconds)
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
        slow(job["slow"])
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
    result = new_weights(llm, job) if job["reset"] else conversations(llm, job)
    result["served"] = hasattr(manager.block_pool, "arena")
    if manager.host:
        settle(llm)
        host = manager.host
        result |= {
            "traffic": vars(host.traffic),
            "held": len(host.tier),
            "in_use": manager.block_pool.arena.usage().in_use,
            "host_in_use": host.tier.arena.usage().in_use,
            "poisoned": len(poisoned),
        }
    with open(job["answer"], "w", encoding="utf-8") as file:
        json.dump(result, file)


def prompts(chats: int) -> tuple[list[list[int]], list[list[list[int]]]]:
    """First prompts of some chats, and by turn what is added to each."""
    rng = random.Random(0)

    def some(count: int) -> list[int]:
        return [rng.randrange(5, 500) for _ in range(count)]

    system = some(SYSTEM)
    return [system + some(ADDED) for _ in range(chats)], [[some(ADDED) for _ in range(chats)] for _ in range(TURNS)]


def conversations(llm: Any, job: dict[str, Any]) -> dict[str, Any]:
    """All turns of all chats."""
    answers: list[Any] = []
    cached = 0
    chats, added = prompts(job["chats"])
    for more in added:
        found = ask(llm, chats, output_tokens=ANSWER)
        cached += sum(found["cached"])
        answers += found["answers"]
        # The same continuation on every side, whatever was answered.
        chats = [chat + each for chat, each in zip(chats, more, strict=True)]
    return {"answers": answers, "cached": cached}


def new_weights(llm: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Weights change while copies of both directions are under way, and the cache is reset or the engine sleeps.

    Afterwards everything is asked twice: once at once, and once when nothing is cached anywhere.
    """
    from vllm import SamplingParams

    from tidepool.running.engine import core_of

    engine = llm.llm_engine
    manager = core_of(engine).scheduler.kv_cache_manager
    host = manager.host
    long, _ = prompts(job["chats"])
    # Nearly all of each is loaded.
    chats, stored = [chat[:SHORT] for chat in long], [chat[::-1] for chat in long[-2:]]
    before = ask(llm, stored, output_tokens=ANSWER)["answers"]
    settle(llm)
    assert engine.reset_prefix_cache()
    ask(llm, chats, output_tokens=ANSWER)
    settle(llm)
    # What the device forgets is loaded.
    for pool in manager.block_pool.pools:
        pool.reset_prefix_cache()
    # One of the chats is being loaded when others have ended, and what they leave is being stored.
    sampling = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)
    for number, chat in enumerate(chats):
        engine.add_request(str(number), {"prompt_token_ids": chat}, sampling)
        while engine.has_unfinished_requests() and not host._loading:
            engine.step()
        if host._loading:
            break
    loaded = [list(load.request.prompt_token_ids) for load in host._loading.values()]
    for number, prompt in enumerate(stored):
        engine.add_request(f"stored {number}", {"prompt_token_ids": prompt}, sampling)
    ended = 0
    while ended < len(stored) or not any(copy.to_host for copy, _ in host.tier._copies.values()):
        ended += sum(output.finished for output in engine.step())
    under_way = [copy.to_host for copy, _ in host.tier._copies.values()]
    if job["reset"] == "sleep":
        engine.sleep(1, "keep")
        engine.wake_up()
        done = True
    else:
        done = engine.reset_prefix_cache(reset_running_requests=True)
    held = len(host.tier)
    llm.apply_model(other_words)
    while engine.has_unfinished_requests() or host.busy:
        engine.step()
    asked = stored + loaded
    answers = ask(llm, asked, output_tokens=ANSWER)["answers"]
    settle(llm)
    assert engine.reset_prefix_cache()
    fresh = ask(llm, asked, output_tokens=ANSWER)["answers"]
    return {"before": before, "answers": answers, "fresh": fresh, "under_way": under_way, "done": done, "kept": held}


def other_words(model: Any) -> None:
    """New weights: every token means another."""
    for name, weights in model.named_parameters():
        if "embed_tokens" in name:
            weights.data.copy_(weights.data.roll(7, 0))
            return
    raise AssertionError("no embedding")


def settle(llm: Any) -> None:
    """Let all copies end."""
    from tidepool.running.engine import core_of

    host = core_of(llm.llm_engine).scheduler.kv_cache_manager.host
    while host.busy:
        llm.llm_engine.step()


main()

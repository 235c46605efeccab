"""Serves a batch with real vLLM in a process of its own; run by test_serving.py.

Reads a JSON request on standard input, writes a JSON answer to the file named in it.
"""

from __future__ import annotations

import json
import os
import random
import sys
from typing import Any


def main() -> None:
    job: dict[str, Any] = json.load(sys.stdin)
    os.environ |= {
        "TIDEPOOL": {"stock": "off"}.get(job["side"], job["side"]),
        "TIDEPOOL_POISON": "1" if job["poison"] else "0",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    from vllm import LLM, SamplingParams

    if job["corrupt"]:
        drop_state_copies()
    llm = LLM(
        model=job["model"],
        max_model_len=2048,
        max_num_seqs=job["max_num_seqs"],
        kv_cache_memory_bytes=job["kv_bytes"],
        # Prompts are never cut, so that every side computes the same chunks.
        max_num_batched_tokens=65_536,
        enable_prefix_caching=job["prefix_caching"],
        enforce_eager=True,
        seed=0,
        disable_log_stats=False,
        **job.get("engine", {}),
    )
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    answers = []
    sampling = SamplingParams(temperature=0, max_tokens=job["output_tokens"], ignore_eos=True, logprobs=20)
    cached = 0
    for _ in range(job["rounds"]):
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts(job)], sampling, use_tqdm=False)
        cached += sum(output.num_cached_tokens or 0 for output in outputs)
        for output in outputs:
            completion = output.outputs[0]
            logprobs = [{token: entry.logprob for token, entry in step.items()} for step in completion.logprobs]
            answers.append({"tokens": list(completion.token_ids), "logprobs": logprobs})
    arena = getattr(scheduler.kv_cache_manager.block_pool, "arena", None)
    preemptions = next(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")
    result = {
        "answers": answers,
        "preemptions": preemptions,
        "cached_tokens": cached,
        "served": arena is not None,
        "moves": arena.moves if arena else 0,
        "pool_blocks": [pool.num_gpu_blocks for pool in scheduler.kv_cache_manager.block_pool.pools] if arena else [],
        "in_use_at_end": arena.usage().in_use if arena else 0,
    }
    with open(job["answer"], "w", encoding="utf-8") as file:
        json.dump(result, file)


def prompts(job: dict[str, Any]) -> list[list[int]]:
    rng = random.Random(job["seed"])

    def some(count: int) -> list[int]:
        return [rng.randrange(5, 500) for _ in range(count)]

    shared = [some(length) for length in job["shared_lengths"]]
    return [
        (rng.choice(shared) if shared else []) + some(rng.choice(job["own_lengths"])) for _ in range(job["requests"])
    ]


def drop_state_copies() -> None:
    """The deliberate fault: a request that resumes at a shared state gets a block with something else in it."""
    from tidepool.vllm_plugin.worker import ArenaBytes

    def copy(self: ArenaBytes, copies: Any) -> None:
        pass

    ArenaBytes.copy = copy  # type: ignore[method-assign]


main()

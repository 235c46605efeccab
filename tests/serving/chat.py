"""Chats of several turns through real vLLM in a process of its own, under poison; run by test_chat.py.

Reads a job on standard input. Writes the prompts in the order in which they were asked, and what `ask` says of them, to
the file that the job names.
"""

from __future__ import annotations

import json
import os
import random
import sys
from typing import Any

import quick_kernels
from asking import ask


def main() -> None:
    job = json.load(sys.stdin)
    os.environ |= {"TIDEPOOL": "elastic", "TIDEPOOL_POISON": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    from vllm import LLM

    quick_kernels.install()

    llm = LLM(
        model=job["model"],
        max_model_len=2048,
        max_num_seqs=8,
        kv_cache_memory_bytes=job["kv_bytes"],
        enable_prefix_caching=True,
        enforce_eager=True,
        seed=0,
    )
    rng = random.Random(0)

    def some(count: int) -> list[int]:
        return [rng.randrange(5, 500) for _ in range(count)]

    system = some(job["system"])
    chats = [system + some(job["added"]) for _ in range(job["chats"])]
    result: dict[str, Any] = {"prompts": [], "answers": [], "cached": []}
    for _ in range(job["turns"]):
        said = ask(llm, chats, output_tokens=job["answer_tokens"])
        result["prompts"] += chats
        for key, values in said.items():
            result[key] += values
        chats = [[*chat, *answer["tokens"]] for chat, answer in zip(chats, said["answers"], strict=True)]
        if job["regenerated"]:
            # The template leaves the answer out, as it does with what a model thinks.
            chats = [chat[: -job["answer_tokens"]] for chat in chats]
        chats = [chat + some(job["added"]) for chat in chats]
    with open(job["answer"], "w", encoding="utf-8") as file:
        json.dump(result, file)


main()

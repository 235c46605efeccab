"""Chats of several turns through real vLLM in a process of its own; run by test_chat.py.

Reads a job on standard input. Writes, for each turn, the tokens that its prompts took from the prefix cache and those
that they shared with the turn before, to the file that the job names.
"""

from __future__ import annotations

import json
import os
import random
import sys

import quick_kernels

SYSTEM, ADDED, ANSWER, TURNS, CHATS = 200, 60, 24, 6, 4


def main() -> None:
    job = json.load(sys.stdin)
    os.environ |= {"TIDEPOOL": job["side"], "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    from vllm import LLM, SamplingParams

    quick_kernels.install()

    llm = LLM(
        model=job["model"],
        max_model_len=2048,
        max_num_seqs=8,
        kv_cache_memory_bytes=120_000_000,
        enable_prefix_caching=True,
        enforce_eager=True,
        seed=0,
    )
    rng = random.Random(0)

    def some(count: int) -> list[int]:
        return [rng.randrange(5, 500) for _ in range(count)]

    system = some(SYSTEM)
    chats = [system + some(ADDED) for _ in range(CHATS)]
    shared = [0] * CHATS
    turns = []
    for _ in range(TURNS):
        outputs = llm.generate(
            [{"prompt_token_ids": chat} for chat in chats],
            SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True),
            use_tqdm=False,
        )
        turns.append([sum(output.num_cached_tokens or 0 for output in outputs), sum(shared)])
        chats = [[*chat, *output.outputs[0].token_ids] for chat, output in zip(chats, outputs, strict=True)]
        # The last token of an answer was never read by the model.
        shared = [len(chat) - 1 for chat in chats]
        chats = [chat + some(ADDED) for chat in chats]
    with open(job["answer"], "w", encoding="utf-8") as file:
        json.dump(turns, file)


main()

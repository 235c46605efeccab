"""Asks two data parallel engines of real vLLM; run by test_engines.py."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

import quick_kernels
from tidepool.verify.task import ANSWER_TOKENS, MODEL, make_prompts

LENGTH = 600
"""Tokens of a story."""


async def main(job: dict[str, Any]) -> None:
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    llm = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=str(MODEL),
            data_parallel_size=2,
            max_model_len=1024,
            max_num_seqs=4,
            kv_cache_memory_bytes=40_000_000,
            enable_prefix_caching=True,
            enforce_eager=True,
        )
    )
    prompts = make_prompts(5, length=LENGTH, stories=2, questions=1)
    sampling = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS, ignore_eos=True, detokenize=False)
    wrong: list[str] = []

    async def ask(name: str, prompt: Any, rank: int) -> int:
        async for output in llm.generate({"prompt_token_ids": prompt.tokens}, sampling, name, data_parallel_rank=rank):
            last = output
        if not prompt.question.is_right(list(last.outputs[0].token_ids)):
            wrong.append(name)
        return last.num_cached_tokens or 0

    cached = []
    for turn, rank in enumerate(job["ranks"]):
        asked = [ask(f"{turn}-{number}", prompt, rank) for number, prompt in enumerate(prompts)]
        cached.append(sum(await asyncio.gather(*asked)))
    llm.shutdown()
    with open(job["answer"], "w", encoding="utf-8") as file:
        json.dump({"cached": cached, "wrong": wrong}, file)


if __name__ == "__main__":
    os.environ["TIDEPOOL"] = "elastic"
    asyncio.run(main(json.load(sys.stdin)))
else:  # an engine core or a worker imports this file
    quick_kernels.install()

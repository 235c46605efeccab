"""Prompts for tiny models, and what an engine in this process answers to them."""

from __future__ import annotations

import random
from typing import Any


def make_prompts(workload: dict[str, Any]) -> list[list[int]]:
    """Random prompts: each one of the workload's ``shared_lengths``, if any, and one of its ``own_lengths``."""
    rng = random.Random(3)

    def some(count: int) -> list[int]:
        return [rng.randrange(5, 500) for _ in range(count)]

    shared = [some(length) for length in workload["shared_lengths"]]
    return [
        (rng.choice(shared) if shared else []) + some(rng.choice(workload["own_lengths"]))
        for _ in range(workload["requests"])
    ]


def ask(
    llm: Any, prompts: list[list[int]], *, output_tokens: int, rounds: int = 1, adapter: Any = None
) -> dict[str, list[Any]]:
    """Ask everything at once, as often as ``rounds`` says; of a LoRA adapter, if one is given.

    Returns:
        ``answers`` as in answers.py, and ``cached``: for each, the tokens of its prompt that were found in the cache.
    """
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=output_tokens, ignore_eos=True, detokenize=False, logprobs=20)
    answers = []
    cached: list[int] = []
    for _ in range(rounds):
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], sampling, lora_request=adapter, use_tqdm=False
        )
        cached += [output.num_cached_tokens or 0 for output in outputs]
        for output in outputs:
            completion = output.outputs[0]
            logprobs = [{token: entry.logprob for token, entry in step.items()} for step in completion.logprobs]
            answers.append({"tokens": list(completion.token_ids), "logprobs": logprobs})
    return {"answers": answers, "cached": cached}

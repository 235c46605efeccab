"""One run of `tidepool verify MODEL`: real vLLM in a process of its own, as the user starts it."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from tidepool.running.agreement import ALTERNATIVES
from tidepool.running.child import ALIVE, Answer, run
from tidepool.running.engine import (
    add_request,
    core_of,
    engine_arguments,
    likeliest,
    preemptions_of,
    start_engine,
)
from tidepool.verify.own_model import Job, Made
from tidepool.verify.task import make_prompts, to_text

LENGTHS = ((200, 2, 4), (60, 4, 1))
"""Words of a text, how many such texts, and questions about each."""
OUTPUT_TOKENS = 32
ROUNDS = 2
"""So that prompts come again; states are found by the second time."""
STEPS = 10
"""Of one number of requests, from which on their median time counts."""


def main() -> None:
    """Run one job."""
    run(_run)


def _run(messages: Iterator[dict[str, Any]], answer: Answer) -> None:
    job = Job(**next(messages))
    given = engine_arguments(job.options, model=job.model)
    wanted: dict[str, Any] = {
        "model": job.model,
        "seed": given.seed or 0,
        "enforce_eager": given.enforce_eager,
        "additional_config": _allowed(given.additional_config, job),
    }
    if job.kv_bytes:
        wanted |= {"kv_cache_memory_bytes": job.kv_bytes}
    if job.step_tokens:
        wanted |= {"max_num_batched_tokens": job.step_tokens}
    engine = start_engine(job.side, job.options, **wanted)
    core = core_of(engine)
    prompts = _prompts(engine)
    answers: list[list[int]] = []
    logprobs: list[list[dict[str, float]]] = []
    hit_tokens = preemptions = 0
    steps: dict[int, list[float]] = {}
    """By number of requests that decode, the seconds of steps."""
    for _ in range(ROUNDS):
        for number, prompt in enumerate(prompts):
            add_request(engine, str(number), prompt, OUTPUT_TOKENS, ALTERNATIVES)
        results: dict[str, Any] = {}
        preempted: dict[str, int] = {}
        while engine.has_unfinished_requests():
            began = time.perf_counter()
            finished = engine.step()
            seconds = time.perf_counter() - began
            answer(ALIVE)
            running = core.scheduler.running
            if running and not finished and all(r.num_output_tokens > 1 for r in running):
                steps.setdefault(len(running), []).append(seconds)
            preempted |= preemptions_of(core.scheduler)
            results |= {result.request_id: result for result in finished if result.finished}
        preemptions += sum(preempted.values())
        for number in range(len(prompts)):
            result = results[str(number)]
            hit_tokens += result.num_cached_tokens or 0
            answers.append(list(result.outputs[0].token_ids))
            logprobs.append(likeliest(result.outputs[0].logprobs))
    usual = max((number for number, times in steps.items() if len(times) >= STEPS), default=0)
    made = Made(
        answers=answers,
        logprobs=logprobs,
        kv_bytes=core.available_gpu_memory_for_kv_cache,
        other_step_tokens=_other_step_tokens(core.vllm_config, sum(map(len, prompts))),
        step_seconds=median(steps[usual]) if usual else None,
        hit_tokens=hit_tokens,
        preemptions=preemptions,
        in_use_at_end=core.scheduler.kv_cache_manager.block_pool.get_usage(),
    )
    answer(asdict(made))


def _allowed(additional_config: Any, job: Job) -> Any:
    """To find out whether a device works is what this command is for."""
    settings = dict(additional_config.get("tidepool", {}))
    if job.checkpoint_states and job.side == "elastic":
        settings["checkpoint_states"] = job.checkpoint_states
    allow = {*settings.get("allow", ()), "device", "drafts"}
    return {**additional_config, "tidepool": settings | {"allow": sorted(allow)}}


def _prompts(engine: Any) -> list[list[int]]:
    """Texts in the model's own tokens, or any tokens for a model without a tokenizer; some begin alike."""
    asked = [
        prompt.tokens
        for number, (words, stories, questions) in enumerate(LENGTHS)
        for prompt in make_prompts(31 + number, length=words, stories=stories, questions=questions)
    ]
    model_config = engine.vllm_config.model_config
    if model_config.skip_tokenizer_init:
        rng = random.Random(0)
        tokens = [rng.randrange(model_config.get_vocab_size() // 2, model_config.get_vocab_size()) for _ in range(999)]
        asked = [[tokens[word] for word in prompt] for prompt in asked]
    else:
        tokenizer = engine.get_tokenizer()
        asked = [tokenizer.encode(to_text(prompt)) for prompt in asked]
    longest = model_config.max_model_len - OUTPUT_TOKENS
    return [prompt[-longest:] for prompt in asked]


def _other_step_tokens(vllm_config: Any, prompt_tokens: int) -> int:
    """Fewer tokens in a step, so that prompts are cut in other places, as far as vLLM takes so few."""
    scheduler, cache = vllm_config.scheduler_config, vllm_config.cache_config
    fewest: Sequence[int] = (scheduler.max_num_seqs, cache.block_size, scheduler.max_num_batched_tokens // 4)
    third: int = min(scheduler.max_num_batched_tokens, prompt_tokens) // 3
    return max(third, *fewest)


if __name__ == "__main__":
    main()

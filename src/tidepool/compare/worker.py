"""One side of a comparison: real vLLM in a process of its own.

It is told a `Job`, then one command after the other, and answers each. The side is also what the environment variable
TIDEPOOL says; where the engine turns out to be another, that is an error.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from tidepool.compare.messages import Facts, Job, Run
from tidepool.compare.workloads import MAX_MODEL_LEN, Turn, Workload, make_conversations
from tidepool.running.agreement import ALTERNATIVES
from tidepool.running.child import ALIVE, Answer, run
from tidepool.running.engine import add_request, core_of, likeliest, preemptions_of, start_engine

BATCHED_TOKENS = 65536
"""Tokens of one step: all prompts at once, so that none is cut; where it is cut, bfloat16 rounds differently."""


def main() -> None:
    """Serve commands until there are no more."""
    run(_serve)


def _serve(messages: Iterator[dict[str, Any]], answer: Answer) -> None:
    job = Job(**next(messages))
    engine: Any = None
    started: list[Any] = []  # An engine that is collected takes vLLM's process-wide state with it.
    for command in messages:
        if command["do"] == "start":
            engine = start_engine(
                job.side,
                model=job.model,
                kv_cache_memory_bytes=job.kv_bytes,
                max_model_len=MAX_MODEL_LEN,
                max_num_seqs=command["max_num_seqs"],
                max_num_batched_tokens=BATCHED_TOKENS,
                enable_prefix_caching=command["caching"],
            )
            started.append(engine)
            answer(asdict(_facts(engine, job.kv_bytes)))
        else:
            workload = Workload(**command["workload"])
            conversations = make_conversations(workload, engine.model_config.get_vocab_size())
            answer(asdict(_run(engine, conversations, workload.at_once, lambda: answer(ALIVE))))


def _facts(engine: Any, kv_bytes: int) -> Facts:
    from vllm.v1.kv_cache_interface import MambaSpec

    from tidepool.vllm_plugin.planning import TidepoolKVCacheConfig
    from tidepool.vllm_plugin.startup import memory_of

    config = core_of(engine).scheduler.kv_cache_config
    memory = memory_of(engine.vllm_config, config, kv_bytes)
    state_bytes = 0
    for group in config.kv_cache_groups:
        spec = group.kv_cache_spec
        if isinstance(spec, MambaSpec):
            copies = spec.max_memory_usage_bytes(engine.vllm_config) // spec.page_size_bytes
            natural = replace(spec, page_size_padded=None).page_size_bytes
            state_bytes += copies * natural * len(group.layer_names)
    return Facts(
        served=isinstance(config, TidepoolKVCacheConfig),
        attention_block_tokens=memory.token_step or 0,
        groups=len(config.kv_cache_groups),
        capacity_tokens=memory.tokens_with(1) or 0,
        state_bytes=state_bytes,
        max_num_seqs=memory.max_num_seqs,
    )


def _run(engine: Any, conversations: Sequence[Sequence[Turn]], at_once: int | None, stepped: Callable[[], None]) -> Run:
    """Run all conversations, each turn as soon as the one before is answered; ``stepped`` is called after each step."""
    scheduler = core_of(engine).scheduler
    engine.reset_prefix_cache()
    waiting = deque(range(len(conversations)))
    outputs: dict[str, list[int]] = {}
    logprobs: dict[str, list[dict[str, float]]] = {}
    preemptions: dict[str, int] = {}
    prompt_tokens = hit_tokens = steps = peak = total = 0

    def ask(conversation: int, turn: int) -> None:
        nonlocal prompt_tokens
        request = conversations[conversation][turn]
        prompt_tokens += len(request.prompt)
        add_request(engine, f"{conversation}.{turn}", request.prompt, request.answer, ALTERNATIVES)

    began, cpu_began = time.perf_counter(), time.process_time()
    for _ in range(at_once or len(waiting)):
        ask(waiting.popleft(), 0)
    while engine.has_unfinished_requests():
        finished = engine.step()
        stepped()
        steps += 1
        # Requests that finished in this step held their memory during it.
        running = len(scheduler.running) + len(finished)
        peak, total = max(peak, running), total + running
        preemptions |= preemptions_of(scheduler)
        for result in finished:
            answer = result.outputs[0]
            outputs[result.request_id] = list(answer.token_ids)
            logprobs[result.request_id] = likeliest(answer.logprobs)
            hit_tokens += result.num_cached_tokens or 0
            conversation, turn = map(int, result.request_id.split("."))
            if turn + 1 < len(conversations[conversation]):
                ask(conversation, turn + 1)
            elif waiting:
                ask(waiting.popleft(), 0)
    return Run(
        seconds=time.perf_counter() - began,
        cpu_seconds=time.process_time() - cpu_began,
        steps=steps,
        peak_requests=peak,
        mean_requests=total / steps,
        preemptions=sum(preemptions.values()),
        prompt_tokens=prompt_tokens,
        hit_tokens=hit_tokens,
        output_tokens=sum(map(len, outputs.values())),
        outputs=outputs,
        logprobs=logprobs,
    )


if __name__ == "__main__":
    main()

"""One side of a comparison: real vLLM in a process of its own.

``python -m tidepool.compare.worker JOB SIDE`` reads its job from a file, then one JSON command a line from standard
input, and answers each with one JSON line on standard output. What vLLM prints goes to standard error. The side is also
what the environment variable TIDEPOOL says; where the engine turns out to be another, that is an error.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TextIO

from tidepool.compare.agreement import ALTERNATIVES
from tidepool.compare.messages import Facts, Job, Run
from tidepool.compare.workloads import MAX_MODEL_LEN, Turn, Workload, make_conversations

BATCHED_TOKENS = 65536
"""Tokens of one step: all prompts at once, so that none is cut; where it is cut, bfloat16 rounds differently."""


def main() -> None:
    """Serve commands until standard input ends."""
    # vLLM and its libraries print to standard output; the answers get a descriptor of their own.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    job = Job(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    try:
        _serve(job, sys.argv[2], sys.stdin, answers)
    except Exception as error:
        traceback.print_exc()
        kind = "" if type(error).__name__ == "NotServedError" else f"{type(error).__name__}: "
        message = " ".join(f"{kind}{error}".split())
        _answer(answers, {"error": message if len(message) <= 300 else message[:300] + "..."})
        sys.exit(1)


def _serve(job: Job, side: str, commands: TextIO, answers: TextIO) -> None:
    engine: Any = None
    started: list[Any] = []  # An engine that is collected takes vLLM's process-wide state with it.
    for line in commands:
        command = json.loads(line)
        if command["do"] == "start":
            engine = _start(job, side, command["caching"], command["max_num_seqs"])
            started.append(engine)
            _answer(answers, asdict(_facts(engine, job.kv_bytes)))
        else:
            workload = Workload(**command["workload"])
            conversations = make_conversations(workload, engine.model_config.get_vocab_size())
            _answer(answers, asdict(_run(engine, conversations, workload.at_once)))


def _answer(answers: TextIO, content: dict[str, Any]) -> None:
    answers.write(json.dumps(content) + "\n")
    answers.flush()


def _start(job: Job, side: str, caching: bool, max_num_seqs: int) -> Any:
    from vllm import EngineArgs, LLMEngine

    from tidepool.vllm_plugin.served import require_served

    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=job.model,
            seed=0,
            kv_cache_memory_bytes=job.kv_bytes,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=BATCHED_TOKENS,
            enable_prefix_caching=caching,
            enforce_eager=True,
            disable_log_stats=True,
        )
    )
    require_served(side, engine.vllm_config, _scheduler(engine).kv_cache_config)
    return engine


def _facts(engine: Any, kv_bytes: int) -> Facts:
    from vllm.v1.kv_cache_interface import MambaSpec

    from tidepool.vllm_plugin.planning import TidepoolKVCacheConfig
    from tidepool.vllm_plugin.startup import memory_of

    config = _scheduler(engine).kv_cache_config
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


def _run(engine: Any, conversations: Sequence[Sequence[Turn]], at_once: int | None) -> Run:
    """Run all conversations, each turn as soon as the one before it is answered."""
    scheduler = _scheduler(engine)
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
        prompt = {"prompt_token_ids": request.prompt}
        engine.add_request(f"{conversation}.{turn}", prompt, _sampling(request.answer))

    began, cpu_began = time.perf_counter(), time.process_time()
    for _ in range(at_once or len(waiting)):
        ask(waiting.popleft(), 0)
    while engine.has_unfinished_requests():
        finished = engine.step()
        steps += 1
        # Requests that finished in this step held their memory during it.
        running = len(scheduler.running) + len(finished)
        peak, total = max(peak, running), total + running
        preemptions |= {
            request.request_id: request.num_preemptions
            for request in scheduler.requests.values()
            if request.num_preemptions
        }
        for result in finished:
            answer = result.outputs[0]
            outputs[result.request_id] = list(answer.token_ids)
            logprobs[result.request_id] = [
                {str(token): entry.logprob for token, entry in likely.items()} for likely in answer.logprobs
            ]
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


def _sampling(tokens: int) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=0,
        max_tokens=tokens,
        ignore_eos=True,
        detokenize=False,
        logprobs=ALTERNATIVES,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _scheduler(engine: Any) -> Any:
    return engine.engine_core.engine_core.scheduler


if __name__ == "__main__":
    main()

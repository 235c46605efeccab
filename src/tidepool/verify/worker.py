"""One side of the verification: real vLLM in a process of its own.

``python -m tidepool.verify.worker SIDE PART...`` runs parts, named by `Part.key`, one after the other, each on an
engine of its own, and writes JSON lines to standard output: what it runs on, then an outcome for each part, and in
between `ALIVE` after each step of the engine. What vLLM prints goes to standard error.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict
from random import Random
from typing import Any

from tidepool.verify.messages import ALIVE, Counts, Machine, Outcome
from tidepool.verify.scenarios import MAX_NUM_SEQS, SCENARIOS, Scenario
from tidepool.verify.task import ANSWER_TOKENS, MODEL, Prompt

ABORT_STEPS = 4
"""Steps that a request to be aborted runs for at most: its prompt and all but the last token of its answer."""


def main() -> None:
    """Run the parts named on the command line."""
    # vLLM and its libraries print to standard output; the answers get a descriptor of their own.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

    def answer(content: dict[str, Any]) -> None:
        print(json.dumps(content), file=answers, flush=True)

    side, parts = sys.argv[1], sys.argv[2:]
    engines = []  # An engine that is collected takes vLLM's process-wide state with it.
    try:
        answer(asdict(_machine()))
        evictions = _EvictionCount()
        for part in parts:
            name, _, poison = part.partition("+")
            os.environ["TIDEPOOL_POISON"] = "1" if poison else "0"
            scenario, prompts = SCENARIOS[name], SCENARIOS[name].requests()
            os.environ["TIDEPOOL_OVERCOMMIT"] = "1" if "preemptions" in scenario.must else "0"
            engines.append(_start(side, scenario, prompts))
            answer(asdict(_run(engines[-1], scenario, prompts, evictions, lambda: answer(ALIVE))))
    except Exception as error:
        traceback.print_exc()
        kind = "" if type(error).__name__ == "NotServedError" else f"{type(error).__name__}: "
        answer({"error": " ".join(f"{kind}{error}".split()).rstrip(".")[:300]})
        sys.exit(1)


def _machine() -> Machine:
    import torch
    import vllm
    from vllm.platforms import current_platform

    cpu = f"{platform.machine()}, {os.cpu_count()} cores"
    return Machine(
        vllm=vllm.__version__,
        torch=torch.__version__,
        device=f"CPU ({cpu})" if current_platform.is_cpu() else current_platform.get_device_name(),
        gated=bool(_gates_to_open()) and not current_platform.is_cpu(),
    )


def _gates_to_open() -> list[str]:
    """To find out whether a device works is what this command is for."""
    from tidepool.vllm_plugin.gates import GATES

    return [gate.name for gate in GATES if gate.name == "device"]


def _start(side: str, scenario: Scenario, prompts: Sequence[Prompt]) -> Any:
    from vllm import EngineArgs, LLMEngine

    from tidepool.vllm_plugin.served import require_served

    allow = _gates_to_open()
    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=str(MODEL),
            seed=0,
            kv_cache_memory_bytes=scenario.kv_bytes,
            gpu_memory_utilization=0.1,
            max_model_len=max(len(prompt.tokens) for prompt in prompts) + ANSWER_TOKENS,
            max_num_seqs=scenario.fixed_seqs if side == "fixed" else MAX_NUM_SEQS,
            max_num_batched_tokens=scenario.step_tokens,
            long_prefill_token_threshold=scenario.chunk_tokens,
            enable_prefix_caching=scenario.caching,
            enforce_eager=True,
            disable_log_stats=True,
            additional_config={"tidepool": {"allow": allow}} if allow else {},
        )
    )
    require_served(side, engine.vllm_config, _scheduler(engine).kv_cache_config)
    return engine


def _run(
    engine: Any,
    scenario: Scenario,
    prompts: Sequence[Prompt],
    evictions: _EvictionCount,
    stepped: Callable[[], None],
) -> Outcome:
    """Ask everything, in order, with ``at_once`` requests under way; ``stepped`` is called after each step."""
    scheduler = _scheduler(engine)
    abort_after = _abort_times(scenario, len(prompts))
    waiting = deque(range(len(prompts)))
    ran: dict[int, int] = {}
    """Steps that each request under way has run for."""
    answers: dict[str, list[int]] = {}
    preempted: dict[str, int] = {}
    cut: set[str] = set()
    hit_tokens = aborted = 0
    evictions.count, began = 0, time.perf_counter()
    while waiting or ran:
        while waiting and len(ran) < scenario.at_once:
            number = waiting.popleft()
            _send(engine, number, prompts[number])
            ran[number] = 0
        for result in engine.step():
            if not result.finished:
                continue
            answers[result.request_id] = list(result.outputs[0].token_ids)
            hit_tokens += result.num_cached_tokens or 0
            del ran[int(result.request_id)]
        stepped()
        # Inside, vLLM adds a suffix to the name of a request.
        requests = {int(each.request_id.partition("-")[0]): each for each in scheduler.requests.values()}
        preempted |= {each.request_id: each.num_preemptions for each in requests.values() if each.num_preemptions}
        cut |= {e.request_id for e in scheduler.running if 0 < e.num_computed_tokens < e.num_prompt_tokens}
        for number in [number for number in ran if requests.get(number) in scheduler.running]:
            ran[number] += 1
            if ran[number] == abort_after.get(number):
                engine.abort_request([str(number)])
                aborted += 1
                del ran[number]
    block_pool = scheduler.kv_cache_manager.block_pool
    arena = getattr(block_pool, "arena", None)
    counts = Counts(
        cut=len(cut),
        preemptions=sum(preempted.values()),
        moves=arena.moves if arena else 0,
        hit_tokens=hit_tokens,
        evictions=evictions.count,
        aborted=aborted,
    )
    return Outcome(answers, counts, block_pool.get_usage(), time.perf_counter() - began)


def _send(engine: Any, number: int, prompt: Prompt) -> None:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    sampling = SamplingParams(
        temperature=0,
        max_tokens=ANSWER_TOKENS,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    engine.add_request(str(number), {"prompt_token_ids": prompt.tokens}, sampling)


def _abort_times(scenario: Scenario, requests: int) -> dict[int, int]:
    """Which requests are aborted, and after how many steps."""
    rng = Random(0)
    return {number: rng.randint(1, ABORT_STEPS) for number in range(0, requests, 3)} if scenario.aborts else {}


class _EvictionCount:
    """Counts cached blocks that are evicted, in stock vLLM's pool and in tidepool's, which inherit the method."""

    def __init__(self) -> None:
        from vllm.v1.core.block_pool import BlockPool

        self.count = 0
        evict = BlockPool._maybe_evict_cached_block

        def counted(pool: Any, block: Any) -> bool:
            evicted = bool(evict(pool, block))
            self.count += evicted
            return evicted

        BlockPool._maybe_evict_cached_block = counted


def _scheduler(engine: Any) -> Any:
    return engine.engine_core.engine_core.scheduler


if __name__ == "__main__":
    main()

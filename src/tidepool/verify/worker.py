"""One side of the verification: real vLLM in a process of its own.

It is told its side and parts, named by `Part.key`, runs them one after the other, each on an engine of its own, and
answers with what it runs on, then with an outcome for each part.
"""

from __future__ import annotations

import os
import platform
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from random import Random
from typing import Any

from tidepool.running.child import ALIVE, Answer, run
from tidepool.running.engine import add_request, core_of, preemptions_of, start_engine
from tidepool.sides import Side
from tidepool.verify.messages import Counts, Machine, Outcome
from tidepool.verify.scenarios import MAX_NUM_SEQS, SCENARIOS, Scenario
from tidepool.verify.task import ANSWER_TOKENS, MODEL, Prompt

ABORT_STEPS = 4
"""Steps that a request to be aborted runs for at most: its prompt and all but the last token of its answer."""


def main() -> None:
    """Run the parts that the command names."""
    run(_verify)


def _verify(messages: Iterator[dict[str, Any]], answer: Answer) -> None:
    job = next(messages)
    answer(asdict(_machine()))
    evictions = _EvictionCount()
    engines = []  # An engine that is collected takes vLLM's process-wide state with it.
    for part in job["parts"]:
        name, _, poison = part.partition("+")
        os.environ["TIDEPOOL_POISON"] = "1" if poison else "0"
        scenario, prompts = SCENARIOS[name], SCENARIOS[name].requests()
        os.environ["TIDEPOOL_OVERCOMMIT"] = "1" if "preemptions" in scenario.must else "0"
        engines.append(_start(job["side"], scenario, prompts))
        answer(asdict(_run(engines[-1], scenario, prompts, evictions, lambda: answer(ALIVE))))


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


def _start(side: Side, scenario: Scenario, prompts: Sequence[Prompt]) -> Any:
    allow = _gates_to_open()
    return start_engine(
        side,
        model=str(MODEL),
        kv_cache_memory_bytes=scenario.kv_bytes,
        gpu_memory_utilization=0.1,
        max_model_len=max(len(prompt.tokens) for prompt in prompts) + ANSWER_TOKENS,
        max_num_seqs=scenario.fixed_seqs if side == "fixed" else MAX_NUM_SEQS,
        max_num_batched_tokens=scenario.step_tokens,
        long_prefill_token_threshold=scenario.chunk_tokens,
        enable_prefix_caching=scenario.caching,
        additional_config={"tidepool": {"allow": allow}} if allow else {},
    )


def _run(
    engine: Any,
    scenario: Scenario,
    prompts: Sequence[Prompt],
    evictions: _EvictionCount,
    stepped: Callable[[], None],
) -> Outcome:
    """Ask everything, in order, with ``at_once`` requests under way; ``stepped`` is called after each step."""
    evictions.count, began = 0, time.perf_counter()
    asking = _Asking(engine, scenario, prompts)
    while asking.waiting or asking.ran:
        asking.send()
        asking.step()
        stepped()
        asking.look()
        asking.abort()
    block_pool = asking.scheduler.kv_cache_manager.block_pool
    arena = getattr(block_pool, "arena", None)
    counts = Counts(
        cut=len(asking.cut),
        preemptions=sum(asking.preempted.values()),
        moves=arena.moves if arena else 0,
        hit_tokens=asking.hit_tokens,
        evictions=evictions.count,
        aborted=asking.aborted,
    )
    return Outcome(asking.answers, counts, block_pool.get_usage(), time.perf_counter() - began)


class _Asking:
    """The requests of one scenario: those that wait to be sent, those under way, and the answers."""

    def __init__(self, engine: Any, scenario: Scenario, prompts: Sequence[Prompt]) -> None:
        self.engine = engine
        self.scheduler = core_of(engine).scheduler
        self.scenario = scenario
        self.prompts = prompts
        self.abort_after = _abort_times(scenario, len(prompts))
        self.waiting = deque(range(len(prompts)))
        self.ran: dict[int, int] = {}
        """Steps that each request under way has run for."""
        self.answers: dict[str, list[int]] = {}
        self.preempted: dict[str, int] = {}
        self.cut: set[str] = set()
        self.hit_tokens = self.aborted = 0

    def send(self) -> None:
        """Keep ``at_once`` requests under way."""
        while self.waiting and len(self.ran) < self.scenario.at_once:
            number = self.waiting.popleft()
            add_request(self.engine, str(number), self.prompts[number].tokens, ANSWER_TOKENS)
            self.ran[number] = 0

    def step(self) -> None:
        """Run the engine for a step, and take the answers that it completes."""
        for result in self.engine.step():
            if result.finished:
                self.answers[result.request_id] = list(result.outputs[0].token_ids)
                self.hit_tokens += result.num_cached_tokens or 0
                del self.ran[int(result.request_id)]

    def look(self) -> None:
        """Note whose prompt was cut and who was preempted."""
        self.preempted |= preemptions_of(self.scheduler)
        running = self.scheduler.running
        self.cut |= {e.request_id for e in running if 0 < e.num_computed_tokens < e.num_prompt_tokens}

    def abort(self) -> None:
        """Count another step for those that run, and abort those that have run for long enough."""
        # Inside, vLLM adds a suffix to the name of a request.
        running = {int(each.request_id.partition("-")[0]) for each in self.scheduler.running}
        for number in [number for number in self.ran if number in running]:
            self.ran[number] += 1
            if self.ran[number] == self.abort_after.get(number):
                self.engine.abort_request([str(number)])
                self.aborted += 1
                del self.ran[number]


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


if __name__ == "__main__":
    main()

"""One side of the verification: real vLLM in a process of its own.

It is told its side, its parts and what of vLLM's options the user has named, runs them one after the other, each on an
engine of its own, and answers with what it runs on, then with an outcome for each part.
"""

from __future__ import annotations

import os
import platform
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from tidepool.cache import Arena, Copy
from tidepool.running.agreement import ALTERNATIVES
from tidepool.running.child import ALIVE, Answer, run
from tidepool.running.engine import add_request, core_of, likeliest, preemptions_of, start_engine
from tidepool.sides import Side
from tidepool.verify.checkpoints import checkpoint_of
from tidepool.verify.messages import Counts, Machine, Outcome
from tidepool.verify.scenarios import MAX_NUM_SEQS, SCENARIOS, Fault, Scenario
from tidepool.verify.task import Prompt
from tidepool.vllm_plugin.settings import certificate_requested

if TYPE_CHECKING:
    from tidepool.vllm_plugin.host import HostMemory
    from tidepool.vllm_plugin.host_copies import HostBytes

ABORT_STEPS = 4
"""Steps that a request to be aborted runs for at most: its prompt and all but the last token of its answer."""


BESIDE_FAR = 3 << 30
"""Bytes that an engine takes beside its KV memory where that is the rest of its share of a GPU."""


def main() -> None:
    """Run the parts that the command names."""
    run(_verify)


def _verify(messages: Iterator[dict[str, Any]], answer: Answer) -> None:
    from vllm.distributed.kv_transfer.kv_transfer_state import ensure_kv_transfer_shutdown

    job = next(messages)
    answer(asdict(_machine()))
    evictions, places, unpacked = _EvictionCount(), _Places(), _UnpackedCount()
    engines: dict[tuple[Any, ...], Any] = {}
    """By `Part.engine`. An engine that is collected takes vLLM's process-wide state with it."""
    for part in job["parts"]:
        os.environ["TIDEPOOL_POISON"] = "1" if part["poison"] else "0"
        changed = {key: part[key] for key in ("checkpoint_states", "kv_bytes", "must")}
        scenario = replace(SCENARIOS[part["scenario"]], **changed)
        prompts = scenario.requests()
        os.environ["TIDEPOOL_OVERCOMMIT"] = "1" if "preemptions" in scenario.must else "0"
        key = tuple(part["engine"])
        if key not in engines:
            # Of KV connectors, too, vLLM keeps one in a process, and would use it for all engines.
            ensure_kv_transfer_shutdown()
            engines[key] = _start(job, scenario, prompts)
        elif not engines[key].reset_prefix_cache():
            raise RuntimeError("the engine's prefix cache can't be reset")
        with _damage(part["fault"]):
            outcome = _run(engines[key], scenario, prompts, evictions, places, unpacked, lambda: answer(ALIVE))
            answer(asdict(outcome))


def _machine() -> Machine:
    import torch
    import vllm
    from vllm.platforms import current_platform

    cpu = f"{platform.machine()}, {os.cpu_count()} cores"
    return Machine(
        vllm=vllm.__version__,
        torch=torch.__version__,
        device=f"CPU ({cpu})" if current_platform.is_cpu() else current_platform.get_device_name(),
        certifies=certificate_requested() or not current_platform.is_cpu(),
        memory=0 if current_platform.is_cpu() else current_platform.get_device_total_memory(),
    )


def _start(job: dict[str, Any], scenario: Scenario, prompts: Sequence[Prompt]) -> Any:
    from vllm.platforms import current_platform

    side: Side = job["side"]
    gpu = not current_platform.is_cpu()
    # Given KV memory, vLLM doesn't measure what it has, which other engines on the device would disturb.
    arguments: dict[str, Any] = {"kv_cache_memory_bytes": scenario.kv_bytes, "gpu_memory_utilization": 0.1}
    if gpu and scenario.far and side != "stock":
        memory = int(current_platform.get_device_total_memory() * job["share"])
        arguments["kv_cache_memory_bytes"] = memory - BESIDE_FAR
    if gpu and scenario.mode == "graphs":
        arguments["compilation_config"] = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
        if scenario.graph_sizes:
            arguments["compilation_config"]["cudagraph_capture_sizes"] = list(scenario.graph_sizes)
    if scenario.host_gib and side != "stock":
        arguments["kv_offloading_size"] = scenario.host_gib
    packing = {"checkpoint_states": scenario.checkpoint_states} if side == "elastic" else {}
    engine = start_engine(
        side,
        job["options"],
        model=str(checkpoint_of(scenario.model, Path(job["models"]), head="mtp" in " ".join(job["options"]))),
        enforce_eager=not gpu or scenario.mode == "eager",
        max_model_len=max(len(prompt.tokens) for prompt in prompts) + scenario.answer_tokens,
        # For CUDA graphs vLLM wants a block for each.
        max_num_seqs=scenario.fixed_seqs if side == "fixed" else min(MAX_NUM_SEQS, scenario.at_once),
        max_num_batched_tokens=scenario.step_tokens,
        long_prefill_token_threshold=scenario.chunk_tokens,
        enable_prefix_caching=scenario.caching,
        # To find out whether a device works is what this command is for.
        additional_config={"tidepool": {"allow": ["device", "drafts", "host-memory"]} | packing},
        **arguments,
    )
    if scenario.far and (arena := _arena_of(engine)):
        arena.begin_at_the_end()
    if host := _host_of(engine):
        # However quick it is to read the prompts again.
        host.speeds.worth_loading = lambda *_: True  # type: ignore[method-assign]
    return engine


def _arena_of(engine: Any) -> Arena | None:
    """tidepool's arena; None on stock vLLM."""
    return getattr(core_of(engine).scheduler.kv_cache_manager.block_pool, "arena", None)


def _host_of(engine: Any) -> HostMemory | None:
    """Host memory behind tidepool's arena, if there is any."""
    return getattr(core_of(engine).scheduler.kv_cache_manager, "host", None)


def _run(
    engine: Any,
    scenario: Scenario,
    prompts: Sequence[Prompt],
    evictions: _EvictionCount,
    places: _Places,
    unpacked: _UnpackedCount,
    stepped: Callable[[], None],
) -> Outcome:
    """Ask everything, in order, with ``at_once`` requests under way; ``stepped`` is called after each step."""
    from tidepool.vllm_plugin.serving_plan import plan_of

    evictions.count, unpacked.count, began = 0, 0, time.perf_counter()
    places.lowest.clear()
    host = _host_of(engine)
    loads = host.traffic.loads if host else 0
    asking = _Asking(engine, scenario, prompts)
    while asking.waiting or asking.ran:
        asking.send()
        asking.step()
        stepped()
        asking.look()
        asking.abort()
    while host and host.busy:
        engine.step()
    block_pool, arena = asking.scheduler.kv_cache_manager.block_pool, _arena_of(engine)
    plan = plan_of(core_of(engine).vllm_config)
    counts = Counts(
        cut=len(asking.cut),
        preemptions=sum(asking.preempted.values()),
        moves=arena.moves if arena else 0,
        hit_tokens=asking.hit_tokens,
        evictions=evictions.count,
        aborted=asking.aborted,
        far=places.far(arena, asking.scheduler) if arena and scenario.far else 0,
        accepted=asking.accepted,
        loads=host.traffic.loads - loads if host else 0,
        unpacked=unpacked.count,
    )
    return Outcome(
        asking.answers,
        counts,
        asking.logprobs,
        plan.setup if plan else None,
        block_pool.get_usage(),
        time.perf_counter() - began,
    )


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
        self.logprobs: dict[str, list[dict[str, float]]] = {}
        self.alternatives = ALTERNATIVES if scenario.model != "trained" else None
        self.preempted: dict[str, int] = {}
        self.cut: set[str] = set()
        self.hit_tokens = self.aborted = self.accepted = 0
        _count_accepted(self)

    def send(self) -> None:
        """Keep ``at_once`` requests under way."""
        while self.waiting and len(self.ran) < self.scenario.at_once:
            number = self.waiting.popleft()
            add_request(
                self.engine, str(number), self.prompts[number].tokens, self.scenario.answer_tokens, self.alternatives
            )
            self.ran[number] = 0

    def step(self) -> None:
        """Run the engine for a step, and take the answers that it completes."""
        for result in self.engine.step():
            if result.finished:
                completion = result.outputs[0]
                self.answers[result.request_id] = list(completion.token_ids)
                if completion.logprobs:
                    self.logprobs[result.request_id] = likeliest(completion.logprobs)
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


def _count_accepted(asking: _Asking) -> None:
    """Count the drafted tokens that the scheduler is told were accepted."""
    make_stats = asking.scheduler.make_spec_decoding_stats

    def counted(stats: Any, *, num_accepted_tokens: int, **others: Any) -> Any:
        asking.accepted += num_accepted_tokens
        return make_stats(stats, num_accepted_tokens=num_accepted_tokens, **others)

    asking.scheduler.make_spec_decoding_stats = counted


@contextmanager
def _damage(fault: Fault) -> Iterator[None]:
    """Do a control's damage for a while."""
    from tidepool.vllm_plugin.host_copies import HostBytes
    from tidepool.vllm_plugin.state_parts import StatePacker
    from tidepool.vllm_plugin.worker import ArenaBytes

    copy_blocks, block, pieces, pack = ArenaBytes.copy, ArenaBytes.block, HostBytes.pieces, StatePacker.pack

    def cut(self: ArenaBytes, group: int, index: int) -> Any:
        # Of a small arena as many bits are cut that no far block is found any more, of a large one those beyond 32.
        bits = min(32, (self.arena.numel() // 2).bit_length() - 1)
        # What is left is rounded to a block, as blocks that overlap can't be copied to each other.
        start = index * self.strides[group] % (1 << bits) // self.strides[group] * self.strides[group]
        return self.arena[start : start + self.block_bytes[group]]

    def stores(self: HostBytes, copy: Copy) -> Iterator[tuple[Any, Any]]:
        return pieces(self, copy) if copy.to_host else iter(())

    if fault == "copies":
        ArenaBytes.copy = lambda self, copies: None  # type: ignore[method-assign]
    elif fault == "loads":
        HostBytes.pieces = stores  # type: ignore[method-assign]
    elif fault == "packs":
        StatePacker.pack = lambda self, state, packed: None  # type: ignore[method-assign]
    elif fault == "offsets":
        ArenaBytes.block = cut  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        ArenaBytes.copy, ArenaBytes.block = copy_blocks, block  # type: ignore[method-assign]
        HostBytes.pieces, StatePacker.pack = pieces, pack  # type: ignore[method-assign]


class _Places:
    """Where the blocks lie that an arena hands out."""

    def __init__(self) -> None:
        self.lowest: dict[int, int] = {}
        """By group, the lowest block handed out."""
        allocate = Arena.allocate

        def noted(arena: Arena, group: int, *args: Any, **kwargs: Any) -> list[int]:
            blocks = allocate(arena, group, *args, **kwargs)
            if blocks:
                self.lowest[group] = min(*blocks, self.lowest.get(group, blocks[0]))
            return blocks

        Arena.allocate = noted  # type: ignore[method-assign, assignment]

    def far(self, arena: Arena, scheduler: Any) -> int:
        """Byte of the lowest block handed out; 0 unless all were beyond 8 GiB, or half of a smaller arena.

        Beyond 8 GiB offsets exceed 2^31 elements of every dtype of a cache. The states of the fixed partition lie at
        the start, whatever one does, and don't count.
        """
        fixed = scheduler.kv_cache_config.partition == "fixed"
        pools = scheduler.kv_cache_manager.block_pool.pools
        counted = [group for group in self.lowest if not (fixed and pools[group].holds_states)]
        lowest = min((arena.address(group, self.lowest[group]) for group in counted), default=0)
        return lowest if lowest >= min(8 << 30, arena.total_bytes // 2) else 0


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


class _UnpackedCount:
    """Counts requests that went on from a packed state."""

    def __init__(self) -> None:
        from tidepool.vllm_plugin.states import StateManager

        self.count = 0
        unpack = StateManager._continue_packed

        def counted(manager: StateManager, *args: Any) -> Any:
            self.count += 1
            return unpack(manager, *args)

        StateManager._continue_packed = counted  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    main()

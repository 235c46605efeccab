"""Many short requests, a third of them aborted somewhere, and at the end everything must be as at the start.

    python bench/soak.py [--requests 5000] [--side elastic] [--memory 28] [--json FILE]
    python bench/soak.py --side fixed --memory 32
    python bench/soak.py --host-memory 60

One engine in this process serves the shipped model (docs/trained-model.md), whose answers are right or wrong. Memory is
so small that requests are preempted, extents change hands and cached memory is evicted all the time. Every so often
the prefix cache is reset under load, and the engine is sent to sleep and woken. Host memory behind the pools holds less
than the requests leave, and whatever it has is loaded, however long that takes. Checked at the end:

 - every request that wasn't aborted was answered right;
 - nothing is in use on the device or the host, every byte of both arenas is accounted for, and no request is known any
   more;
 - memory of the process hasn't grown since the warm-up;
 - the questions asked at the start get the same answers again.

Exit code 0 if so, else 1.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import linear_regression
from typing import Any

from tidepool.verify.task import ANSWER_TOKENS, MODEL, Prompt, make_conversation, make_prompts

SIDES = ("stock", "elastic", "fixed")
AT_ONCE = 40
"""Requests under way; about half as many fit."""
RUNNING = 32
"""Requests that may run at once, ``max_num_seqs``; a quarter in the fixed partition, which sets their states aside."""
CHECKPOINT_TOKENS = 128
"""So that prompts as short as these have something to hit."""
STEP_TOKENS = 256
"""Tokens in an engine step at most, so that longer prompts are cut."""
ABORTED = 1 / 3
"""Share of requests that is aborted."""
ABORT_STEPS = 8
"""Engine steps after which a request is aborted at most."""
WAVE = 60
"""Prompts of which most are of about the same length."""
DISTURB_EVERY = 400
"""Requests between two disturbances."""
SAMPLE_EVERY = 50
"""Requests between two looks at the memory of the process."""
WARM_UP = 2_400
"""Requests after which the process must not grow any more, all caches being full again after a reset; with fewer in all
that isn't judged."""
FLAT_SHARE = 0.01
"""Share of itself by which the process may grow in 1,000 requests: kernels and malloc have their own ways."""
FLAT_OBJECTS = 1.0
"""Pieces of memory that Python may have more of for each request. All that tidepool keeps is there."""


@dataclass
class Soak:
    """What happened."""

    asked: int = 0
    right: int = 0
    wrong: list[str] = field(default_factory=list)
    aborted: int = 0
    lost_to_sleep: int = 0
    preempted: int = 0
    hit_tokens: int = 0
    prompt_tokens: int = 0
    resets: dict[str, int] = field(default_factory=lambda: {"refused, blocks in use": 0, "done, requests preempted": 0})
    sleeps: dict[str, int] = field(default_factory=lambda: {"requests aborted": 0, "requests kept": 0})
    memory: list[tuple[int, float, int]] = field(default_factory=list)
    """(requests ended so far, megabytes resident, pieces of memory that Python has allocated)"""


def prompts_of(seed: int, count: int) -> list[Prompt]:
    """Short stories of all lengths, questions about a few that come back again and again, and conversations.

    Every third wave of stories is longer: it needs attention's memory where the others need states.
    """
    rng = random.Random(seed)
    popular = [make_prompts(seed + n, length=rng.randint(200, 700), stories=1, questions=30) for n in range(12)]
    made: list[Prompt] = []
    while len(made) < count:
        kind = rng.random()
        if kind < 0.5:
            lengths = (600, 1_000) if len(made) // WAVE % 3 == 2 else (60, 240)
            made += make_prompts(seed + len(made), length=rng.randint(*lengths), stories=1)
        elif kind < 0.9:
            made.append(rng.choice(rng.choice(popular)))
        else:
            made += make_conversation(seed + len(made), length=rng.randint(300, 600), turns=3)
    return made[:count]


def make_engine(side: str, memory: int, host_memory: int) -> Any:
    """An engine in this process."""
    os.environ |= {
        "TIDEPOOL": "off" if side == "stock" else side,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
        # oneDNN keeps a kernel for every shape that it has met, hundreds of megabytes here, which would hide a leak.
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1",
    }
    from vllm import EngineArgs, LLMEngine

    from tidepool.cache import arena, branches, lookups, retention, reuse

    # Records grow up to bounds, which these requests would take to their end to reach.
    branches._REMEMBERED = lookups._REMEMBERED = reuse._REMEMBERED = 256
    retention.LEFT = retention.BRANCH_POINTS = arena.AGES = 256
    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=str(MODEL),
            max_model_len=1_024,
            max_num_seqs=RUNNING // 4 if side == "fixed" else RUNNING,
            max_num_batched_tokens=STEP_TOKENS,
            kv_cache_memory_bytes=memory,
            kv_offloading_size=host_memory / (1 << 30) or None,
            enable_prefix_caching=True,
            enforce_eager=True,
            disable_log_stats=True,
            additional_config={"tidepool": {"checkpoint_tokens": CHECKPOINT_TOKENS}},
        )
    )
    if host := host_of(engine):
        # Whatever this machine's speeds are.
        host.speeds.worth_loading = lambda *_: True
    return engine


def send(engine: Any, name: str, prompt: Prompt) -> None:
    """Ask."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    sampling = SamplingParams(
        temperature=0, max_tokens=ANSWER_TOKENS, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
    )
    engine.add_request(name, {"prompt_token_ids": prompt.tokens}, sampling)


def answers_to(engine: Any, name: str, prompts: list[Prompt]) -> list[list[int]]:
    """Ask one after the other, and nobody else asks."""
    answers = []
    for index, prompt in enumerate(prompts):
        send(engine, f"{name}{index}", prompt)
        while engine.has_unfinished_requests():
            answers += [list(result.outputs[0].token_ids) for result in engine.step() if result.finished]
    return answers


def resident_mb() -> float:
    """Memory of this process."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def run(engine: Any, prompts: list[Prompt], seed: int, disturb_every: int, advance: Any) -> Soak:
    """Keep `AT_ONCE` requests under way until all have been asked and have ended."""
    rng = random.Random(seed)
    soak = Soak()
    scheduler = scheduler_of(engine)
    under_way: dict[str, Prompt] = {}
    abort_at: dict[str, int] = {}
    preemptions: dict[str, int] = {}
    step = ended = 0
    next_disturbance, next_sample = disturb_every, 0
    while soak.asked < len(prompts) or under_way:
        while soak.asked < len(prompts) and len(under_way) < AT_ONCE:
            name = str(soak.asked)
            under_way[name] = prompts[soak.asked]
            soak.prompt_tokens += len(under_way[name].tokens)
            send(engine, name, under_way[name])
            if rng.random() < ABORTED:
                abort_at[name] = step + rng.randint(0, ABORT_STEPS)
            soak.asked += 1
        for result in engine.step():
            if result.finished and (prompt := under_way.pop(result.request_id, None)):
                ended += 1
                soak.hit_tokens += result.num_cached_tokens or 0
                if prompt.question.is_right(result.outputs[0].token_ids):
                    soak.right += 1
                else:
                    soak.wrong.append(result.request_id)
        step += 1
        preemptions |= {each.request_id: each.num_preemptions for each in scheduler.requests.values()}
        due = [name for name, at in abort_at.items() if at <= step]
        going = [name for name in due if under_way.pop(name, None)]
        for name in due:
            del abort_at[name]
        if going:
            engine.abort_request(going)
            soak.aborted += len(going)
            ended += len(going)
        if ended >= next_disturbance:
            next_disturbance += disturb_every
            lost = disturb(engine, soak, sorted(under_way), ended // disturb_every)
            soak.lost_to_sleep += len(lost)
            ended += len(lost)
            for name in lost:
                del under_way[name]
        if ended >= next_sample:
            next_sample += SAMPLE_EVERY
            soak.preempted += sum(preemptions.pop(name) for name in [*preemptions] if name not in scheduler.requests)
            advance(ended)
            gc.collect()
            soak.memory.append((ended, resident_mb(), sys.getallocatedblocks()))
    soak.preempted += sum(preemptions.values())
    return soak


def disturb(engine: Any, soak: Soak, under_way: list[str], turn: int) -> list[str]:
    """Reset the prefix cache or sleep, in turns. Returns the requests that this ended."""
    match turn % 4:
        case 0:
            if any(manager.req_to_blocks for manager in managers_of(engine)):
                assert not engine.reset_prefix_cache(), "a reset took memory that is in use"
                soak.resets["refused, blocks in use"] += 1
        case 1:
            assert engine.reset_prefix_cache(reset_running_requests=True)
            soak.resets["done, requests preempted"] += 1
        case 2:
            # All requests end; the engine's front end isn't told, so it is asked to forget them.
            engine.sleep(1, "abort")
            engine.abort_request(under_way)
            engine.wake_up()
            soak.sleeps["requests aborted"] += 1
            return under_way
        case _:
            engine.sleep(1, "keep")
            engine.wake_up()
            soak.sleeps["requests kept"] += 1
    return []


def scheduler_of(engine: Any) -> Any:
    """The scheduler of an engine in this process."""
    return engine.engine_core.engine_core.scheduler


def host_of(engine: Any) -> Any:
    """Host memory behind the pools; None without."""
    return getattr(scheduler_of(engine).kv_cache_manager, "host", None)


def managers_of(engine: Any) -> Any:
    """vLLM's bookkeeping of each group's blocks."""
    return scheduler_of(engine).kv_cache_manager.coordinator.single_type_managers


def left_behind(engine: Any) -> list[str]:
    """What an engine without requests still knows of them; a sentence each."""
    scheduler = scheduler_of(engine)
    found = []
    if scheduler.requests or scheduler.running or scheduler.waiting:
        found.append(f"the scheduler still has {len(scheduler.requests)} requests")
    for group, manager in enumerate(managers_of(engine)):
        if manager.req_to_blocks:
            found.append(f"group {group} still has blocks of {len(manager.req_to_blocks)} requests")
    arena = getattr(scheduler.kv_cache_manager.block_pool, "arena", None)
    if arena is None:
        return found
    found += unaccounted(arena, "the device")
    for group, pool in enumerate(arena.pools):
        kept = list(pool.kept())
        if len(kept) != pool.cached or any(pool.prefixes[block] is None for block in kept):
            found.append(f"group {group} has cached blocks that no prefix names")
        if any(scheduler.kv_cache_manager.block_pool.pools[group].blocks[b].block_hash is None for b in kept):
            found.append(f"group {group} keeps blocks that nobody can find")
    if host := host_of(engine):
        found += unaccounted(host.tier.arena, "the host")
        known = {**host._loading, **host._reached, **host._loaded, **dict.fromkeys(host._settled)}
        if known or host.busy:
            found.append(f"host memory still knows {len(known)} requests and {host.tier.copies} copies")
        if host.traffic.failed:
            found.append(f"{host.traffic.failed} copies failed")
    if known := scheduler.kv_cache_manager._lookups:
        found.append(f"the manager still knows {len(known)} lookups")
    if known := scheduler.kv_cache_manager.block_pool.retention.requests:
        found.append(f"the policy still knows {len(known)} requests")
    return found


def unaccounted(arena: Any, where: str) -> list[str]:
    """What is wrong with an arena that nobody uses; a sentence each."""
    usage = arena.usage()
    found = []
    parts = usage.in_use + usage.cached + usage.free + usage.unowned + usage.padding + usage.null
    if parts != usage.total:
        found.append(f"the parts of {where}'s arena add up to {parts:,} of {usage.total:,} bytes")
    if usage.in_use:
        found.append(f"{usage.in_use:,} bytes of {where}'s memory are in use")
    if any(any(pool.refs) for pool in arena.pools):
        found.append(f"blocks of {where} are referenced")
    if arena._prefixes:
        found.append(f"{where}'s arena still knows {len(arena._prefixes)} requests")
    return found


def growth(soak: Soak) -> tuple[float, float]:
    """Since the warm-up, for each request: megabytes that the process grew by, and pieces of Python's memory."""
    late = [sample for sample in soak.memory if sample[0] >= WARM_UP]
    if len(late) < 3:
        return 0.0, 0.0
    ended = [sample[0] for sample in late]
    return linear_regression(ended, [mb for _, mb, _ in late]).slope, linear_regression(
        ended, [pieces for _, _, pieces in late]
    ).slope


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--requests", type=int, default=5_000)
    parser.add_argument("--side", choices=SIDES, default="elastic")
    parser.add_argument("--memory", type=int, default=28, help="megabytes of KV memory")
    parser.add_argument("--host-memory", type=int, default=0, help="megabytes of host memory behind the pools")
    parser.add_argument("--disturb-every", type=int, default=DISTURB_EVERY, help="requests between two disturbances")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    prompts = prompts_of(options.seed, options.requests)
    fresh = make_prompts(options.seed + 77, length=500, stories=4, questions=2)
    with console.status("Starting vLLM"):
        engine = make_engine(options.side, options.memory * 1_000_000, options.host_memory * 1_000_000)
    from tidepool.vllm_plugin.served import NotServedError, require_served

    try:
        require_served(options.side, engine.vllm_config, scheduler_of(engine).kv_cache_config)
    except NotServedError as error:
        sys.exit(str(error))
    arena = getattr(scheduler_of(engine).kv_cache_manager.block_pool, "arena", None)
    before = answers_to(engine, "before", fresh)
    columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    began = time.perf_counter()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=options.requests)
        soak = run(
            engine,
            prompts,
            options.seed,
            options.disturb_every,
            lambda ended: progress.update(task, completed=ended),
        )
        progress.update(task, completed=options.requests)
    seconds = time.perf_counter() - began
    host = host_of(engine)
    while host and host.busy:
        engine.step()
    found = left_behind(engine)
    found += [f"{len(soak.wrong)} answers are wrong"] * bool(soak.wrong)
    megabytes, pieces = growth(soak)
    if megabytes * 1_000 > FLAT_SHARE * resident_mb():
        found.append(f"the process grew by {1_000 * megabytes:,.1f} MB for each 1,000 requests")
    if pieces > FLAT_OBJECTS:
        found.append(f"Python's memory grew by {pieces:.2f} pieces for each request")
    after = answers_to(engine, "after", fresh)
    right = [prompt.question.is_right(answer) for prompt, answer in zip(fresh, after, strict=True)]
    if after != before or not all(right):
        found.append(f"of {len(fresh)} questions asked at the start, {sum(right)} were answered right at the end")
    late = [mb for ended, mb, _ in soak.memory if ended >= WARM_UP] or [0.0]
    resets, sleeps = soak.resets, soak.sleeps
    rows = [
        ("requests", f"{soak.asked:,} in {seconds:,.0f} s, {soak.prompt_tokens:,} prompt tokens"),
        ("answered right", f"{soak.right:,} of {soak.right + len(soak.wrong):,}"),
        ("aborted", f"{soak.aborted:,}, and {soak.lost_to_sleep:,} by putting the engine to sleep"),
        ("preempted", f"{soak.preempted:,} times"),
        ("prefix-hit tokens", f"{soak.hit_tokens:,} of the requests answered"),
        ("extents that changed hands", f"{arena.moves:,}" if arena else "-"),
        ("prefix cache reset", ", ".join(f"{count} {how}" for how, count in resets.items())),
        ("sleep and wake", ", ".join(f"{count} with {how}" for how, count in sleeps.items())),
        (f"memory after {WARM_UP:,}", f"{min(late):,.0f} to {max(late):,.0f} MB, {1_000 * megabytes:+,.1f} MB and"),
        ("", f"{1_000 * pieces:+,.0f} Python objects for each 1,000 requests"),
    ]
    if len(late) < 3:
        rows[-2:] = [("memory", f"not judged with so few requests, {resident_mb():,.0f} MB")]
    if host:
        traffic, lost = host.traffic, sum(pool.evictions for pool in host.tier.arena.pools)
        rows += [
            ("loaded from the host", f"{traffic.loads:,} times, {traffic.loaded_tokens:,} tokens"),
            ("stored on the host", f"{traffic.stored_bytes / 1e6:,.0f} MB; {lost:,} blocks were evicted there"),
        ]
    rows += [
        ("asked again at the end", f"{sum(right)} of {len(right)} right, {sum(map(_equal, before, after))} the same"),
        ("left behind", "; ".join(found) or "nothing"),
    ]
    print("\n".join(f"{label:<28}{value}" for label, value in rows))
    if options.json:
        content = vars(soak) | {"side": options.side, "seconds": seconds, "found": found}
        content |= {"megabytes_per_request": megabytes, "pieces_per_request": pieces}
        if host:
            content |= {"loads": traffic.loads, "host_evictions": lost}
        content |= {"moves": arena.moves if arena else 0, "right_at_end": sum(right), "same_at_end": after == before}
        options.json.write_text(json.dumps(content, indent=1), encoding="utf-8")
    sys.exit(bool(found))


def _equal(left: list[int], right: list[int]) -> bool:
    return left == right


if __name__ == "__main__":
    main()

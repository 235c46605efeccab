"""What users met, as small cases against stock vLLM: one table, one row for each figure that must hold.

    python bench/field.py [--only NAME ...] [--list] [--json FILE] [--workers 2]

Each case is measured with stock vLLM and with tidepool on the same memory, each side in a process of its own: real
engine cores, the model left out (docs/replay.md). Seconds are the clock's, so every figure repeats exactly. The exit
code is 1 if a row doesn't hold. The next report from the field is one more entry of `CASES`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from multiprocessing import forkserver
from pathlib import Path
from random import Random
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from shapes import SHAPES
from tidepool.models import entry
from tidepool.replay.generate import Writer, conversation, generate
from tidepool.replay.trace import TraceRequest

SIDES = ("stock", "elastic")
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}
"""For the children, where the user hasn't set them."""
GIB, MIB = 1 << 30, 1 << 20
PATIENCE = 400
"""Engine steps after which nothing is waited for any longer."""

Figures = dict[str, float]
"""What a case measures on one side, by name."""


@dataclass(frozen=True)
class Check:
    """A row: one figure that must hold."""

    key: str
    """Of the figures."""
    what: str
    holds: Callable[[float, float], bool]
    """Asked with stock vLLM's figure and tidepool's."""
    words: Callable[[float], str] = "{:,.0f}".format


@dataclass(frozen=True)
class Case:
    """One report from the field."""

    name: str
    measure: Callable[[str], Figures]
    """Called with the side in a process of its own."""
    checks: tuple[Check, ...]


# Bounds -----------------------------------------------------------------------------------------------------


def not_above(stock: float, tidepool: float) -> bool:
    """A part in a thousand is the order in which requests of one step are served."""
    return tidepool <= stock * 1.001


def not_below(stock: float, tidepool: float) -> bool:
    return tidepool >= stock


def within_steps(steps: int) -> Callable[[float, float], bool]:
    """Not later than with stock vLLM by more than so many steps, one for each checkpoint that is kept."""
    return lambda stock, tidepool: tidepool <= stock + steps


def at_least(least: float) -> Callable[[float, float], bool]:
    return lambda stock, tidepool: tidepool >= least


def at_most(most: float) -> Callable[[float, float], bool]:
    return lambda stock, tidepool: tidepool <= most


def near_all(stock: float, tidepool: float) -> bool:
    """What is published is what is held, within a tenth: whole requests leave a rest."""
    return 0.9 <= tidepool <= 1.1


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms"


# Measures: engines without a model --------------------------------------------------------------------------


def config_of(model: str) -> dict[str, Any]:
    """A shape of `shapes`, or a model of tidepool's catalogue."""
    return SHAPES[model] if model in SHAPES else entry(model).config


def make(model: str, memory: int, side: Any, **shape: Any) -> Any:
    """An engine core for this process."""
    from tidepool.replay.engine import EngineShape, make_checked_engine

    return make_checked_engine(EngineShape(config_of(model), memory, side, **shape))


def with_drafter(specs: dict[str, Any]) -> dict[str, Any]:
    """vLLM's specs of a model's layers, and one of its drafter's: attention like the model's own."""
    from vllm.v1.kv_cache_interface import AttentionSpec

    return specs | {"mtp.layers.0.attn": next(spec for spec in specs.values() if isinstance(spec, AttentionSpec))}


def first_tokens(
    side: str, *, model: str, budget: int, decodes: int, prompts: Sequence[int], memory: int = 512 * MIB
) -> Figures:
    """Steps until prompts of these lengths (tokens) that come behind ``decodes`` running requests get a first token."""
    from tidepool.replay.engine import add_request
    from tidepool.replay.step import take_step

    engine = make(model, memory, side, max_num_batched_tokens=budget, max_model_len=32_768)
    rng = Random(0)
    for number in range(decodes):
        add_request(engine, f"decode {number}", [rng.randrange(512) for _ in range(8)], 10_000)
    for _ in range(PATIENCE):
        if sum(request.num_output_tokens > 0 for request in engine.scheduler.running) == decodes:
            break
        take_step(engine)
    else:
        raise RuntimeError(f"{memory:,} bytes have no room for {decodes} requests on the {side} side.")
    for number, length in enumerate(prompts):
        add_request(engine, f"prompt {number}", [rng.randrange(512) for _ in range(length)], 10_000)
    figures: Figures = {}
    for step in range(1, PATIENCE + 1):
        for name in take_step(engine).emitted:
            if name.startswith("prompt"):
                figures.setdefault(name, step)
        if len(figures) == len(prompts):
            break
    return {f"prompt {number}": PATIENCE for number in range(len(prompts))} | figures


def asked_twice(side: str, *, model: str, memory: int, requests: int = 36) -> Figures:
    """All requests at once, and once more when they have ended: what is preempted, and what is left to compute.

    Prompts are of 20 to 700 tokens, every second one behind the same 700.
    """
    from tidepool.replay.engine import add_request
    from tidepool.replay.step import take_step

    engine = make(model, memory, side, max_num_seqs=64, max_model_len=2_048, max_num_batched_tokens=2_048)
    scheduler, preempt = engine.scheduler, engine.scheduler._preempt_request
    figures: Figures = {"preempted": 0, "peak": 0, "computed": 0}

    def preempt_request(request: Any, *args: Any, **kwargs: Any) -> None:
        figures["preempted"] += request.num_computed_tokens
        preempt(request, *args, **kwargs)

    scheduler._preempt_request = preempt_request
    rng = Random(0)
    shared = [rng.randrange(512) for _ in range(700)]
    prompts = [[rng.randrange(512) for _ in range(rng.randint(20, 700))] for _ in range(requests)]
    prompts = [shared * (number % 2) + prompt for number, prompt in enumerate(prompts)]
    for again in range(2):
        for number, prompt in enumerate(prompts):
            add_request(engine, f"{number} {again}", prompt, 16 + number % 48)
        while scheduler.has_unfinished_requests():
            tokens = take_step(engine).output.num_scheduled_tokens.values()
            figures["peak"] = max(figures["peak"], len(tokens))
            figures["computed"] += sum(tokens)
    return figures


def capacity(side: str, *, model: str, memory: int, tokens: int) -> Figures:
    """What others compute from what vLLM publishes, against what requests of so many tokens hold at most.

    They are long, so that the states of more than one hardly count.
    """
    from tidepool.replay.engine import add_request
    from tidepool.replay.step import take_step

    engine = make(model, memory, side, max_model_len=tokens + 64, prefix_caching=False)
    cache, scheduler = engine.vllm_config.cache_config, engine.scheduler
    for number in range(8):
        add_request(engine, str(number), [number] * tokens, 48)
    held, usage = 0, 0.0
    for _ in range(PATIENCE):
        before = len(scheduler.waiting)
        take_step(engine)
        held = max(held, sum(request.num_computed_tokens for request in scheduler.running))
        if len(scheduler.waiting) == before and all(request.num_output_tokens for request in scheduler.running):
            usage = scheduler.kv_cache_manager.usage
            break
    return {
        "blocks": cache.num_gpu_blocks * cache.block_size / held,
        "size": cache.kv_cache_size_tokens / held,
        "usage": usage,
    }


def lost_by_drafts(side: str, *, lengths: Sequence[int]) -> Figures:
    """Tokens that prompts asked twice hit less with a drafter (mtp) than without."""
    hits = [asked_again(side, lengths, drafts) for drafts in (False, True)]
    return {str(length): without - having for length, without, having in zip(lengths, *hits, strict=True)}


def asked_again(side: str, lengths: Sequence[int], drafts: bool) -> list[int]:
    """What each of these prompts hits when it is asked for the second time."""
    from tidepool.replay.engine import add_request
    from tidepool.replay.step import take_step

    options = {"speculative_config": {"method": "mtp", "num_speculative_tokens": 1}} if drafts else {}
    engine = make(
        "tiny Qwen3.5",
        512 * MIB,
        side,
        max_model_len=8_192,
        change_specs=with_drafter if drafts else None,
        options=options,
    )
    hits = []
    for again in range(2):
        for length in lengths:
            add_request(engine, f"{length} {again}", [length + place for place in range(length)], 8)
            hits.append(take_step(engine).output.scheduled_new_reqs[0].num_computed_tokens)
            while engine.scheduler.has_unfinished_requests():
                take_step(engine)
    return hits[len(lengths) :]


def first_forks(side: str, *, model: str, memory: int, prompt: int, fork: int) -> Figures:
    """Tokens hit by the first and the second prompt that part from a long one, both at the same far place."""
    from tidepool.replay.engine import add_request
    from tidepool.replay.step import take_step

    engine = make(model, memory, side, max_model_len=2 * prompt)
    figures: Figures = {}
    for number, name in enumerate(("prompt", "first", "second")):
        own = range(1_000_000 * (number + 1), 1_000_000 * (number + 1) + 1_000)
        tokens = [*range(fork), *own] if number else [*range(prompt)]
        add_request(engine, name, tokens, 50)
        figures[name] = take_step(engine).output.scheduled_new_reqs[0].num_computed_tokens
        while engine.scheduler.has_unfinished_requests():
            take_step(engine)
    return figures


# Measures: replays ------------------------------------------------------------------------------------------


def replayed(
    side: str,
    *,
    model: str,
    memory: int,
    workload: Callable[[], list[TraceRequest]],
    max_num_batched_tokens: int = 8_192,
) -> Figures:
    """A workload by the clock of an H100."""
    from tidepool.replay.job import Job, Mode
    from tidepool.replay.run import run_job

    requests = workload()
    mode: Mode = "stock" if side == "stock" else "elastic"
    job = Job(mode, config_of(model), "H100", memory, None, None, None, 0, 1.0, 256, max_num_batched_tokens)
    result = run_job(job, requests, lambda done: None)
    return {
        "ttft": result.ttft.mean,
        "p50": result.ttft.p50,
        "hits": result.hit_tokens,
        "preemptions": result.preemptions,
        "running": result.running_mean,
    }


def generated(name: str, requests: int, rate: float = 1.0) -> list[TraceRequest]:
    """One of `tidepool replay`'s own workloads, its requests ``rate`` times as fast."""
    made = generate(name, requests, 0)
    return [replace(request, arrival=request.arrival / rate) for request in made]


def light_load(requests: int = 120) -> list[TraceRequest]:
    """Short prompts that share nothing, 2 a second: hardly two at once."""
    writer = Writer(Random(0))
    for arrival in islice(writer.arrivals(2.0), requests):
        writer.request(arrival, [writer.text(100, 1_500)], writer.rng.randint(20, 100))
    return writer.requests


def many_sessions(sessions: int = 128) -> list[TraceRequest]:
    """Chats of four short turns, two of them begun a second, each turn half a minute after the last one."""
    writer = Writer(Random(0))
    for began in islice(writer.arrivals(2.0), sessions):
        conversation(writer, began, [writer.text(100, 500)], (4, 4), (50, 300), (50, 200), 30.0)
    return sorted(writer.requests, key=lambda request: request.arrival)


def burst(prompts: int, groups: int, shared: int, own: int, answer: int = 50, apart: float = 0.0) -> list[TraceRequest]:
    """Prompts that come at once, or so many seconds after each other: each group shares a beginning."""
    writer = Writer(Random(0))
    beginnings = [writer.text(shared, shared) for _ in range(groups)]
    for number in range(prompts):
        writer.request(apart * number, [beginnings[number % groups], *([writer.text(own, own)] if own else [])], answer)
    return writer.requests


def burst_computed(side: str, *, model: str, memory: int, **shape: Any) -> Figures:
    """How often what prompts of a burst share is computed: 1 is once for each group.

    A prompt computes its last block of attention in any case, and as much is lost where prompts part inside a block.
    """
    requests = burst(**shape)
    figures = replayed(side, model=model, memory=memory, workload=lambda: requests)
    prompt_tokens = sum(request.input_tokens for request in requests)
    own = shape["prompts"] * (shape["own"] + 16)
    figures["times"] = (prompt_tokens - figures["hits"] - own) / (shape["groups"] * shape["shared"])
    return figures


# Cases ------------------------------------------------------------------------------------------------------


def prompts_progress(budget: int, decodes: int, prompts: tuple[int, ...]) -> Case:
    lengths = " and ".join(f"{length:,}" for length in prompts)
    return Case(
        f"budget-{budget}-behind-{decodes}-of-{'-'.join(map(str, prompts))}",
        partial(first_tokens, model="tiny Qwen3.5", budget=budget, decodes=decodes, prompts=prompts),
        tuple(
            Check(
                f"prompt {number}",
                f"steps to the first token of the {length:,} in {lengths} behind {decodes} decodes, {budget:,} a step",
                # A place for each checkpoint that it and the prompts before it keep, and one for each end.
                within_steps(sum(1 + before // 512 for before in prompts[: number + 1])),
            )
            for number, length in enumerate(prompts)
        ),
    )


def tight(model: str, megabytes: int) -> Case:
    return Case(
        f"tight {model}".replace(" ", "-").replace(",", ""),
        partial(asked_twice, model=model, memory=megabytes * MIB),
        (
            Check("preempted", f"{model}, {megabytes} MiB, 36 requests twice: tokens preempted", not_above),
            Check("peak", "most requests at once", not_below),
            Check("computed", "tokens computed: what isn't hit, and what was preempted again", not_above),
        ),
    )


def clock(name: str, what: str, **setting: Any) -> Case:
    return Case(
        name,
        partial(replayed, **setting),
        (
            Check("ttft", f"{what}: mean TTFT", not_above, milliseconds),
            Check("hits", "tokens hit", not_below),
            Check("preemptions", "preemptions", not_above),
        ),
    )


def burst_case(name: str, what: str, model: str, **shape: Any) -> Case:
    return Case(
        f"burst-{name}-{model}",
        partial(burst_computed, model=model, memory=40 * GIB, **shape),
        (
            Check(
                "times", f"{model}, 40 GiB, {what}: what they share is computed", at_most(1.2), "{:.2f} times".format
            ),
            Check("ttft", "mean TTFT", not_above, milliseconds),
        ),
    )


CASES: tuple[Case, ...] = (
    prompts_progress(512, 1, (900, 30)),
    prompts_progress(513, 60, (3_000,)),
    prompts_progress(600, 88, (900, 30)),
    prompts_progress(2_048, 16, (6_000, 6_000)),
    tight("tiny Granite 4 H", 10),
    tight("tiny Falcon-H1", 16),
    tight("tiny Zamba2", 40),
    tight("tiny Qwen3-Next", 30),
    tight("tiny Nemotron-H", 40),
    tight("tiny Nemotron-H, windows", 40),
    clock(
        "chat-512",
        "Qwen3.5-4B, 12 GiB, generated chat of 300, 512 tokens a step",
        model="Qwen3.5-4B",
        memory=12 * GIB,
        workload=partial(generated, "chat", 300),
        max_num_batched_tokens=512,
    ),
    *(
        clock(
            f"light-{model}",
            f"{model}, 20 GiB, short prompts, 2 a second",
            model=model,
            memory=20 * GIB,
            workload=light_load,
        )
        for model in ("Qwen3.5-4B", "Nemotron-3-Nano-4B", "Granite-4.0-H-Tiny")
    ),
    clock(
        "sessions-granite",
        "Granite-4.0-H-Tiny, 4 GiB, 128 short chats",
        model="Granite-4.0-H-Tiny",
        memory=4 * GIB,
        workload=many_sessions,
    ),
    clock(
        "chat-granite",
        "Granite-4.0-H-Tiny, 4 GiB, generated chat of 400",
        model="Granite-4.0-H-Tiny",
        memory=4 * GIB,
        workload=partial(generated, "chat", 400),
    ),
    clock(
        "random-granite",
        "Granite-4.0-H-Tiny, 20 GiB, generated random prompts, 4 a second",
        model="Granite-4.0-H-Tiny",
        memory=20 * GIB,
        workload=partial(generated, "random", 200, 2.0),
    ),
    Case(
        "capacity",
        partial(capacity, model="tiny Qwen3.5", memory=64 * MIB, tokens=19_000),
        (
            Check(
                "blocks",
                "tiny Qwen3.5, 64 MiB: num_gpu_blocks x block_size, of the tokens held",
                near_all,
                "{:.0%}".format,
            ),
            Check("size", "kv_cache_size_tokens, of the tokens held", near_all, "{:.0%}".format),
            Check("usage", "KV usage when a request waits for memory", at_least(0.95), "{:.0%}".format),
        ),
    ),
    Case(
        "drafts-lookup",
        partial(lost_by_drafts, lengths=(2_100, 3_000)),
        tuple(
            Check(str(length), f"tiny Qwen3.5, a prompt of {length:,} again: tokens hit less with mtp", at_most(32))
            for length in (2_100, 3_000)
        ),
    ),
    Case(
        "first-fork",
        partial(first_forks, model="Qwen3.5-4B", memory=12 * GIB, prompt=32_000, fork=8_300),
        (
            Check(
                "first",
                "Qwen3.5-4B, 12 GiB, a prompt of 32,000 parted from after 8,300: first fork hits",
                at_least(4_096),
            ),
            Check("second", "second fork hits", at_least(8_192)),
        ),
    ),
    *(
        case
        for model in ("Qwen3.5-4B", "Nemotron-3-Nano-4B")
        for case in (
            burst_case("same", "100 times one prompt at once", model, prompts=100, groups=1, shared=4_000, own=0),
            burst_case("samples", "16 samples of 10 prompts", model, prompts=160, groups=10, shared=1_800, own=0),
            burst_case(
                "common", "100 prompts at once, ten beginnings", model, prompts=100, groups=10, shared=2_560, own=440
            ),
            burst_case(
                "late", "20 times one, 20 ms apart", model, prompts=20, groups=1, shared=40_000, own=0, apart=0.02
            ),
        )
    ),
    *(
        clock(
            f"generated-{workload}",
            f"Qwen3.5-4B, {memory} GiB, generated {workload} of {requests}",
            model="Qwen3.5-4B",
            memory=memory * GIB,
            workload=partial(generated, workload, requests),
        )
        for workload, requests, memory in (
            ("documents", 50, 30),
            ("agent", 30, 12),
            ("tree", 100, 12),
            ("hot-prefix", 100, 12),
        )
    ),
)


# The run ----------------------------------------------------------------------------------------------------


def measure(name: str, side: str) -> Figures:
    """Measure one side of a case, in this process."""
    return next(case for case in CASES if case.name == name).measure(side)


@contextmanager
def processes(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that each measure once. They are forked from one that has imported vLLM, which takes 14 seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tidepool.replay.run"])
    # What vLLM and its libraries print goes nowhere: it would tear the progress bar. Errors come back as exceptions.
    sys.stdout.flush()
    kept = [os.dup(1), os.dup(2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        forkserver.ensure_running()
    finally:
        os.dup2(kept[0], 1)
        os.dup2(kept[1], 2)
        for file in (*kept, nowhere):
            os.close(file)
    with ProcessPoolExecutor(workers, context, max_tasks_per_child=1) as pool:
        yield pool


def run(cases: Sequence[Case], workers: int, console: Console) -> tuple[dict[tuple[str, str], Figures], dict[str, str]]:
    """Measure all cases.

    Returns:
        (figures by case and side, and for cases without what their engine said).
    """
    figures: dict[tuple[str, str], Figures] = {}
    failures: dict[str, str] = {}
    columns = (TextColumn("{task.description:<40}"), BarColumn(None), MofNCompleteColumn(), TimeElapsedColumn())
    with processes(workers) as pool, Progress(*columns, console=console) as progress:
        task = progress.add_task("starting", total=len(cases) * len(SIDES))
        jobs = {pool.submit(measure, case.name, side): (case.name, side) for case in cases for side in SIDES}
        for done in as_completed(jobs):
            name, side = jobs[done]
            try:
                figures[name, side] = done.result()
            except Exception as error:
                failures[name] = f"{side}: {type(error).__name__}: {error}".splitlines()[0]
            progress.update(task, advance=1, description=name)
    return figures, failures


def rows_of(
    cases: Sequence[Case], figures: dict[tuple[str, str], Figures], failures: dict[str, str]
) -> list[dict[str, Any]]:
    """A row for each check, as plain data."""
    rows: list[dict[str, Any]] = []
    for case in cases:
        if case.name in failures:
            rows.append(
                {"case": case.name, "what": failures[case.name], "stock": None, "tidepool": None, "holds": False}
            )
            continue
        stock, tidepool = (figures[case.name, side] for side in SIDES)
        for check in case.checks:
            pair = stock[check.key], tidepool[check.key]
            row = {"case": case.name, "what": check.what, "stock": pair[0], "tidepool": pair[1]}
            rows.append(row | {"words": tuple(map(check.words, pair)), "holds": check.holds(*pair)})
    return rows


def print_rows(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """The table."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("case")
    table.add_column("what is measured", ratio=1)
    for title in ("stock", "tidepool"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("holds")
    before = None
    for row in rows:
        stock, tidepool = row.get("words", ("-", "-"))
        holds = "[green]yes[/]" if row["holds"] else "[red]no[/]"
        table.add_row("" if row["case"] == before else row["case"], row["what"], stock, tidepool, holds)
        before = row["case"]
    console.print(table)
    console.print(f"{sum(row['holds'] for row in rows)} of {len(rows)} rows hold.")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="cases whose names contain one of these")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    parser.add_argument("--workers", type=int, default=2, help="processes that measure at once")
    args = parser.parse_args()
    cases = [case for case in CASES if not args.only or any(part in case.name for part in args.only)]
    if not cases:
        parser.error(f"no case has {' or '.join(args.only)} in its name; --list prints them")
    if args.list:
        print("\n".join(case.name for case in cases))
        return
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    figures, failures = run(cases, args.workers, Console(stderr=True))
    rows = rows_of(cases, figures, failures)
    print_rows(rows, Console(width=None if sys.stdout.isatty() else 160))
    if args.json:
        kept = [{key: value for key, value in row.items() if key != "words"} for row in rows]
        args.json.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    sys.exit(0 if all(row["holds"] for row in rows) else 1)


if __name__ == "__main__":
    main()

"""`tidepool verify MODEL`: a model of the user's own, on stock vLLM and on tidepool in turn, with the same bytes.

Its answers must equal stock vLLM's, or part from them where the best two tokens are as good as equal. How far apart
those may be is what rounding does: stock vLLM runs a second time with steps of another size, which cuts prompts in
other places.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from tidepool.cache import StateFormat
from tidepool.command_line import cannot_write, fail
from tidepool.running.agreement import BFLOAT16_GAP, Logprobs, first_gap
from tidepool.running.environment import environment_of
from tidepool.running.process import Child, ChildError
from tidepool.sides import Side


@dataclass(frozen=True)
class Job:
    """What a worker process runs."""

    side: Side
    model: str
    options: Sequence[str]
    """Of vLLM's command line."""
    kv_bytes: int | None = None
    """KV memory of a rank; None for what vLLM takes."""
    step_tokens: int | None = None
    """``max_num_batched_tokens``; None for what the options or vLLM say."""
    checkpoint_states: StateFormat | None = None
    """In which format the elastic partition keeps cached states; None for what the options say."""


@dataclass(frozen=True)
class Made:
    """What a worker process tells."""

    answers: list[list[int]]
    logprobs: Sequence[Logprobs]
    kv_bytes: int
    other_step_tokens: int
    """A ``max_num_batched_tokens`` that cuts prompts in other places."""
    step_seconds: float | None
    """Median time of a step in which as many requests as ever decode, and none reads a prompt; None without any."""
    hit_tokens: int
    preemptions: int
    in_use_at_end: float
    """Share of the memory in use after the last request."""


@dataclass(frozen=True)
class Compared:
    """A run beside the reference, stock vLLM's first."""

    name: str
    made: Made
    gaps: list[float]
    """For each answer that parts, how much likelier the reference found its own token there (log-probabilities)."""
    ratio: float | None
    """Time of a decode step over the reference's."""


def verify(
    model: str,
    options: Sequence[str],
    directory: Path,
    json_file: Path | None,
    console: Console,
    checkpoint_states: StateFormat | None = None,
) -> None:
    """Compare, print, and end with code 1 if something doesn't hold.

    Args:
        model: as vLLM takes it.
        options: of vLLM's command line.
        directory: for logs.
        json_file: where to write all numbers.
        console: where to print.
        checkpoint_states: in which format the elastic partition keeps cached states; None for what the options say.
    """
    side: Side = "fixed" if os.environ.get("TIDEPOOL") == "fixed" else "elastic"
    try:
        console.print(f"{model}: stock vLLM, tidepool ({side}), and stock vLLM with steps of another size.")
        reference = _run(Job("stock", model, options), directory / "own-stock.log")
        job = Job(side, model, options, reference.kv_bytes, checkpoint_states=checkpoint_states)
        ours = _run(job, directory / f"own-{side}.log")
        again = Job("stock", model, options, reference.kv_bytes, reference.other_step_tokens)
        noise = _run(again, directory / "own-stock-again.log")
        rows = [
            compare("stock vLLM", reference, reference),
            compare(f"stock vLLM, steps of {reference.other_step_tokens:,} tokens", reference, noise),
            compare(f"tidepool {side}", reference, ours),
        ]
        found = failures(rows[1], rows[2])
        if json_file is not None:
            content = {"holds": not found, "failures": found, "rows": [asdict(row) for row in rows]}
            json_file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except ChildError as error:
        fail(f"vLLM failed: {error}", 1)
    except OSError as error:
        fail(cannot_write(error), 1)
    print_rows(rows, found, console)
    if found:
        raise typer.Exit(1)


def compare(name: str, reference: Made, made: Made) -> Compared:
    """A run beside the reference."""
    pairs = zip(reference.answers, reference.logprobs, made.answers, strict=True)
    gaps = [gap for each in pairs if (gap := first_gap(*each)) is not None]
    times = made.step_seconds, reference.step_seconds
    return Compared(name, made, gaps, times[0] / times[1] if times[0] and times[1] else None)


def failures(noise: Compared, ours: Compared) -> list[str]:
    """What should hold of tidepool's run and doesn't, a sentence each."""
    bound, found = bound_of(noise), []
    if over := [gap for gap in ours.gaps if gap > bound]:
        found.append(f"{len(over)} answers part from stock vLLM's by more than {bound:.2f}.")
    if ours.made.in_use_at_end:
        found.append(f"{ours.made.in_use_at_end:.1%} of the memory is in use after the last request.")
    return found


def bound_of(noise: Compared) -> float:
    """How far apart two tokens may be where answers part: the bound of tidepool's tests, or stock vLLM's own noise."""
    return max(BFLOAT16_GAP, *(gap for gap in noise.gaps if gap < float("inf")), 0)


def print_rows(rows: Sequence[Compared], found: Sequence[str], console: Console) -> None:
    """Print the table and the verdict."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for title in ("", "equal", "worst gap", "hit tokens", "preempted", "decode step", "ratio"):
        table.add_column(title, no_wrap=True, justify="right" if title else "left")
    for row in rows:
        made = row.made
        table.add_row(
            row.name,
            f"{len(made.answers) - len(row.gaps)}/{len(made.answers)}",
            f"{max(row.gaps):.2f}" if row.gaps else "",
            f"{made.hit_tokens:,}",
            f"{made.preemptions:,}",
            f"{1e3 * made.step_seconds:.2f} ms" if made.step_seconds else "",
            f"{row.ratio:.3f}" if row.ratio else "",
        )
    console.print(table)
    console.print(
        "worst gap: of two tokens' log-probabilities where an answer parts from the first row's.", style="dim"
    )
    for failure in found:
        console.print(f"FAILED: {failure}", style="red")
    if not found:
        console.print(f"Holds: answers are stock vLLM's, or part where two tokens are within {bound_of(rows[1]):.2f}.")


def _run(job: Job, log: Path) -> Made:
    """Run a job in a process of its own.

    Raises:
        ChildError: it failed, or tidepool didn't serve.
    """
    with Child("tidepool.verify.own_worker", log, _without_one_core(environment_of(job.side, os.environ))) as child:
        child.send(asdict(job))
        return Made(**child.receive())


def _without_one_core(environ: Mapping[str, str]) -> dict[str, Any]:
    """One process runs at a time here: it gets the cores that the user lets it have."""
    limits = ("OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND")
    return {name: value for name, value in environ.items() if name not in limits or name in os.environ}

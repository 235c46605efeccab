"""The command ``tidepool compare``."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from threading import Lock
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from tidepool.command_line import NO_VLLM, UsageError, cannot_write, fail, has_vllm
from tidepool.compare import drive, report
from tidepool.compare.workloads import CHAT, LONG, SHORT, WORKLOADS, Workload, halved
from tidepool.sides import SIDES, Side
from tidepool.sizes import parse_size

WIDTH = 100
REPEATS = 3
BUILT_IN: dict[str, tuple[int, tuple[Workload, ...]]] = {
    "qwen3.5": (130_000_000, WORKLOADS),
    "nemotron-h": (100_000_000, (replace(SHORT, conversations=64), replace(LONG, conversations=32), CHAT)),
}
"""Families of the tiny checkpoints: KV bytes, about 40 extents, and more requests than fit in them at once."""


def compare(
    model: Annotated[
        list[Path] | None,
        typer.Option(help="Directory of a model; may be given several times. By default two tiny models are made."),
    ] = None,
    sides: Annotated[
        str, typer.Option(help=f"Whose memory to run: {', '.join(SIDES)}. stock must be there.")
    ] = "stock,elastic",
    kv_memory: Annotated[
        str | None, typer.Option(help="KV memory of each engine, like 120MB; needed with --model.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write all numbers to this file.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each workload.")] = REPEATS,
    quick: Annotated[bool, typer.Option("--quick", help="Half the requests, and each workload runs once.")] = False,
    workdir: Annotated[Path, typer.Option(help="Where the tiny models and vLLM's logs go.")] = Path(".cache/tidepool"),
) -> None:
    """Compare stock vLLM and tidepool: the same requests on the same bytes of KV memory."""
    try:
        chosen = parse_sides(sides)
        if not has_vllm():
            raise drive.CompareError(NO_VLLM)
        subjects = _subjects(model, kv_memory, quick, workdir)
        results = _measure(subjects, chosen, 1 if quick else repeats, workdir)
        if json_file is not None:
            json_file.write_text(json.dumps(report.to_json(results), indent=2) + "\n", encoding="utf-8")
    except UsageError as error:
        fail(str(error), 2)
    except drive.CompareError as error:
        fail(str(error), 1)
    except OSError as error:
        fail(cannot_write(error), 1)
    console = Console(width=None if os.isatty(1) else WIDTH, highlight=False)
    _print(results, console)
    if report.failures(results):
        raise typer.Exit(1)


def parse_sides(text: str) -> list[Side]:
    """Sides of ``stock,elastic``, stock first, as the others are compared with it.

    Raises:
        UsageError: one isn't known, or there is nothing to compare.
    """
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in SIDES:
            raise UsageError(f"There is no side {name!r}: choose from {', '.join(SIDES)}.")
    chosen = [side for side in SIDES if side in names]
    if chosen[:1] != ["stock"] or len(chosen) < 2:
        raise UsageError("--sides needs stock and at least one of elastic and fixed.")
    return chosen


def _subjects(models: Sequence[Path] | None, kv_memory: str | None, quick: bool, workdir: Path) -> list[drive.Subject]:
    kv_bytes = None if kv_memory is None else parse_size(kv_memory)
    if not models:
        return [
            drive.Subject(
                f"tiny-{family}",
                _tiny_checkpoint(family, workdir),
                kv_bytes or (default // 2 if quick else default),
                tuple(map(halved, workloads)) if quick else workloads,
            )
            for family, (default, workloads) in BUILT_IN.items()
        ]
    if kv_bytes is None:
        raise UsageError("--model needs --kv-memory, small enough that it limits how many requests run at once.")
    names = [path.resolve().name for path in models]
    for path, name in zip(models, names, strict=True):
        if not (path / "config.json").is_file():
            raise UsageError(f"There is no model in {path}: it has no config.json.")
        if names.count(name) > 1:
            raise UsageError(f"Two models are called {name}: compare them one after the other.")
    workloads = tuple(map(halved, WORKLOADS)) if quick else WORKLOADS
    return [drive.Subject(name, path.resolve(), kv_bytes, workloads) for path, name in zip(models, names, strict=True)]


def _tiny_checkpoint(family: str, workdir: Path) -> Path:
    """The tiny checkpoint of a family, made if it isn't there; a new recipe gets a new directory."""
    recipe = sha256(files("tidepool.testing").joinpath("tiny.py").read_bytes()).hexdigest()[:12]
    path = workdir.resolve() / f"tiny-{recipe}" / family
    if not path.exists():
        from tidepool.testing.tiny import make_checkpoint

        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as unfinished:
            made = make_checkpoint(family, Path(unfinished) / family)  # type: ignore[arg-type]
            shutil.move(made, path)
    return path


def _measure(
    subjects: Sequence[drive.Subject], sides: Sequence[Side], repeats: int, workdir: Path
) -> list[report.ModelResult]:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks = {
            each.name: bar.add_task(f"{each.name}: start", total=each.steps(len(sides), repeats)) for each in subjects
        }
        lock = Lock()

        def progress(model: str, step: str) -> None:
            with lock:
                bar.update(tasks[model], advance=1, description=f"{model}: {step}")

        measured = drive.measure(
            subjects,
            sides,
            repeats=repeats,
            directory=workdir / "logs",
            progress=progress,
        )
    return [report.summarize(each) for each in measured]


def _print(results: Sequence[report.ModelResult], console: Console) -> None:
    console.print("The same model, KV bytes and requests for each kind of memory.")
    for result in results:
        report.print_result(result, console)
    console.print()
    for note in report.notes(results):
        console.print(note, style="dim")
    problems = report.failures(results)
    for problem in problems:
        console.print(f"FAILED: {problem}", style="red")
    if not problems:
        console.print("Holds: the same outputs, and never fewer requests at once than stock.")

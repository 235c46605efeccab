"""The command ``tidepool verify``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from tidepool.command_line import NO_VLLM, cannot_write, fail, has_vllm
from tidepool.verify import drive, report
from tidepool.verify.scenarios import PARTS, QUICK_PARTS

WIDTH = 100


def verify(
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write all numbers to this file.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Three scenarios, on stock vLLM and elastic.")] = False,
    workdir: Annotated[Path, typer.Option(help="Where vLLM's logs go.")] = Path(".cache/tidepool"),
) -> None:
    """Check the memory on this machine: a trained model must answer right, and as on stock vLLM."""
    if not has_vllm():
        fail(NO_VLLM, 1)
    if json_file is not None and not json_file.parent.is_dir():
        fail(f"There is no directory {json_file.parent} to write {json_file.name} to.", 2)
    parts = QUICK_PARTS if quick else PARTS
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("starting vLLM", total=len(parts))
            results = drive.run(parts, workdir / "verify", lambda done: bar.update(task, advance=1, description=done))
        rows = report.judge(results)
        if json_file is not None:
            json_file.write_text(json.dumps(report.to_json(results, rows), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        fail(cannot_write(error), 1)
    report.print_report(results, rows, Console(width=None if os.isatty(1) else WIDTH, highlight=False))
    if report.failures(results, rows):
        raise typer.Exit(1)

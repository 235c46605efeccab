"""A replay as tables for a terminal."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tidepool.replay.job import USES
from tidepool.replay.report import (
    USE_TITLES,
    Report,
    describe,
    layout,
    made_by,
    mean_uses,
    missing,
    rows,
    title,
    verdict,
)
from tidepool.sizes import size

WIDTH = 120


def print_report(report: Report, console: Console) -> None:
    """Print everything."""
    first = report.results[0]
    console.print(Text.assemble((report.setting.model, "bold"), f"  {first.requests:,} requests, "), end="")
    console.print(Text(f"{first.prompt_tokens:,} prompt tokens, {first.output_tokens:,} to generate"))
    console.print(Text(describe(report.setting)))
    console.print()
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("")
    for result in report.results:
        table.add_column(title(result), justify="right")
    for row in rows(report.results):
        table.add_row(row.label, *(row.of(result) for result in report.results))
    table.add_section()
    table.add_row(Text("mean bytes by use", style="bold"))
    means = [mean_uses(result) for result in report.results]
    for index, use in enumerate(USES):
        table.add_row(f"  {USE_TITLES[use][0]}", *(size(mean[index]) for mean in means))
    console.print(table)
    console.print()
    for result in report.results:
        console.print(Text.assemble((f"{title(result)}: ", "bold"), layout(result)))
    for line in missing(report):
        console.print(Text(line, style="yellow"))
    console.print()
    console.print(Text(verdict(report.results), style="bold"))
    console.print(Text(made_by(report.setting), style="dim"))

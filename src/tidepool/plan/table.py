"""The plan as tables for a terminal, 100 columns wide."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tidepool.plan import formatting
from tidepool.plan.planner import CapacityPlan
from tidepool.plan.rows import NONE, sections
from tidepool.sides import TITLES

WIDTH = 100
_LABEL, _CELL = 31, 21


def print_plan(plan: CapacityPlan, console: Console) -> None:
    """Print everything."""
    weights = f"{plan.parameters / 1e9:.2f} B weights"
    console.print(Text.assemble((plan.model_name, "bold"), f"  {plan.family}, {weights}"))
    console.print(Text(formatting.budget(plan)))
    if reserved := formatting.reserved(plan):
        console.print(Text(reserved, style="dim"))
    console.print(Text(formatting.setting(plan)), Text(f"\nShapes: {plan.source}.", style="dim"), sep="")
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("", width=_LABEL)
    for title in TITLES.values():
        table.add_column(title, width=_CELL, justify="right")
    table.add_row("  served by", *(formatting.serves(plan, kind) for kind in TITLES))
    console.print()
    console.print(table)
    for line in plan.startup:
        console.print(Text(f"  stock vLLM's log: {line}", style="dim"))
    console.print()
    for section in sections(plan):
        console.print(Text(section.title, style="bold"))
        table = Table(box=None, show_header=False, show_edge=False, pad_edge=False)
        table.add_column(width=_LABEL)
        for _ in TITLES:
            table.add_column(width=_CELL, justify="right")
        for label, cells in section.rows:
            table.add_row(f"  {label}", *cells.values())
        console.print(table)
        console.print()
    console.print(_legend(plan))
    if plan.dtypes:
        console.print(
            Text(f"Tokens beside {formatting.requests(plan.dtype_requests)}, by KV cache dtype", style="bold")
        )
        console.print(_dtypes(plan))
    for note in formatting.notes(plan):
        console.print(Text(f"\n{note}", style="yellow"))


def _legend(plan: CapacityPlan) -> Table:
    table = Table(box=None, show_header=False, show_edge=False, pad_edge=False)
    table.add_column(width=_LABEL, style="dim")
    table.add_column(style="dim")
    for name, (title, meaning) in formatting.PARTS.items():
        if any(column.account.parts()[name] for column in plan.columns.values()):
            table.add_row(f"  {title}", meaning)
    table.add_row("", "")
    return table


def _dtypes(plan: CapacityPlan) -> Table:
    table = Table(box=None, show_header=False, show_edge=False, pad_edge=False)
    table.add_column(width=_LABEL)
    for _ in TITLES:
        table.add_column(width=_CELL, justify="right")
    for row in plan.dtypes:
        cells = [formatting.tokens(row.tokens[kind]) if kind in row.tokens else NONE for kind in TITLES]
        style = "bold" if plan.options.kv_dtype in (row.kv_dtype, *row.also) else None
        table.add_row(f"  {row.kv_dtype}, {row.token_bytes:,} B", *cells, style=style)
    return table

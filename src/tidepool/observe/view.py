"""A look at a server, drawn for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate, groupby

from rich.box import ROUNDED
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from tidepool.cache import LookupResult, TokenResult
from tidepool.observe.look import USES, Look
from tidepool.sizes import percent, size

COLOURS = {
    "states": "#5b9be0",
    "attention": "#31b5bd",
    "cached_states": "#2f5580",
    "cached_attention": "#1c666b",
    "free": "#d3b13f",
    "padding": "#dc6a58",
    "unowned": "#59636d",
    "null": "#a58a74",
}
"""Those of the plan's page, and darker ones for what is cached."""
WORDS = {
    "states": "states in use",
    "attention": "attention in use",
    "cached_states": "cached states",
    "cached_attention": "cached attention",
    "free": "free",
    "padding": "padding",
    "unowned": "unowned",
    "null": "null blocks",
}
RESULTS = {
    LookupResult.HIT: "hit",
    LookupResult.NEW: "miss: nobody left this beginning",
    LookupResult.NO_STATE: "miss: attention without a state",
    LookupResult.EVICTED: "miss: evicted before the return",
    LookupResult.SHORT: "miss: shorter than a block",
    LookupResult.OTHER_KEY: "miss: other salt, adapter or image",
}
TOKENS = {
    TokenResult.DEVICE: "hit on the device",
    TokenResult.HOST: "hit, loaded from the host",
    TokenResult.NO_STATE: "attention without a state",
    TokenResult.EVICTED: "evicted before the return",
    TokenResult.NEW: "nobody left them",
}
_MAP_LINES = 3
_LEGEND = 36
"""Columns of an entry of the legend."""


def draw(look: Look, before: Look | None = None, seconds: float = 0.0, *, width: int = 100) -> RenderableType:
    """Everything.

    Args:
        look: what is drawn.
        before: an earlier look, for rates; None if there is none yet.
        seconds: since then.
        width: columns.
    """
    parts: list[RenderableType] = [_head(look), *(_map(look, tier, width) for tier in look.memory)]
    row = Table.grid(expand=True, padding=(0, 1))
    row.add_column(ratio=1)
    row.add_column(ratio=1)
    row.add_row(_requests(look, before, seconds), _prefixes(look))
    return Group(*parts, row)


def _head(look: Look) -> Text:
    engines = f", {look.engines} engines" if look.engines > 1 else ""
    return Text.assemble(
        (look.model, "bold"),
        f"  {look.partition} partition{engines}   running ",
        (f"{look.running:,}", "bold"),
        f" of {look.max_num_seqs * look.engines:,}   waiting ",
        (f"{look.waiting:,}", "bold red" if look.waiting else "bold"),
        f"   usage {percent(look.usage)}   preempted {look.preemptions:,}",
    )


def cells(uses: Mapping[str, int], count: int) -> list[str]:
    """The use of each of so many cells of the map; each part is right to a cell."""
    total = sum(uses.values()) or 1
    ends = [round(end * count / total) for end in accumulate(uses[use] for use in USES)]
    starts = [0, *ends]
    return [use for use, start, end in zip(USES, starts, ends, strict=False) for _ in range(end - start)]


def _map(look: Look, tier: str, width: int) -> Panel:
    uses, total = look.memory[tier], look.bytes_of(tier)
    columns = width - 4
    drawn, all_cells = Text(), cells(uses, columns * _MAP_LINES)
    for start in range(0, len(all_cells), columns):
        drawn.append("\n" if start else "")
        for use, same in groupby(all_cells[start : start + columns]):
            drawn.append("█" * len(list(same)), COLOURS[use])
    legend = Table.grid(padding=(0, 2))
    shown = [
        Text.assemble(("■ ", COLOURS[use]), f"{WORDS[use]} ", (size(count), "bold"), f" {percent(count / total)}")
        for use, count in uses.items()
        if count
    ]
    beside = max(1, columns // _LEGEND)
    for start in range(0, len(shown), beside):
        legend.add_row(*shown[start : start + beside])
    title = f"{'KV memory' if tier == 'device' else 'host memory'}, {size(total)}"
    return Panel(Group(drawn, legend), title=title, title_align="left", box=ROUNDED, width=width)


def _requests(look: Look, before: Look | None, seconds: float) -> Panel:
    table = _rows()
    if look.extents:
        moved = f"{look.moves:,}"
        if before and seconds:
            moved += f"  ({(look.moves - before.moves) / seconds:,.1f}/s)"
        held = "  ".join(f"{WORDS[use]} {count:,}" for use, count in look.extents.items() if count and use != "null")
        table.add_row("extents that moved", moved)
        table.add_row("extents", held)
    if before and seconds:
        rate = (look.allocated_bytes - before.allocated_bytes) / seconds
        table.add_row("allocated", f"{size(max(0, round(rate)))}/s")
    for kind, count in look.refused.items():
        if count:
            short = "running will need it" if kind == "reserve" else f"short of {kind}"
            table.add_row(f"refused, {short}", f"{count:,}")
    evicted = {name: count for name, count in look.evicted.items() if count}
    for name, count in evicted.items():
        table.add_row(f"evicted, {name}", f"{count:,}")
    if look.eviction_age is not None:
        table.add_row("age at eviction, median", f"{look.eviction_age:g} memories")
    if look.return_age is not None:
        table.add_row("age at return, 3 of 4", f"up to {look.return_age:g} memories")
    return Panel(table, title="memory on the move", title_align="left", box=ROUNDED)


def _prefixes(look: Look) -> Panel:
    table = _rows()
    requests, tokens = sum(look.lookups.values()), sum(look.tokens.values())
    for result, words in RESULTS.items():
        if count := look.lookups[result]:
            table.add_row(words, f"{count:,}  {percent(count / requests)}")
    table.add_row("")
    for part, words in TOKENS.items():
        if count := look.tokens[part]:
            table.add_row(f"tokens: {words}", f"{count:,}  {percent(count / tokens)}")
    if left := look.branch_checkpoints.get("left"):
        table.add_row("branch checkpoints used", f"{look.branch_checkpoints.get('used', 0):,} of {left:,}")
    if not requests:
        table.add_row("no prompt was looked up", "")
    return Panel(table, title="hits and misses", title_align="left", box=ROUNDED)


def _rows() -> Table:
    table = Table.grid(expand=True, padding=(0, 1))
    table.add_column()
    table.add_column(justify="right")
    return table

"""The plan as rows of text, the same for the terminal and the page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tidepool.plan import formatting
from tidepool.plan.planner import SHORT_REQUEST, CapacityPlan, Column
from tidepool.sides import TITLES, Side
from tidepool.sizes import percent, size

NONE = "-"
"""A cell without an answer."""
_CUT: dict[Side, str] = {"stock": "equal blocks", "fixed": "one share a group", "elastic": "extents"}
_BLOCKS = {
    "attention": "an attention block",
    "window": "a window block",
    "state": "a state block",
    "packed": "a packed state",
}


@dataclass
class Section:
    """Rows under one title."""

    title: str
    rows: list[tuple[str, dict[Side, str]]] = field(default_factory=list)

    def add(self, plan: CapacityPlan, name: str, answer: Callable[..., str], *about: Any) -> None:
        """Add a row of ``answer(column, *about)``, unless there is no answer in any column."""
        cells = {kind: answer(plan.columns[kind], *about) if kind in plan.columns else NONE for kind in TITLES}
        if set(cells.values()) - {NONE}:
            self.rows.append((name, cells))


def sections(plan: CapacityPlan) -> list[Section]:
    """All rows."""
    cut = Section("How the memory is cut")
    cut.add(plan, "into", lambda column: _CUT[column.memory.kind])
    cut.add(plan, "size of one", _unit_size)
    cut.add(plan, "how many, one of them null", _units)
    cut.add(plan, "groups of layers", lambda column: f"{len(column.memory.groups):,}")
    cut.add(plan, "tokens in an attention block", _block_tokens)
    for label, name in _BLOCKS.items():
        cut.add(plan, f"bytes of {name}", _block_size, label)
        cut.add(plan, "  of it padding", _block_padding, label)

    held = Section("Tokens that fit in all, prefix cache included, beside")
    first = next(iter(plan.columns.values()))
    for count in first.tokens:
        held.add(plan, f"{formatting.requests(count)} running", _tokens, count)

    if plan.options.prefix_caching:
        held.add(plan, "states in the cache, alone", _cached_states)
        held.add(plan, "  for each GiB", _states_per_gib)

    running = Section("Requests that run at once (* as many as --max-num-seqs allows)")
    running.add(plan, "of 1 token", lambda column: _limited(column, column.max_requests))
    if plan.options.prefix_caching:
        running.add(plan, "  while they cache no state", lambda column: _limited(column, column.max_decoding))
    for length in first.concurrency:
        running.add(plan, f"of {length:,} tokens", _concurrency, length)
    running.add(plan, "longest request, tokens", lambda column: f"{column.longest:,}")
    running.add(plan, f"bytes that {SHORT_REQUEST} tokens pin", lambda column: size(column.pinned_by_short))

    kept = Section("")
    if plan.host is not None:
        kept.title = (
            f"Prompts that {size(plan.options.host_bytes)} of host memory hold at most, each with a state at its end"
        )
        kept.add(plan, "extents of a rank", _of_host, plan.host.extents)
        for length, count in plan.host.prompts.items():
            kept.add(plan, f"of {length:,} tokens", _of_host, count)

    bytes_ = Section(f"Where the bytes go while {formatting.mix(plan)} run")
    bytes_.add(plan, "requests of these that fit", _admitted)
    for part, (title, _) in formatting.PARTS.items():
        bytes_.add(plan, title, _part, part)
    return [section for section in (cut, held, running, kept, bytes_) if section.rows]


def _unit_size(column: Column) -> str:
    return size(column.memory.unit_bytes) if column.memory.unit_bytes else NONE


def _units(column: Column) -> str:
    return f"{column.memory.units:,}" if column.memory.units else NONE


def _block_tokens(column: Column) -> str:
    step = column.memory.token_step
    return NONE if step is None else f"{step:,}"


def _block_size(column: Column, label: str) -> str:
    largest = max((group.stride for group in column.memory.groups if group.label == label), default=0)
    return size(largest) if largest else NONE


def _block_padding(column: Column, label: str) -> str:
    groups = [group for group in column.memory.groups if group.label == label]
    return percent(max(groups, key=lambda g: g.padding).padding) if groups else NONE


def _tokens(column: Column, count: int) -> str:
    return formatting.tokens(column.tokens[count])


def _cached_states(column: Column) -> str:
    return NONE if column.cached_states is None else f"{column.cached_states:,}"


def _states_per_gib(column: Column) -> str:
    if column.cached_states is None:
        return NONE
    return f"{column.cached_states * (1 << 30) / column.memory.budget_bytes:.1f}"


def _concurrency(column: Column, length: int) -> str:
    return _limited(column, column.concurrency[length])


def _limited(column: Column, count: int) -> str:
    return f"{count:,}*" if count == column.memory.max_num_seqs else f"{count:,}"


def _of_host(column: Column, count: int) -> str:
    """The same behind both partitions. Stock vLLM's own offloading cuts host memory otherwise."""
    return NONE if column.memory.kind == "stock" else f"{count:,}"


def _admitted(column: Column) -> str:
    return f"{sum(item.count for item in column.admitted):,}"


def _part(column: Column, part: str) -> str:
    count = column.account.parts()[part]
    return f"{size(count)} {percent(count / column.account.total):>6}" if count else NONE

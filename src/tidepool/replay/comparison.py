"""Several replays in one table and on one page: what more memory, another policy or host memory brings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from tidepool.page import cells, document, keys, table
from tidepool.replay.job import Result
from tidepool.replay.plot import curve_plot
from tidepool.replay.report import Report, Setting, describe, duration, title
from tidepool.sizes import size

_GIB = 1 << 30
_LIGHT, _DARK = (40, 62), (62, 58)
"""Lightness and saturation of curves' colours, in percent, on light and dark pages."""


@dataclass(frozen=True)
class Run:
    """One mode of one replay."""

    setting: Setting
    result: Result

    def series(self, differing: Sequence[str]) -> str:
        """Which runs it stands on one curve with: those that differ by the memory of the device alone."""
        words = [title(self.result)]
        words += [_WORDS[key](self.setting) for key in differing if _counts(key, self.result)]
        return ", ".join(filter(None, words))


_WORDS: dict[str, Callable[[Setting], str]] = {
    "model": lambda s: s.model,
    "source": lambda s: s.source,
    "rate": lambda s: f"rate {s.rate:g}",
    "gpu": lambda s: s.gpu,
    "tp": lambda s: f"tp {s.tp}",
    "kv_dtype": lambda s: f"KV {s.kv_dtype}",
    "eviction": lambda s: f"evicts by {s.eviction}",
    "queue": lambda s: "hits go first" if s.queue == "hits-first" else "first come, first served",
    "checkpoint_states": lambda s: f"cached states {s.checkpoint_states}",
    "block_size": lambda s: f"blocks of {s.block_size} tokens",
    "host_bytes": lambda s: f"{size(s.host_bytes)} of host memory" if s.host_bytes else "no host memory",
    "host_bandwidth": lambda s: f"{s.host_bandwidth / 1e9:g} GB/s" if s.host_bytes else "",
    "prefix_caching": lambda s: "" if s.prefix_caching else "no prefix caching",
    "draft_tokens": lambda s: f"{s.draft_tokens} drafts" if s.draft_tokens else "no drafts",
    "acceptance": lambda s: f"{s.acceptance:.0%} accepted" if s.draft_tokens else "",
    "drop_reasoning": lambda s: f"{s.drop_reasoning:.0%} of answers dropped",
    "max_num_seqs": lambda s: f"at most {s.max_num_seqs:,} requests",
    "max_num_batched_tokens": lambda s: f"steps of {s.max_num_batched_tokens:,} tokens",
    "seed": lambda s: f"seed {s.seed}",
    "versions": lambda s: " ".join(f"{name} {version}" for name, version in s.versions.items()),
}
"""What runs may differ by, beside the memory of the device, and how that is said."""
COLUMNS: tuple[tuple[str, Callable[[Run], str]], ...] = (
    ("memory", lambda run: size(run.setting.kv_bytes)),
    ("hits", lambda run: f"{run.result.hit_rate:.2%}"),
    ("TTFT, mean", lambda run: duration(run.result.ttft.mean)),
    ("p95", lambda run: duration(run.result.ttft.p95)),
    ("per token", lambda run: duration(run.result.tpot.mean) if run.result.tpot else "-"),
    ("end to end", lambda run: duration(run.result.e2e.mean)),
    ("tokens/s", lambda run: f"{run.result.output_rate:,.0f}"),
    ("preempted", lambda run: f"{run.result.preemptions:,}"),
)
PLOTS: tuple[tuple[str, str, str, Callable[[Result], float]], ...] = (
    ("Token hit rate", "Prompt tokens found in the prefix cache.", "%", lambda r: 100 * r.hit_rate),
    ("Time to the first token", "Mean, in virtual time.", " s", lambda r: r.ttft.mean),
    ("End to end", "Mean time from arrival to the last token.", " s", lambda r: r.e2e.mean),
    ("Output tokens a second", "From the first arrival to the last token.", "", lambda r: r.output_rate),
)


def print_comparison(reports: Sequence[Report], console: Console) -> None:
    """A table of all runs."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("")
    for name, _ in COLUMNS:
        table.add_column(name, justify="right")
    for series, runs in curves_of(reports).items():
        for index, run in enumerate(runs):
            table.add_row("" if index else series, *(of(run) for _, of in COLUMNS))
    console.print(table)


def comparison_to_dict(reports: Sequence[Report]) -> dict[str, list[dict[str, Any]]]:
    """The figures of all runs, by the name of their curve, as JSON."""
    return {
        series: [{"kv_bytes": run.setting.kv_bytes, **_figures(run.result)} for run in runs]
        for series, runs in curves_of(reports).items()
    }


def curves_of(reports: Sequence[Report]) -> dict[str, list[Run]]:
    """Runs that differ by the memory of the device alone, by the name of their curve, smallest memory first."""
    settings = [report.setting for report in reports]
    differing = [key for key in _WORDS if any(getattr(s, key) != getattr(settings[0], key) for s in settings)]
    curves: dict[str, list[Run]] = {}
    for report in reports:
        for result in report.results:
            run = Run(report.setting, result)
            curves.setdefault(run.series(differing), []).append(run)
    return {series: sorted(runs, key=lambda run: run.setting.kv_bytes) for series, runs in sorted(curves.items())}


def render_comparison(reports: Sequence[Report]) -> str:
    """The whole page."""
    curves = curves_of(reports)
    style = "\n".join(
        [
            ":root {", *_colours(len(curves), *_LIGHT), "}",
            "@media (prefers-color-scheme: dark) { :root {", *_colours(len(curves), *_DARK), "} }",
            ".rows td { white-space: nowrap; }",
            ".runs { margin: 8px 0 0; padding: 0; list-style: none; font-size: .9rem; overflow-wrap: anywhere; }",
        ]
    )  # fmt: skip
    commands = "".join(
        f'<li>{escape(describe(report.setting))}: <span class="quiet">{escape(report.setting.command)}</span></li>'
        for report in reports
    )
    models = ", ".join(dict.fromkeys(report.setting.model for report in reports))
    return document(
        f"{escape(models)}: replays compared",
        [
            f"<header><h1>{escape(models)}: {len(reports)} replays compared</h1>",
            f"<p>{escape(gain(curves))}</p></header>",
            keys({f"curve{index}": escape(series) for index, series in enumerate(curves)}),
            '<div class="two">',
            *(_plot(curves, *plot) for plot in PLOTS),
            "</div>",
            _table(curves),
            f'<section><h2>How they were made</h2><ul class="runs">{commands}</ul></section>',
        ],
        style,
    )


def gain(curves: dict[str, list[Run]]) -> str:
    """The run with most hits, and the least memory that comes near it, in two sentences."""
    runs = [(series, run) for series, members in curves.items() for run in members]
    series, best = max(runs, key=lambda each: each[1].result.hit_rate)
    near = min(
        (each for each in runs if each[1].result.hit_rate >= 0.95 * best.result.hit_rate),
        key=lambda each: each[1].setting.kv_bytes,
    )
    told = f"Most prompt tokens are found with {series} on {size(best.setting.kv_bytes)}: {best.result.hit_rate:.1%}."
    if near[1] is best:
        return f"{told} No run with less memory comes within a twentieth of that."
    return (
        f"{told} The least memory that comes within a twentieth of that is {size(near[1].setting.kv_bytes)} with "
        f"{near[0]}: {near[1].result.hit_rate:.1%}."
    )


def _counts(key: str, result: Result) -> bool:
    """Whether what a setting says matters to a mode."""
    if key in ("host_bytes", "host_bandwidth"):
        return result.mode != "bound"
    if key == "checkpoint_states":
        return result.mode == "elastic"
    return key not in ("eviction", "queue") or result.mode in ("fixed", "elastic")


def _figures(result: Result) -> dict[str, Any]:
    return {key: value for key, value in result.to_dict().items() if key not in ("samples", "groups")}


def _colours(count: int, lightness: int, saturation: int) -> list[str]:
    """As far apart as a circle of colours lets so many be."""
    return [f"--curve{n}: hsl({(205 + 360 * n / count) % 360:.0f} {saturation}% {lightness}%);" for n in range(count)]


def _plot(curves: dict[str, list[Run]], heading: str, meaning: str, unit: str, of: Callable[[Result], float]) -> str:
    points = [
        (f"var(--curve{index})", [(run.setting.kv_bytes / _GIB, of(run.result)) for run in runs])
        for index, runs in enumerate(curves.values())
    ]
    drawn = curve_plot(heading, unit, "GiB of KV memory on one device", points)
    return f'<section><h2>{heading}</h2><p class="quiet">{meaning}</p>{drawn}</section>'


def _table(curves: dict[str, list[Run]]) -> str:
    body = (
        cells("" if index else series, (of(run) for _, of in COLUMNS))
        for series, runs in curves.items()
        for index, run in enumerate(runs)
    )
    return f"<section><h2>All runs</h2>{table((name for name, _ in COLUMNS), body)}</section>"

"""A replay as one HTML page."""

from __future__ import annotations

from collections.abc import Callable
from html import escape

from tidepool.page import cells, document, facts, keys, table
from tidepool.replay.job import USES, Result, Sample
from tidepool.replay.plot import area_plot, line_plot
from tidepool.replay.report import (
    SPREADS,
    USE_TITLES,
    Report,
    describe,
    duration,
    layout,
    made_by,
    mean_uses,
    missing,
    rows,
    title,
    verdict,
)
from tidepool.sizes import size

_COLOURS = """
:root {
  --bound: #7a5bb0; --cached_states: #a9c7e8; --cached_attention: #a8dadd; --padding: #c94f3d; --idle: #e8ebe6;
}
@media (prefers-color-scheme: dark) {
  :root {
    --bound: #9c80d0; --cached_states: #2d5580; --cached_attention: #1d6a70; --padding: #dc6a58; --idle: #2a3034;
  }
}
.verdict { font-size: 1.15rem; }
.made { overflow-wrap: anywhere; }
.rows td { white-space: nowrap; }
.rows td:first-child { white-space: normal; }
.rows td:first-child.inner { padding-left: 1.2em; }
.groups { margin: 8px 0; padding: 0; list-style: none; font-size: .9rem; }
"""
"""Beside the style sheet of all pages: modes and uses that only a replay has."""
_GIB = 1 << 30
_MEANINGS = {
    "ttft": "From arrival to the first token",
    "tpot": "From one token of an answer to the next, a mean for each request",
    "e2e": "From arrival to the last token",
}


def render_page(report: Report) -> str:
    """The whole page."""
    name = escape(report.setting.model)
    first = report.results[0]
    return document(
        f"{name}: replay",
        [
            f"<header><h1>{name}: {first.requests:,} requests replayed</h1>",
            f'<p class="verdict">{escape(verdict(report.results))}</p>',
            f"<p>{first.prompt_tokens:,} prompt tokens, {first.output_tokens:,} to generate.</p>",
            f'<p class="quiet">{escape(describe(report.setting))}.</p></header>',
            _missing(report),
            facts((result.mode, title(result), _figures(result)) for result in report.results),
            '<div class="two">',
            _lines(
                report,
                "Token hit rate so far",
                "Prompt tokens found in the prefix cache, of all scheduled so far.",
                "%",
                lambda s: 100 * s.hit_tokens / max(s.prompt_tokens, 1),
            ),
            _lines(report, "Waiting requests", "Arrived and not yet running.", "", lambda s: s.waiting),
            _lines(report, "Running requests", "At most one token a step each.", "", lambda s: s.running),
            *(_bars(report, name, heading) for name, heading in SPREADS.items()),
            *(_memory(result, _end(report)) for result in report.results),
            "</div>",
            _table(report),
            '<p class="quiet">Real scheduler and memory management of vLLM; the model is a clock.</p>',
            f'<p class="quiet made">{escape(made_by(report.setting))}</p>',
        ],
        _COLOURS,
    )


def _missing(report: Report) -> str:
    lines = "".join(f"<li>{escape(line)}</li>" for line in missing(report))
    return f'<ul class="lines">{lines}</ul>' if lines else ""


def _figures(result: Result) -> list[tuple[str, str]]:
    times = [(name, getattr(result, name)) for name in SPREADS]
    return [
        ("token hit rate", f"{result.hit_rate:.2%}"),
        *((f"{SPREADS[name]}, mean", duration(found.mean)) for name, found in times if found),
        ("output tokens/s", f"{result.output_rate:,.0f}"),
    ]


def _end(report: Report) -> float:
    """Where the axis of time ends in all plots."""
    return max(result.samples[-1].seconds for result in report.results)


def _keys(report: Report) -> str:
    return keys({result.mode: title(result) for result in report.results})


def _lines(report: Report, heading: str, meaning: str, unit: str, of: Callable[[Sample], float]) -> str:
    lines = [(r.mode, [(sample.seconds, of(sample)) for sample in r.samples]) for r in report.results]
    return (
        f'<section><h2>{heading}</h2><p class="quiet">{meaning}</p>{_keys(report)}'
        f"{line_plot(heading, unit, lines)}</section>"
    )


def _bars(report: Report, name: str, heading: str) -> str:
    """Times of requests, each bar as long as the worst mode's 99th percentile allows."""
    times = {result.mode: found for result in report.results if (found := getattr(result, name))}
    if not times:
        return ""
    most = max(found.p99 for found in times.values()) or 1.0
    blocks = []
    for label, of in (("mean", "mean"), ("median", "p50"), ("95th percentile", "p95"), ("99th percentile", "p99")):
        lines = "".join(
            f'<div class="line"><b style="background:var(--{mode});width:{100 * getattr(found, of) / most:.2f}%">'
            f"</b><span>{duration(getattr(found, of))}</span></div>"
            for mode, found in times.items()
        )
        blocks.append(f'<div class="dtype"><div>{label}</div>{lines}</div>')
    return (
        f'<section><h2>{heading.capitalize()}</h2><p class="quiet">{_MEANINGS[name]}, in virtual time.</p>'
        f"{_keys(report)}{''.join(blocks)}</section>"
    )


def _memory(result: Result, end: float) -> str:
    seconds = [sample.seconds for sample in result.samples]
    areas = [(use, [sample.uses[index] / _GIB for sample in result.samples]) for index, use in enumerate(USES)]
    heading = f"Memory, {title(result)}"
    means = mean_uses(result)
    legends = "".join(
        f'<li><i style="background:var(--{use})"></i><b>{USE_TITLES[use][0]}</b> {size(mean)}</li>'
        for use, mean in zip(USES, means, strict=True)
    )
    return (
        f'<section><h2>{heading}</h2><p class="quiet">GiB by use over time, and their means.</p>'
        f'{area_plot(heading, "", seconds, areas, end)}<ul class="legend">{legends}</ul></section>'
    )


def _table(report: Report) -> str:
    body = (cells(row.label, (row.of(result) for result in report.results)) for row in rows(report.results))
    groups = "".join(f"<li><b>{title(r)}</b>: {escape(layout(r))}</li>" for r in report.results)
    uses = "; ".join(f"{name}: {meaning}" for name, meaning in USE_TITLES.values())
    return (
        f'<section><h2>All figures</h2>{table(map(title, report.results), body)}<ul class="groups">{groups}</ul>'
        f'<p class="quiet">{escape(uses)}.</p></section>'
    )

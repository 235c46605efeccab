"""The plan as one HTML page."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from tidepool.page import cells, document, facts, keys
from tidepool.plan import formatting
from tidepool.plan.chart import curve_chart
from tidepool.plan.planner import SHORT_REQUEST, CapacityPlan, Column
from tidepool.plan.rows import sections
from tidepool.sides import TITLES, Side
from tidepool.sizes import percent, size


def render_page(plan: CapacityPlan) -> str:
    """The whole page."""
    name = escape(plan.model_name)
    return document(
        f"{name}: what fits",
        [
            f"<header><h1>{name}: what fits</h1>",
            f"<p>{escape(plan.family)}, {plan.parameters / 1e9:.2f} B weights.",
            f"{escape(formatting.budget(plan))}.</p>",
            f'<p class="quiet">{escape(formatting.setting(plan))}.</p></header>',
            *(f"<p>{escape(note)}</p>" for note in formatting.notes(plan)),
            facts((kind, _title(plan, kind), _figures(column)) for kind, column in plan.columns.items()),
            _startup(plan),
            _map(plan),
            '<div class="two">',
            _curve(plan),
            _dtypes(plan),
            "</div>",
            _table(plan),
            f'<p class="quiet">Shapes: {escape(plan.source)}. Made by tidepool plan.</p>',
        ],
    )


def _title(plan: CapacityPlan, kind: Side) -> str:
    if plan.starts(kind):
        return TITLES[kind]
    left = "doesn't start" if kind == "stock" else "not served"
    return f'{TITLES[kind]}<span class="quiet"> {left}</span>'


def _startup(plan: CapacityPlan) -> str:
    if not plan.startup:
        return ""
    lines = "</li><li>".join(escape(line) for line in plan.startup)
    return f'<section><h2>What stock vLLM says at start</h2><ul class="lines"><li>{lines}</li></ul></section>'


def _figures(column: Column) -> Iterator[tuple[str, str]]:
    beside = next((count for count in column.tokens if count >= 8), next(iter(column.tokens)))
    yield f"tokens beside {formatting.requests(beside)}", formatting.tokens(column.tokens[beside])
    if column.concurrency:
        short = min(column.concurrency)
        yield f"requests of {short:,} tokens at once", f"{column.concurrency[short]:,}"
    yield f"bytes that {SHORT_REQUEST} tokens pin", size(column.pinned_by_short)
    yield "wasted in the mix below", percent(column.account.waste / column.account.total)


def _map(plan: CapacityPlan) -> str:
    """Bars as wide as the card, or as the KV memory where no card was named."""
    around = _around(plan)
    total = plan.options.kv_bytes + sum(count for _, _, _, count in around)
    shown = {name for column in plan.columns.values() for name, count in column.account.parts().items() if count}
    bars = []
    for kind, column in plan.columns.items():
        parts = [(name, title, count) for name, title, _, count in around]
        parts += [(name, formatting.PARTS[name][0], count) for name, count in column.account.parts().items()]
        running = sum(item.count for item in column.admitted)
        pieces = "".join(
            f'<i style="flex:{count / total:.6f} 0 0;background:var(--{name})" '
            f'title="{escape(title)}: {size(count)}, {percent(count / total)}"></i>'
            for name, title, count in parts
            if count > 0
        )
        waste = f"{size(column.account.waste)} wasted"
        bars.append(
            f"<h3>{TITLES[kind]}<span>{running:,} of {sum(m.count for m in plan.options.mix):,} run, "
            f'{waste}</span></h3><div class="bar">{pieces}</div>'
        )
    legend = [(name, title, meaning) for name, title, meaning, _ in around]
    legend += [(name, *formatting.PARTS[name]) for name in formatting.PARTS if name in shown]
    legends = "".join(
        f'<li><i style="background:var(--{name})"></i><b>{escape(title)}</b>: {escape(meaning)}</li>'
        for name, title, meaning in legend
    )
    what = "card" if plan.card else "KV memory"
    return (
        f"<section><h2>What each byte of the {what} holds</h2>"
        f'<p class="quiet">While these run: {escape(formatting.mix(plan))}. A bar is {size(total)} wide.</p>'
        f'<div class="map">{"".join(bars)}</div><ul class="legend">{legends}</ul></section>'
    )


def _around(plan: CapacityPlan) -> list[tuple[str, str, str, int]]:
    """What else is on the card: name, title, meaning, bytes."""
    card = plan.card
    if card is None:
        return []
    unused = card.total_bytes - card.kv_bytes - card.weight_bytes - card.reserve_bytes
    why = formatting.reserved(plan).removeprefix("reserve: ") or "for activations and graphs"
    return [
        ("unused", "not used", f"above {card.utilization:g} of the card", unused),
        ("weights", "weights", "on one device", card.weight_bytes),
        ("reserve", "reserve", why, card.reserve_bytes),
    ]


def _keys(plan: CapacityPlan) -> str:
    return keys({kind: TITLES[kind] for kind in plan.columns})


def _curve(plan: CapacityPlan) -> str:
    if all(count is None for column in plan.columns.values() for count in column.tokens.values()):
        return ""
    chart = curve_chart({kind: column.curve for kind, column in plan.columns.items()})
    return (
        "<section><h2>Tokens against running requests</h2>"
        '<p class="quiet">The most tokens that so many requests hold together. '
        "A line ends where they no longer fit.</p>"
        f"{_keys(plan)}{chart}</section>"
    )


def _dtypes(plan: CapacityPlan) -> str:
    if not plan.dtypes:
        return ""
    most = max((count for row in plan.dtypes for count in row.tokens.values()), default=0) or 1
    blocks = []
    for row in plan.dtypes:
        lines = "".join(
            f'<div class="line"><b style="background:var(--{kind});width:{100 * count / most:.2f}%"></b>'
            f"<span>{formatting.tokens(count)}</span></div>"
            for kind, count in row.tokens.items()
        )
        chosen = plan.options.kv_dtype in (row.kv_dtype, *row.also)
        name = " = ".join((row.kv_dtype, *row.also))
        title = f"<strong>{escape(name)}</strong>" if chosen else escape(name)
        blocks.append(
            f'<div class="dtype"><div>{title}<span class="quiet">{row.token_bytes:,} B/token</span></div>{lines}</div>'
        )
    return (
        f"<section><h2>What each KV cache dtype buys</h2>"
        f'<p class="quiet">Tokens beside {formatting.requests(plan.dtype_requests)}. '
        f"Bytes per token count all attention layers.</p>{_keys(plan)}{''.join(blocks)}</section>"
    )


def _table(plan: CapacityPlan) -> str:
    head = "".join(f"<th>{title}</th>" for title in TITLES.values())
    body = [cells("served by", (formatting.serves(plan, kind) for kind in TITLES))]
    for section in sections(plan):
        body.append(f'<tr><th colspan="4">{escape(section.title)}</th></tr>')
        for label, answers in section.rows:
            body.append(cells(label, answers.values()))
    return (
        '<section><h2>All figures</h2><div class="scroll"><table>'
        f"<thead><tr><th></th>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div></section>"
    )

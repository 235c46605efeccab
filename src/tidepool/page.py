"""Pages that need nothing else, no script, no font, no picture from anywhere: their frame, style and small parts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path


def document(title: str, parts: Iterable[str], style: str = "") -> str:
    """A whole page.

    Args:
        title: as HTML.
        parts: what stands in it, as HTML.
        style: CSS beside that of all pages.
    """
    css = Path(__file__).with_name("page.css").read_text(encoding="utf-8") + style
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{title}</title><style>{css}</style></head><body><main>",
            *parts,
            "</main></body></html>\n",
        ]
    )


def facts(cards: Iterable[tuple[str, str, Iterable[tuple[str, str]]]]) -> str:
    """A card of figures for each side: the name of its colour, its title, labels and values."""
    made = []
    for colour, title, figures in cards:
        rows = "".join(f"<dt>{escape(label)}</dt><dd>{escape(value)}</dd>" for label, value in figures)
        made.append(f'<div class="fact" style="border-top-color:var(--{colour})"><b>{title}</b><dl>{rows}</dl></div>')
    return "\n".join(['<div class="facts">', *made, "</div>"])


def keys(titles: Mapping[str, str]) -> str:
    """Which colour stands for what, by the name of the colour."""
    shown = "".join(
        f'<span><i style="background:var(--{colour})"></i>{title}</span>' for colour, title in titles.items()
    )
    return f'<div class="keys">{shown}</div>'


def cells(label: str, values: Iterable[str]) -> str:
    """A row of a table; the label is indented if it begins with a space."""
    inner = ' class="inner"' if label.startswith(" ") else ""
    return f"<tr><td{inner}>{escape(label)}</td>{''.join(f'<td>{escape(value)}</td>' for value in values)}</tr>"


def table(heads: Iterable[str], rows: Iterable[str]) -> str:
    """A table whose rows are made by `cells`, with the head of each column but that of the labels, as HTML."""
    head = "".join(f"<th>{each}</th>" for each in heads)
    return (
        f'<div class="scroll"><table class="rows"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )

"""Tokens against running requests, as an SVG drawing."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, log2, log10

from tidepool.sides import Side

_WIDTH, _HEIGHT = 480, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 22, 14, 48


def curve_chart(curves: Mapping[Side, list[tuple[int, int]]]) -> str:
    """Lines through pairs (running requests, tokens); requests on a scale of powers of two."""
    last = max(count for curve in curves.values() for count, _ in curve)
    top = max(tokens for curve in curves.values() for _, tokens in curve) or 1
    step = _step(top)
    ceiling = ceil(top / step) * step

    def x(count: int) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (log2(count) / log2(last) if last > 1 else 0.5)

    def y(tokens: int) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - tokens / ceiling)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="Tokens against running requests">']
    for value in range(0, ceiling + 1, step):
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
        )
        parts.append(f'<text x="{_LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{_short(value)}</text>')
    power = 1
    while power <= last:
        parts.append(f'<text x="{x(power):.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{power}</text>')
        power *= 2 if last <= 16 else 4
    parts.append(f'<text x="{(_LEFT + _WIDTH) / 2:.0f}" y="{_HEIGHT - 6}" text-anchor="middle">running requests</text>')
    for kind, curve in curves.items():
        points = [(x(count), y(tokens)) for count, tokens in curve if tokens]
        line = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
        dashed = ' stroke-dasharray="7 4"' if kind == "stock" else ""
        parts.append(f'<polyline class="curve" style="stroke:var(--{kind})"{dashed} points="{line}"/>')
        if points:
            px, py = points[-1]
            parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4" style="fill:var(--{kind})"/>')
    return "".join(parts) + "</svg>"


def _step(top: int) -> int:
    """A round number, four to eight of which reach ``top``."""
    unit = 10 ** int(log10(max(top, 1)))
    return next((int(unit * share) for share in (0.2, 0.25, 0.5, 1, 2) if top / (unit * share) <= 6), unit) or 1


def _short(value: int) -> str:
    if value >= 1_000_000:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if value >= 1_000 else str(value)

"""Plots over virtual time, as SVG drawings in the classes of the plan's style sheet."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import ceil, floor, log10

_WIDTH, _HEIGHT = 480, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 16, 12, 46


def round_step(top: float) -> float:
    """A round number, three to six of which reach ``top``."""
    unit = 10.0 ** floor(log10(top)) if top > 0 else 1.0
    return next((unit * share for share in (0.2, 0.25, 0.5, 1.0) if top / (unit * share) <= 6), unit * 2)


class Frame:
    """Axes from zero: seconds to the right, or another quantity, and a value upwards."""

    def __init__(self, seconds: float, top: float, unit: str, label: str, along: str | None = None) -> None:
        self.seconds = seconds or 1.0
        self.along = along
        """What goes to the right in place of time."""
        self.step = round_step(top)
        self.top = max(ceil(top / self.step - 1e-9), 1) * self.step
        self.unit = unit
        self.label = label

    def x(self, seconds: float) -> float:
        """Where a time is."""
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * seconds / self.seconds

    def y(self, value: float) -> float:
        """Where a value is."""
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - value / self.top)

    def open(self) -> str:
        """The drawing's start, with its axes."""
        parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(self.label)}">']
        for index in range(round(self.top / self.step) + 1):
            y = self.y(index * self.step)
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(
                f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{index * self.step:g}{self.unit}</text>'
            )
        minutes = self.along is None and self.seconds >= 180
        scale, step = (60, round_step(self.seconds / 60)) if minutes else (1, round_step(self.seconds))
        for index in range(int(self.seconds / scale / step + 1e-9) + 1):
            x = self.x(index * step * scale)
            parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{index * step:g}</text>')
        parts.append(
            f'<text x="{(_LEFT + _WIDTH) / 2:.0f}" y="{_HEIGHT - 6}" text-anchor="middle">'
            f"{self.along or ('minutes' if minutes else 'seconds') + ' of virtual time'}</text>"
        )
        return "".join(parts)


def line_plot(label: str, unit: str, lines: Sequence[tuple[str, Sequence[tuple[float, float]]]]) -> str:
    """Lines through (seconds, value); each comes with the name of its colour."""
    frame = Frame(
        max(seconds for _, points in lines for seconds, _ in points),
        max(value for _, points in lines for _, value in points),
        unit,
        label,
    )
    drawn = [frame.open()]
    for colour, points in lines:
        path = " ".join(f"{frame.x(seconds):.1f},{frame.y(value):.1f}" for seconds, value in points)
        dashed = ' stroke-dasharray="7 4"' if colour == "bound" else ""
        drawn.append(f'<polyline class="curve" style="stroke:var(--{colour})"{dashed} points="{path}"/>')
    return "".join(drawn) + "</svg>"


def curve_plot(label: str, unit: str, along: str, curves: Sequence[tuple[str, Sequence[tuple[float, float]]]]) -> str:
    """Points (quantity, value), joined in this order; each curve comes with its colour, as CSS."""
    points = [point for _, curve in curves for point in curve]
    frame = Frame(max(x for x, _ in points) * 1.05, max(y for _, y in points), unit, label, along)
    drawn = [frame.open()]
    for colour, curve in curves:
        places = [(f"{frame.x(x):.1f}", f"{frame.y(y):.1f}") for x, y in curve]
        path = " ".join(",".join(place) for place in places)
        drawn.append(f'<polyline class="curve" style="stroke:{colour}" points="{path}"/>')
        drawn += [f'<circle cx="{x}" cy="{y}" r="4" style="fill:{colour}"/>' for x, y in places]
    return "".join(drawn) + "</svg>"


def area_plot(
    label: str, unit: str, seconds: Sequence[float], areas: Sequence[tuple[str, Sequence[float]]], end: float
) -> str:
    """Values stacked from the bottom up; each comes with the name of its colour. The axis ends at ``end`` seconds."""
    totals = [sum(values) for values in zip(*(values for _, values in areas), strict=True)]
    frame = Frame(end, max(totals), unit, label)
    drawn = [frame.open()]
    below = [0.0] * len(seconds)
    for colour, values in areas:
        above = [base + value for base, value in zip(below, values, strict=True)]
        up = [f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in zip(seconds, above, strict=True)]
        down = [f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in zip(seconds, below, strict=True)]
        drawn.append(f'<polygon style="fill:var(--{colour})" points="{" ".join(up + down[::-1])}"/>')
        below = above
    return "".join(drawn) + "</svg>"

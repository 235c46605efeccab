"""What a user types: lists, mixes of requests, dtypes of layers; and what a card leaves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil

from tidepool.command_line import UsageError
from tidepool.models import WINDOWS
from tidepool.plan.account import Requests


@dataclass(frozen=True)
class Card:
    """What a device gives to the KV cache: memory x utilization - weights - reserve."""

    name: str
    total_bytes: int
    utilization: float
    weight_bytes: int
    reserve_bytes: int
    """All that vLLM needs beside them."""
    reserve_parts: Mapping[str, int] = field(default_factory=dict)
    """What for, where that is modelled and not the user's word."""

    @property
    def kv_bytes(self) -> int:
        """What is left for the KV cache."""
        return ceil(self.total_bytes * self.utilization) - self.weight_bytes - self.reserve_bytes


def parse_lengths(text: str) -> list[int]:
    """Tokens of ``2000,8k,128k``; k is 1,000.

    Raises:
        UsageError: one of them is no positive number.
    """
    return [_count(part, "context length") for part in text.split(",")]


def parse_mix(text: str) -> list[Requests]:
    """Requests of ``32x2k,2x32k``: how many, and how long each.

    Raises:
        UsageError: a part is not of that form.
    """
    mix = []
    for part in text.split(","):
        count, cross, tokens = part.strip().partition("x")
        if not cross:
            raise UsageError(f"{part!r} is no part of a mix: write how many and how long, like 32x2k.")
        mix.append(Requests(_count(count, "number of requests"), _count(tokens, "context length")))
    return mix


def parse_layer_dtypes(text: str | None) -> tuple[tuple[int | str, str], ...]:
    """KV cache dtypes of single layers: ``3=fp8,7-11=auto,sliding_window=auto``; none for None.

    Raises:
        UsageError: a part is not of that form.
    """
    chosen: list[tuple[int | str, str]] = []
    for part in text.split(",") if text else ():
        layers, equals, dtype = part.strip().partition("=")
        first, _, last = layers.partition("-")
        if equals and dtype and layers == WINDOWS:
            chosen.append((WINDOWS, dtype))
        elif equals and dtype and _layers(first, last):
            chosen += [(layer, dtype) for layer in _layers(first, last)]
        else:
            raise UsageError(
                f"{part.strip()!r} types no layers: write a number or a range of layers, or {WINDOWS}, = and a dtype."
            )
    return tuple(chosen)


def _layers(first: str, last: str) -> range:
    """Layers from one number to another; none where these are no numbers, or in the wrong order."""
    numbers = first, last or first
    if not all(number.isdecimal() and len(number) < 6 for number in numbers):
        return range(0)
    return range(int(numbers[0]), int(numbers[1]) + 1)


def _count(text: str, what: str) -> int:
    cleaned = text.strip().lower()
    scale = 1000 if cleaned.endswith("k") else 1
    digits = cleaned.removesuffix("k")
    if not digits.isdecimal() or len(digits) > 18 or int(digits) == 0:
        shown = text.strip() if len(text.strip()) <= 40 else f"{text.strip()[:40]}..."
        raise UsageError(f"{shown!r} is no {what}: write a positive whole number, or one with k for thousands.")
    return int(digits) * scale

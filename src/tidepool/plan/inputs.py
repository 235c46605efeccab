"""What a user types, and the cards: sizes, lists, mixes of requests, memory of a GPU."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tidepool.models import WINDOWS
from tidepool.plan.account import Requests


class PlanError(ValueError):
    """A question that can't be answered; the message is one sentence for the user."""


GPU_MIB = {
    "4090": 24_564,
    "5090": 32_607,
    "L40S": 46_068,
    "A100-80": 81_920,
    "H100": 81_559,
    "H200": 143_771,
    "B200": 183_359,
}
"""Memory of a card as its driver reports it, in MiB."""

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)")


@dataclass(frozen=True)
class Card:
    """What a device gives to the KV cache: memory x utilization - weights - reserve."""

    name: str
    total_bytes: int
    utilization: float
    weight_bytes: int
    reserve_bytes: int

    @property
    def kv_bytes(self) -> int:
        """What is left for the KV cache."""
        return int(self.total_bytes * self.utilization) - self.weight_bytes - self.reserve_bytes


def parse_size(text: str) -> int:
    """Bytes of ``18GiB``, ``512 MB`` or ``1000000``.

    Raises:
        PlanError: it is no size, or not above zero.
    """
    match = _SIZE.fullmatch(text.strip())
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise PlanError(
            f"{text!r} is no size: write a positive number with B, KB, MB, GB, KiB, MiB or GiB, like 18GiB."
        )
    size = int(float(match[1]) * unit)
    if size <= 0:
        raise PlanError(f"A size must be above zero, not {text!r}.")
    return size


def parse_lengths(text: str) -> list[int]:
    """Tokens of ``2000,8k,128k``; k is 1,000.

    Raises:
        PlanError: one of them is no positive number.
    """
    return [_count(part, "context length") for part in text.split(",")]


def parse_mix(text: str) -> list[Requests]:
    """Requests of ``32x2k,2x32k``: how many, and how long each.

    Raises:
        PlanError: a part is not of that form.
    """
    mix = []
    for part in text.split(","):
        count, cross, tokens = part.strip().partition("x")
        if not cross:
            raise PlanError(f"{part!r} is no part of a mix: write how many and how long, like 32x2k.")
        mix.append(Requests(_count(count, "number of requests"), _count(tokens, "context length")))
    return mix


def parse_layer_dtypes(text: str | None) -> tuple[tuple[int | str, str], ...]:
    """KV cache dtypes of single layers: ``3=fp8,7-11=auto,sliding_window=auto``; none for None.

    Raises:
        PlanError: a part is not of that form.
    """
    chosen: list[tuple[int | str, str]] = []
    for part in text.split(",") if text else ():
        layers, equals, dtype = part.strip().partition("=")
        first, _, last = layers.partition("-")
        if equals and dtype and layers == WINDOWS:
            chosen.append((WINDOWS, dtype))
        elif equals and dtype and first.isdecimal() and (last or first).isdecimal():
            chosen += [(layer, dtype) for layer in range(int(first), int(last or first) + 1)]
        else:
            raise PlanError(
                f"{part.strip()!r} types no layers: write a number or a range of layers, or {WINDOWS}, = and a dtype."
            )
    return tuple(chosen)


def find_card(name: str) -> int:
    """Memory of a card, in bytes.

    Raises:
        PlanError: the card is unknown.
    """
    mib = next((mib for known, mib in GPU_MIB.items() if known.lower() == name.lower()), None)
    if mib is None:
        raise PlanError(f"There is no GPU {name!r} in the list: choose from {', '.join(GPU_MIB)}, or give --memory.")
    return mib << 20


def _count(text: str, what: str) -> int:
    cleaned = text.strip().lower()
    scale = 1000 if cleaned.endswith("k") else 1
    digits = cleaned.removesuffix("k")
    if not digits.isdecimal() or int(digits) == 0:
        raise PlanError(f"{text.strip()!r} is no {what}: write a positive whole number, or one with k for thousands.")
    return int(digits) * scale

"""Sizes and shares as people write and read them."""

from __future__ import annotations

import re

from tidepool.command_line import UsageError

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
    "TIB": 1 << 40,
}
_MOST = 1 << 60
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)")


def size(count: int) -> str:
    """Bytes with a binary unit and three or four digits."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1000:
            return f"{count} B" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:,.2f} GiB"


def percent(share: float) -> str:
    """A share of 1 in percent."""
    if 0 < share < 0.0001:
        return "<0.01%"
    return f"{share:.2%}" if 0 < share < 0.1 else f"{share:.0%}"


def parse_size(text: str, *, zero: bool = False) -> int:
    """Bytes of ``18GiB``, ``512 MB`` or ``1000000``.

    Args:
        text: as a user wrote it.
        zero: whether nothing at all is a size, too.

    Raises:
        UsageError: it is no size, not above zero, or more than there is.
    """
    match = _SIZE.fullmatch(text.strip())
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise UsageError(
            f"{_short(text)} is no size: write a positive number with B, KB, MB, GB, TB, KiB, MiB, GiB or TiB, like "
            "18GiB."
        )
    found = float(match[1]) * unit
    if found >= _MOST:
        raise UsageError(f"{_short(text)} is more than any machine has.")
    if found < 1 and not (zero and found == 0):
        raise UsageError(f"A size must be above zero, not {text!r}.")
    return int(found)


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}...")

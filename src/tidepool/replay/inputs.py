"""What a user types, read and checked."""

from __future__ import annotations

from math import inf
from pathlib import Path

from tidepool.command_line import UsageError
from tidepool.replay.job import MODES, Mode
from tidepool.sizes import parse_size

LINKS = {"pcie4": 25e9, "pcie5": 50e9, "gh200": 400e9}
"""Bytes a second that copies of large blocks reach in each direction, about: four fifths of the link's peak."""


def parse_bandwidth(text: str) -> float:
    """Bytes a second of ``50GB/s`` or a name of `LINKS`.

    Raises:
        UsageError: it is neither.
    """
    named = LINKS.get(text.strip().lower())
    number, _, second = text.strip().partition("/")
    if named is None and second != "s":
        raise UsageError(f"--host-bandwidth takes {', '.join(LINKS)} or bytes a second like 50GB/s, not {text!r}.")
    return named or float(parse_size(number))


def parse_modes(text: str) -> list[Mode]:
    """Modes of ``stock,elastic``, in the order given.

    Raises:
        UsageError: one of them is unknown or comes twice.
    """
    words = [part.strip() for part in text.split(",")]
    chosen = [mode for word in words for mode in MODES if mode == word]
    if len(chosen) < len(words) or len(set(chosen)) < len(chosen):
        raise UsageError(f"--modes takes some of {', '.join(MODES)}, each once, not {text!r}.")
    return chosen


def require_positive(**options: float | None) -> None:
    """Refuse numbers that aren't above zero, by the names of their options; None is none.

    Raises:
        UsageError: one isn't.
    """
    for name, value in options.items():
        if value is not None and not 0 < value < inf:
            raise UsageError(f"--{name.replace('_', '-')} must be above zero, not {value:g}.")


def require_folder(file: Path | None) -> None:
    """Refuse a file that can't be written once all has run; None is none.

    Raises:
        UsageError: there is no directory for it, or it is one.
    """
    if file is None:
        return
    if not file.parent.is_dir():
        raise UsageError(f"Can't write {file}: there is no such directory.")
    if file.is_dir():
        raise UsageError(f"Can't write {file}: it is a directory.")

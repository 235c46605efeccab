"""Traces as CSV that have times and lengths alone: Azure's and BurstGPT's. Their prompts share nothing here."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from itertools import count

from tidepool.replay.formats.fields import LATEST_MS, MOST_TOKENS
from tidepool.replay.formats.lines import Line, LineError
from tidepool.replay.trace import FIRST_TOKEN, Recorded, Skipped

NO_REUSE = "The trace has lengths alone: which prompts begin alike isn't known, so none do, and nothing can hit."
_BLOCK = 512
_COLUMNS = (("TIMESTAMP", "ContextTokens", "GeneratedTokens"), ("Timestamp", "Request tokens", "Response tokens"))
"""Of Azure's and of BurstGPT's: the arrival, the prompt's tokens and the answer's."""


def columns(header: str) -> tuple[str, str, str] | None:
    """The columns that matter of a table with this first line; None where it is none that is known."""
    names = _row(header)
    return next((wanted for wanted in _COLUMNS if set(wanted) <= set(names)), None)


def read_table(lines: Iterable[Line], header: str) -> Iterator[Recorded | Skipped]:
    """The requests behind the header."""
    names = _row(header)
    arrival, prompt, answer = (names.index(name) for name in columns(header) or ())
    fresh = count()
    for number, line in lines:
        try:
            row = _row(line)
            if len(row) != len(names):
                raise LineError(f"{len(row)} columns where the header has {len(names)}")
            tokens, length = _tokens(row[prompt], names[prompt]), _tokens(row[answer], names[answer])
            # Blocks are made one by one, so that long prompts stay cheap and never meet another's.
            starts = range(0, tokens, _BLOCK)
            blocks = []
            for start in starts:
                first = FIRST_TOKEN + next(fresh) * _BLOCK
                blocks.append(range(first, first + min(_BLOCK, tokens - start)))
            yield Recorded(_seconds(row[arrival]), blocks, _BLOCK, tokens, length, number)
        except LineError as error:
            yield Skipped(number, str(error))


def _row(line: str) -> list[str]:
    try:
        return next(csv.reader([line.strip()]), [])
    except csv.Error:  # one field of it is longer than any of a table
        return []


def _tokens(text: str, name: str) -> int:
    if not text.strip().isdecimal() or not 0 < int(text[:20]) < min(MOST_TOKENS, 1 << 24):
        raise LineError(f'"{name}" must be a positive whole number')
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        try:
            time = datetime.fromisoformat(text.strip())
        except ValueError as error:
            raise LineError("its time must be seconds, or a date and a time") from error
        seconds = (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
    if not 0 <= seconds < LATEST_MS / 1000:
        raise LineError("its time must be from 0")
    return seconds

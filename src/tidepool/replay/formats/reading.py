"""Which format a file has, and all that it holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tidepool.replay.formats.fields import json_object
from tidepool.replay.formats.hashed import read_hashed
from tidepool.replay.formats.lines import Line, LineError, open_lines
from tidepool.replay.trace import Recorded, Skipped, TraceError


@dataclass(frozen=True)
class Trace:
    """What a file holds."""

    requests: list[Recorded]
    """In the order of their arrival; at least one."""
    skipped: list[Skipped] = field(default_factory=list)
    """Lines that are no requests."""


def read_trace(path: Path, limit: int | None = None, *, strict: bool = False) -> Trace:
    """Read the first ``limit`` requests of a file.

    Args:
        path: the file, gzip'd or not.
        limit: how many; None for all.
        strict: whether a line that is no request is an error.

    Raises:
        TraceError: the file can't be read, or holds no requests.
    """
    trace = Trace([])
    with open_lines(path) as lines:
        for each in _requests(lines):
            if limit is not None and len(trace.requests) >= limit:
                break
            if isinstance(each, Recorded):
                trace.requests.append(each)
            elif strict:
                raise TraceError(f"{path}, line {each.line}: {each.reason}.")
            else:
                trace.skipped.append(each)
    if not trace.requests and trace.skipped:
        first = trace.skipped[0]
        raise TraceError(f"{path}, line {first.line}: {first.reason}.")
    if not trace.requests:
        raise TraceError(f"{path} holds no requests.")
    trace.requests.sort(key=lambda request: request.arrival)
    return trace


def _requests(lines: Iterable[Line]) -> Iterator[Recorded | Skipped]:
    for number, line in lines:
        try:
            yield read_hashed(json_object(line), number)
        except LineError as error:
            yield Skipped(number, str(error))

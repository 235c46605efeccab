"""Which format a file has, and all that it holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

from tidepool.replay.formats.fields import json_object
from tidepool.replay.formats.guidellm import read_guidellm
from tidepool.replay.formats.hashed import read_hashed
from tidepool.replay.formats.lines import Line, LineError, open_lines
from tidepool.replay.formats.messages import has_text, read_messages
from tidepool.replay.formats.tables import NO_REUSE, columns, read_table
from tidepool.replay.formats.text import BY_WORDS, Tokenizer, Tokens, Words
from tidepool.replay.formats.vllm_log import is_log_line, read_log
from tidepool.replay.trace import Recorded, Skipped, TraceError

_PEEK = 10_000
"""Lines of a file that is neither JSON nor CSV among which a request must be logged."""


@dataclass(frozen=True)
class Trace:
    """What a file holds."""

    requests: list[Recorded]
    """In the order of their arrival; at least one."""
    skipped: list[Skipped] = field(default_factory=list)
    """Lines that are no requests."""
    notes: list[str] = field(default_factory=list)
    """What the file doesn't say, in sentences."""


def read_trace(path: Path, limit: int | None = None, *, strict: bool = False, tokenizer: Path | None = None) -> Trace:
    """Read the first ``limit`` requests of a file.

    Args:
        path: the file, gzip'd or not.
        limit: how many; None for all.
        strict: whether a line that is no request is an error.
        tokenizer: of the model, a directory or a ``tokenizer.json``, for text; None where words stand for tokens.

    Raises:
        TraceError: the file or the tokenizer can't be read, or there are no requests.
    """
    tokens = Words() if tokenizer is None else Tokenizer(tokenizer)
    trace = Trace([])
    with open_lines(path) as lines:
        for each in _requests(lines, tokens, trace.notes):
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
    if isinstance(tokens, Words) and tokens.used:
        trace.notes.append(BY_WORDS)
    if len(trace.requests) > 1 and len({request.arrival for request in trace.requests}) == 1:
        trace.notes.append("The trace has no times, so all requests arrive at once.")
    trace.requests.sort(key=lambda request: request.arrival)
    return trace


def _requests(lines: Iterator[Line], tokens: Tokens, notes: list[str]) -> Iterator[Recorded | Skipped]:
    first = next(lines, None)
    if first is None:
        return
    text = first[1].strip()
    if columns(text):
        notes.append(NO_REUSE)
        yield from read_table(lines, text)
    elif text == "{":
        yield from _document(f"{text}{''.join(line for _, line in lines)}", tokens)
    elif text[0] in "{[":
        yield from _objects(chain([first], lines), tokens)
    else:
        begin = [first, *islice(lines, _PEEK)]
        logged = any(is_log_line(line) for _, line in begin)
        yield from read_log(chain(begin, lines)) if logged else _objects(chain(begin, lines), tokens)


def _objects(lines: Iterator[Line], tokens: Tokens) -> Iterator[Recorded | Skipped]:
    """A JSON object in each line."""
    for number, line in lines:
        try:
            fields = json_object(line)
            if isinstance(fields.get("benchmarks"), list):
                yield from read_guidellm(fields, tokens)
            elif has_text(fields):
                yield read_messages(fields, number, tokens)
            else:
                yield read_hashed(fields, number)
        except LineError as error:
            yield Skipped(number, str(error))


def _document(text: str, tokens: Tokens) -> Iterator[Recorded | Skipped]:
    """One JSON object in many lines."""
    try:
        document = json_object(text)
    except LineError:
        document = {}
    if not isinstance(document.get("benchmarks"), list):
        yield Skipped(1, "not valid JSON, with a request in each line")
        return
    yield from read_guidellm(document, tokens)

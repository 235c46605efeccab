"""What a replay is fed: requests with arrival times, prompts and output lengths, and the two file formats of them.

A prompt is kept as runs of tokens, most of them `range`s, and turned into a list only when its request arrives: a
conversation trace is tens of millions of tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

TRACE_BLOCK = 512
"""Tokens for which a hash id stands where a line doesn't say."""
GENERATED_TOKEN = 17
"""The token that every request generates, again and again."""
FIRST_TOKEN = 1_000
"""Tokens made of hash ids start here, so that they are never `GENERATED_TOKEN`."""


class TraceError(ValueError):
    """A trace that can't be read; the message is one sentence for the user."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a workload."""

    arrival: float
    """Seconds from the start."""
    runs: Sequence[Sequence[int]]
    """The prompt's tokens, in order, cut into runs of any length."""
    input_tokens: int
    """Length of the prompt: all runs together."""
    output_tokens: int
    """Tokens that it generates."""

    def prompt(self) -> list[int]:
        """The prompt's tokens."""
        return list(chain.from_iterable(self.runs))


def read_trace(path: Path, limit: int | None = None) -> list[TraceRequest]:
    """Read the first ``limit`` requests of a trace, in the order of their arrival.

    Raises:
        TraceError: the file can't be read, a line isn't of either format, or there are no requests.
    """
    requests: list[TraceRequest] = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if limit is not None and len(requests) >= limit:
                    break
                if line.strip():
                    requests.append(_request(line, f"{path}, line {number}"))
    except OSError as error:
        raise TraceError(f"Can't read {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise TraceError(f"{path} isn't UTF-8 text.") from error
    if not requests:
        raise TraceError(f"{path} holds no requests.")
    return sorted(requests, key=lambda request: request.arrival)


def hashed_runs(hash_ids: Iterable[int], block_tokens: int, input_tokens: int) -> Iterator[range]:
    """The tokens that hash ids stand for: ``block_tokens`` of its own for each id, cut to ``input_tokens``."""
    left = input_tokens
    for hash_id in hash_ids:
        if left <= 0:
            return
        first = FIRST_TOKEN + hash_id * block_tokens
        yield range(first, first + min(block_tokens, left))
        left -= block_tokens


def _request(line: str, where: str) -> TraceRequest:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise TraceError(f"{where}: not valid JSON.") from error
    if not isinstance(fields, dict):
        raise TraceError(f"{where}: a request must be a JSON object.")
    arrival = fields.get("timestamp", 0)
    if isinstance(arrival, bool) or not isinstance(arrival, int | float) or arrival < 0:
        raise TraceError(f'{where}: "timestamp" must be milliseconds from 0.')
    output_tokens = _positive(fields, "output_length", where)
    if "token_ids" in fields:
        tokens = _numbers(fields, "token_ids", where)
        if not tokens:
            raise TraceError(f'{where}: "token_ids" is empty.')
        return TraceRequest(arrival / 1000, (tokens,), len(tokens), output_tokens)
    if "hash_ids" not in fields:
        raise TraceError(f'{where}: a request needs "token_ids" or "hash_ids".')
    hash_ids = _numbers(fields, "hash_ids", where)
    block = _positive(fields, "block_size", where, TRACE_BLOCK)
    input_tokens = _positive(fields, "input_length", where, len(hash_ids) * block or None)
    if input_tokens > len(hash_ids) * block:
        raise TraceError(
            f"{where}: {len(hash_ids)} hash ids of {block} tokens are too few for an input_length of {input_tokens}."
        )
    return TraceRequest(arrival / 1000, tuple(hashed_runs(hash_ids, block, input_tokens)), input_tokens, output_tokens)


def _positive(fields: dict[str, Any], key: str, where: str, default: int | None = None) -> int:
    value = fields.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise TraceError(f'{where}: "{key}" must be a positive whole number.')
    return value


def _numbers(fields: dict[str, Any], key: str, where: str) -> list[int]:
    value = fields[key]
    if not isinstance(value, list) or not all(type(item) is int and item >= 0 for item in value):
        raise TraceError(f'{where}: "{key}" must be a list of whole numbers from 0.')
    return value

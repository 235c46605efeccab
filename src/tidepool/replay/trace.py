"""What a replay is fed: requests with arrival times, prompts and answers, and the two file formats of recorded ones.

A prompt is kept as runs of tokens, most of them `range`s, and turned into a list only when its request arrives: a
conversation trace is tens of millions of tokens.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any

Run = range | tuple[int, ...]
"""Tokens in a row."""
TRACE_BLOCK = 512
"""Tokens for which a hash id stands where a line doesn't say."""
TOKENS_BLOCK = 16
"""Tokens that are compared at once where a line has them themselves."""
GENERATED_TOKEN = 17
"""The token that a request generates, again and again, where nobody has said what."""
FIRST_TOKEN = 1_000
"""Tokens made of hash ids start here, so that they are never `GENERATED_TOKEN`."""
_GZIP = b"\x1f\x8b"
"""What a gzip'd file begins with."""


class TraceError(ValueError):
    """A trace that can't be read; the message is one sentence for the user."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a workload."""

    arrival: float
    """Seconds from the start."""
    runs: Sequence[Run]
    """The prompt's tokens, in order, cut into runs of any length."""
    input_tokens: int
    """Length of the prompt: all runs together."""
    output_tokens: int
    """Tokens that it generates."""
    answer: Sequence[Run] = ()
    """These tokens, likewise; () where they come back in no prompt."""

    def prompt(self) -> list[int]:
        """The prompt's tokens."""
        return list(chain.from_iterable(self.runs))


@dataclass(frozen=True, slots=True)
class Recorded:
    """A request as a line of a trace has it."""

    arrival: float
    """Seconds from the start of the recording."""
    blocks: Sequence[Run]
    """The prompt: a range of tokens for each hash id, or the tokens themselves. All but the last are full."""
    block_tokens: int
    """Tokens of a full block."""
    input_tokens: int
    output_tokens: int


def read_trace(path: Path, limit: int | None = None) -> list[Recorded]:
    """Read the first ``limit`` requests of a trace, gzip'd or not, in the order of their arrival.

    Raises:
        TraceError: the file can't be read, a line isn't of either format, or there are no requests.
    """
    requests: list[Recorded] = []
    try:
        with _open(path) as lines:
            for number, line in enumerate(lines, 1):
                if limit is not None and len(requests) >= limit:
                    break
                if line.strip():
                    requests.append(_request(line, f"{path}, line {number}"))
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or "its gzip data is broken"
        raise TraceError(f"Can't read {path}: {reason}.") from error
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


def _open(path: Path) -> IO[str]:
    with path.open("rb") as file:
        packed = file.read(len(_GZIP)) == _GZIP
    return gzip.open(path, "rt", encoding="utf-8") if packed else path.open(encoding="utf-8")


def _request(line: str, where: str) -> Recorded:
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
        parts = [tuple(tokens[start : start + TOKENS_BLOCK]) for start in range(0, len(tokens), TOKENS_BLOCK)]
        return Recorded(arrival / 1000, parts, TOKENS_BLOCK, len(tokens), output_tokens)
    if "hash_ids" not in fields:
        raise TraceError(f'{where}: a request needs "token_ids" or "hash_ids".')
    hash_ids = _numbers(fields, "hash_ids", where)
    block = _positive(fields, "block_size", where, TRACE_BLOCK)
    input_tokens = _positive(fields, "input_length", where, len(hash_ids) * block or None)
    if input_tokens > len(hash_ids) * block:
        raise TraceError(
            f"{where}: {len(hash_ids)} hash ids of {block} tokens are too few for an input_length of {input_tokens}."
        )
    blocks = tuple(hashed_runs(hash_ids, block, input_tokens))
    return Recorded(arrival / 1000, blocks, block, input_tokens, output_tokens)


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

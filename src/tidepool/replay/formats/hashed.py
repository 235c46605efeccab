"""tidepool's own form of a trace, which is Mooncake's too: prompts as hash ids of their blocks, or as tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tidepool.replay.formats.fields import milliseconds, numbers, positive, salt
from tidepool.replay.formats.lines import LineError
from tidepool.replay.trace import FIRST_TOKEN, Recorded

TRACE_BLOCK = 512
"""Tokens for which a hash id stands where a line doesn't say."""
TOKENS_BLOCK = 16
"""Tokens that are compared at once where a line has them themselves."""
_LARGEST_ID = 1 << 40
"""A hash id times its block must stay a token that everything can count."""


def read_hashed(fields: Mapping[str, Any], line: int) -> Recorded:
    """A request of a line."""
    arrival = milliseconds(fields, "timestamp")
    output_tokens = positive(fields, "output_length")
    if "token_ids" in fields:
        return recorded_tokens(arrival, numbers(fields, "token_ids"), output_tokens, line, salt(fields))
    if "hash_ids" not in fields:
        raise LineError('a request needs "token_ids" or "hash_ids"')
    hash_ids = numbers(fields, "hash_ids")
    if max(hash_ids, default=0) >= _LARGEST_ID:
        raise LineError('"hash_ids" must be below 2^40; number them in the order in which they come')
    block = positive(fields, "block_size", TRACE_BLOCK)
    if block > 1 << 20:
        raise LineError('"block_size" must be at most 1,048,576')
    input_tokens = positive(fields, "input_length", len(hash_ids) * block or None)
    if input_tokens > len(hash_ids) * block:
        raise LineError(f"{len(hash_ids)} hash ids of {block} tokens are too few for an input_length of {input_tokens}")
    blocks = tuple(hashed_runs(hash_ids, block, input_tokens))
    return Recorded(arrival, blocks, block, input_tokens, output_tokens, line, salt(fields))


def recorded_tokens(
    arrival: float, tokens: list[int], output_tokens: int, line: int, salt: str | None = None
) -> Recorded:
    """A request whose prompt's tokens are known; its arrival in seconds."""
    if not tokens:
        raise LineError("its prompt is empty")
    if max(tokens) >= 1 << 62:
        raise LineError("its tokens must be below 2^62")
    parts = [tuple(tokens[start : start + TOKENS_BLOCK]) for start in range(0, len(tokens), TOKENS_BLOCK)]
    return Recorded(arrival, parts, TOKENS_BLOCK, len(tokens), output_tokens, line, salt)


def hashed_runs(hash_ids: Iterable[int], block_tokens: int, input_tokens: int) -> Iterator[range]:
    """The tokens that hash ids stand for: ``block_tokens`` of its own for each id, cut to ``input_tokens``."""
    left = input_tokens
    for hash_id in hash_ids:
        if left <= 0:
            return
        first = FIRST_TOKEN + hash_id * block_tokens
        yield range(first, first + min(block_tokens, left))
        left -= block_tokens

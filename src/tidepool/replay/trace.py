"""What a replay is fed: requests with arrival times, prompts and answers.

A prompt is kept as runs of tokens, most of them `range`s, and turned into a list only when its request arrives: a
conversation trace is tens of millions of tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

Run = range | tuple[int, ...]
"""Tokens in a row."""
GENERATED_TOKEN = 17
"""The token that a request generates, again and again, where nobody has said what."""
FIRST_TOKEN = 1_000
"""Tokens made of hash ids start here, so that they are never `GENERATED_TOKEN`."""


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
    salt: str | None = None
    """Requests of different salts share nothing, whatever their prompts are: tenants, or LoRA adapters."""
    line: int = 0
    """Where the trace has it, from 1; 0 where it was made up."""

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
    line: int = 0
    """Where the file has it, from 1."""
    salt: str | None = None
    """See `TraceRequest`."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """A request that is left out."""

    line: int
    """Where the trace has it, from 1; 0 where it was made up."""
    reason: str


def sentences(skipped: Sequence[Skipped], most: int = 5) -> list[str]:
    """What was left out and why, a line for each reason, with the numbers of the first ``most`` lines."""
    told = []
    for reason, count in Counter(each.reason for each in skipped).items():
        lines = [each.line for each in skipped if each.reason == reason and each.line]
        shown = ", ".join(map(str, lines[:most])) + (", ..." if len(lines) > most else "")
        where = f" ({'line' if len(lines) == 1 else 'lines'} {shown})" if lines else ""
        told.append(f"Left out: {count:,} {'request' if count == 1 else 'requests'}, {reason}{where}.")
    return told

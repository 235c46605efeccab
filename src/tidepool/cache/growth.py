"""What running requests will still need, so that an admission leaves it to them.

A request that finds no memory for its next block preempts another one, whose prompt is then read anew. So a waiting
request is admitted only beside the blocks that those under way are expected to take before they end. How long answers
get is learned; a request's own limit is an upper bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

_UNKNOWN = 256
"""Tokens that an answer is taken to get before any has ended."""
_HALVE_AFTER = 512
"""Answers after which older ones weigh half."""
_MOMENTS = 16
"""Moments that are looked at, of all at which some request ends."""


class AnswerLengths:
    """The record of answers, in tokens."""

    def __init__(self) -> None:
        self._count = self._sum = self._squares = 0.0

    def ended(self, tokens: int) -> None:
        """An answer got so long."""
        self._count += 1
        self._sum += tokens
        self._squares += tokens * tokens
        if self._count >= _HALVE_AFTER:
            self._count, self._sum, self._squares = self._count / 2, self._sum / 2, self._squares / 2

    def expected(self) -> int:
        """Tokens that few answers exceed: the mean and one standard deviation more."""
        if not self._count:
            return _UNKNOWN
        mean = self._sum / self._count
        return int(mean + sqrt(max(self._squares / self._count - mean * mean, 0.0)))


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a request under way is expected to take and to free, in blocks of each group."""

    soon: tuple[int, ...]
    """Taken before its answer begins."""
    answer_tokens: int
    """Tokens of its answer that are still to come."""
    frees: tuple[int, ...]
    """Freed when it ends, of those that it holds now."""


class Growth:
    """Blocks that requests under way will still take.

    All of them together may take what `blocks` says, but seldom do: before the last one has got its answer, others
    have ended and freed theirs. `needs` looks at that.

    Invariant: ``blocks[g]`` is the sum over the requests of what each will take of group g.

    Args:
        block_tokens: tokens of a block of each group; 0 where an answer takes none.
    """

    def __init__(self, block_tokens: Sequence[int]) -> None:
        self._block_tokens = tuple(block_tokens)
        self.blocks = [0] * len(self._block_tokens)
        self._of: dict[str, Outlook] = {}

    def __contains__(self, request: str) -> bool:
        """Whether the request is under way."""
        return request in self._of

    def __bool__(self) -> bool:
        """Whether any request is under way."""
        return bool(self._of)

    def set(self, request: str, outlook: Outlook) -> None:
        """What a request will take from now on. O(groups)."""
        self.end(request)
        self._of[request] = outlook
        self._add(outlook, 1)

    def end(self, request: str) -> None:
        """A request ends, or is preempted. O(groups)."""
        outlook = self._of.pop(request, None)
        if outlook is not None:
            self._add(outlook, -1)

    def total(self, outlook: Outlook) -> list[int]:
        """Blocks of each group that one request will take before it ends."""
        return [
            soon + (-(-outlook.answer_tokens // tokens) if tokens else 0)
            for soon, tokens in zip(outlook.soon, self._block_tokens, strict=True)
        ]

    def _add(self, outlook: Outlook, sign: int) -> None:
        for group, count in enumerate(self.total(outlook)):
            self.blocks[group] += sign * count

    def needs(self, waiting: Outlook) -> list[list[int]]:
        """What all of them and one more would take of each group, at moments before some of them end.

        Answers grow by a token each at once. Negative where those that ended have freed more than the others took.
        O(requests), with a sort.
        """
        ordered = sorted((*self._of.values(), waiting), key=lambda outlook: outlook.answer_tokens)
        groups = range(len(self._block_tokens))
        taken = [sum(outlook.soon[group] for outlook in ordered) for group in groups]
        left = len(ordered)
        every = max(left // _MOMENTS, 1)
        moments: list[list[int]] = []
        for number, outlook in enumerate(ordered):
            if number % every == 0 or left == 1:
                moments.append(
                    [
                        # Each takes a block for its last few tokens, too: half of one on average.
                        taken[group] + (-(-left * (outlook.answer_tokens + tokens // 2) // tokens) if tokens else 0)
                        for group, tokens in enumerate(self._block_tokens)
                    ]
                )
            for group in groups:
                taken[group] -= outlook.soon[group] + outlook.frees[group]
            left -= 1
        return moments

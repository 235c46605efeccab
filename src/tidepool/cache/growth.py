"""What running requests will still need, so that an admission leaves it to them.

A request that finds no memory for its next block preempts another one, whose prompt is then read anew. So a waiting
request is admitted only beside the blocks that those under way are expected to take before they end. How long answers
get is learned; a request's own limit is an upper bound.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import NamedTuple

from tidepool.cache.pool import Pool

_UNKNOWN = 256
"""Tokens that an answer is taken to get before any has ended."""
_HALVE_AFTER = 512
"""Answers after which older ones weigh half."""
_MOMENTS = 16
"""Moments that are looked at, of all at which some request ends."""
GROWING_PER_SPARE_EXTENT = 8
"""Extents of attention in use beside which one stays out of use. Chosen by replay, see docs/prefix-caching.md."""


def headroom(pools: Iterable[Pool]) -> int:
    """Extents that stay out of use when a waiting request is admitted beside running ones.

    A share of those that attention holds. Answers may get longer than expected; and what is cached there is worth more
    to later prompts than one more running request is to this one. Short chats hold little attention, so for them it is
    next to nothing.

    Args:
        pools: of the groups that grow with the text.
    """
    return sum(pool.pinned for pool in pools) // GROWING_PER_SPARE_EXTENT


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

    def usual(self) -> int:
        """Tokens that answers get on average; 0 before any has ended."""
        return int(self._sum / self._count) if self._count else 0

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


class GroupGrowth(NamedTuple):
    """How one group's blocks of a request grow with its text."""

    block_tokens: int
    """Tokens of a block; 0 where a request holds a state, whatever its length."""
    most: int | None = None
    """Blocks that a request holds at most, as behind a window; None for no limit."""

    def blocks(self, tokens: int) -> int:
        """Blocks that ``tokens`` tokens take; not for states."""
        blocks = -(-tokens // self.block_tokens)
        return blocks if self.most is None else min(blocks, self.most)


class _Expected(NamedTuple):
    """What a request will be, as far as known."""

    prompt_end: int
    final: int
    """Tokens at its end, as expected."""


class Growth:
    """Blocks that requests under way will still take.

    All of them together may take what `blocks` says, but seldom do: before the last one has got its answer, others
    have ended and freed theirs. `needs` looks at that.

    Invariant: ``blocks[g]`` is the sum over the requests of what each will take of group g.

    Args:
        groups: how the blocks of each group grow.
    """

    def __init__(self, groups: Sequence[GroupGrowth]) -> None:
        self._groups = tuple(groups)
        self._block_tokens = tuple(group.block_tokens for group in groups)
        self.blocks = [0] * len(self._groups)
        self._of: dict[str, Outlook] = {}
        self._expected: dict[str, _Expected] = {}
        self._found: dict[str, Sequence[int]] = {}
        """Blocks of each group that a request found cached."""

    def __contains__(self, request: str) -> bool:
        """Whether the request is under way."""
        return request in self._of

    def __bool__(self) -> bool:
        """Whether any request is under way."""
        return bool(self._of)

    def expect(self, request: str, prompt_end: int, final: int) -> None:
        """A request waits for memory, whose prompt is ``prompt_end`` tokens, and is expected to get ``final`` long."""
        self._expected[request] = _Expected(prompt_end, final)

    def found(self, request: str, blocks: Sequence[int]) -> None:
        """Blocks of each group that a request found cached."""
        self._found[request] = blocks

    def outlook(self, request: str, tokens: int, states_to_come: int) -> Outlook:
        """What a request will take, and free at its end, once it has blocks for ``tokens`` tokens.

        Args:
            request: one that is expected; of others nothing more is.
            tokens: that it has blocks for.
            states_to_come: blocks that it takes of each group of states until its prompt is read, beside its own one.
        """
        prompt_end, final = self._expected.get(request) or _Expected(tokens, tokens)
        read = max(prompt_end, tokens)
        found = self._found.get(request) or [0] * len(self._groups)
        soon, frees = [], []
        for group, cached in zip(self._groups, found, strict=True):
            if not group.block_tokens:
                soon.append(states_to_come if tokens < prompt_end else 0)
                frees.append(1)
                continue
            held = group.blocks(tokens)
            soon.append(group.blocks(read) - held)
            # What it found cached may be in use by others, too.
            frees.append(max(held - cached, 0))
        return Outlook(tuple(soon), max(final - read, 0), tuple(frees))

    def set(self, request: str, outlook: Outlook) -> None:
        """What a request will take from now on. O(groups)."""
        self._remove(request)
        self._of[request] = outlook
        self._add(outlook, 1)

    def end(self, request: str) -> None:
        """A request ends, or is preempted. O(groups)."""
        self._remove(request)
        self._expected.pop(request, None)
        self._found.pop(request, None)

    def _remove(self, request: str) -> None:
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

"""Where a prompt should leave a branch checkpoint: learned from how far before their ends prompts branch.

A prompt leaves a state at its last checkpoint, for the next turn of a conversation. But one document may come with one
question after another, and some agents end each prompt with a note that the next one lacks: those branch *before* the
end. The state there is of no use to them, and without an earlier one they hit nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence

_HALVE_AFTER = 256
"""Prompts that continued earlier ones, after which older counts weigh half."""
_REMEMBERED = 4096
"""States at branch points that wait for their first hit, at most."""
_PRIOR = 8.0
"""Prompts that continued one from its very end, to begin with."""


class BranchStatistics:
    """The record of distances.

    Args:
        distances: how far before its last checkpoint, in tokens, a prompt may leave another; the nearest first.
    """

    def __init__(self, distances: Sequence[int]) -> None:
        self.distances = tuple(distances)
        self._counts = dict.fromkeys((0, *distances), 0.0)
        self._since_halved = 0

    def saw(self, distance: int) -> None:
        """A prompt branched from an earlier one so far before its end: 0, or the next of ``distances`` up."""
        self._counts[distance] += 1
        self._since_halved += 1
        if self._since_halved >= _HALVE_AFTER:
            self._since_halved = 0
            for each in self._counts:
                self._counts[each] /= 2

    def branch_checkpoint(self, end: int, state_tokens: float) -> int:
        """How far before ``end`` a prompt should leave a branch checkpoint; 0 for none.

        That is where the tokens saved for each byte kept are the most, if later prompts branch as earlier ones did.
        A state at a distance serves those that branch nearer to the end, too.

        Args:
            end: tokens up to the first state.
            state_tokens: tokens whose attention takes as many bytes as a state.
        """
        saved = (self._counts[0] + _PRIOR) * end
        best, chosen = saved / (end + state_tokens), 0
        branched = 0.0
        for distance in self.distances:
            branched += self._counts[distance]
            if end <= distance:
                break
            value = (saved + branched * (end - distance)) / (end + 2 * state_tokens)
            if value > best:
                best, chosen = value, distance
        return chosen


class BranchCheckpoints:
    """Which of the states left where prompts branch were hit: what they take, and what they are good for."""

    def __init__(self) -> None:
        self.left = 0
        """States left so far."""
        self.used = 0
        """Those of them that a later prompt has hit."""
        self._unused: OrderedDict[Hashable, None] = OrderedDict()
        """Keys of those that none has hit yet, the last one last."""

    def leave(self, key: Hashable) -> None:
        """A state was left at this place; every group of states says so."""
        if key not in self._unused:
            self.left += 1
            self._unused[key] = None
            if len(self._unused) > _REMEMBERED:
                self._unused.popitem(last=False)

    def hit(self, key: Hashable) -> None:
        """A prompt hits the state at this place."""
        if key in self._unused:
            del self._unused[key]
            self.used += 1

"""When prompts are gone on from: learned from those that were, still cached or not.

A prompt's end is remembered by a key (a hash of the text up to there) long after its blocks are gone. When a later
prompt contains that key, somebody has come back after a time that no cache had to last for. From these times follows
how likely a return is at any age, and from that the *promise* of keeping a leaf: hits to be had for the time that its
memory stays taken,

    promise(age) = max over t of  P(return in [age, age + t])  /  E[time until then, or t if nobody comes]

which is the Gittins index of a bandit that pays once (Gittins, 1979), here over ages in powers of two.

Time is counted in bytes that the arena handed out, for that is what ages a cache: an idle server keeps everything.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from enum import IntEnum
from math import exp

_BINS = 12
"""Ages: under one unit, then up to 2, 4, ... units; older than 2048 units counts as never."""
_REMEMBERED = 16_384
"""Keys that are remembered at most, some six for each prompt."""
_LEARN_EVERY = 64
"""Prompts after which the table is made anew."""
_PRIOR_WEIGHT = 0.1
"""Returns that the table starts from, at every age: a risk that falls with age, as in any LRU cache."""
_PRIOR_RISK = 6
"""The prior's time to a return, in ages."""
_SHARED_WEIGHT = 10.0
"""Returns to later turns that the table starts from as if they had been seen: there are few of each at first, and what
is known of all turns but the first is a fair guess. Chosen by simulation, see docs/prefix-caching.md."""
_TRUNK_USES = 2
"""Prompts that may go on from one end, until it counts as what many prompts begin with."""


class Turn(IntEnum):
    """Which turn of a conversation a prompt is: the more there were, the likelier is another."""

    FIRST = 0
    """It goes on from no earlier prompt."""
    SECOND = 1
    LATER = 2


class _End:
    """Where a prompt ended."""

    __slots__ = ("counted", "since", "turn", "uses")

    def __init__(self, since: int, turn: Turn) -> None:
        self.since = since
        self.turn = turn
        self.uses = 0
        """Prompts that went on from here."""
        self.counted = False
        """The time until the first of them, or until it was given up, is in the record."""


class Returns:
    """The record of returns.

    Args:
        unit: the first age bin, in bytes handed out: a small share of the memory, for ages under it aren't told apart.
    """

    def __init__(self, unit: int) -> None:
        self._unit = max(unit, 1)
        self._ends: OrderedDict[Hashable, tuple[_End, int]] = OrderedDict()
        """By key the end that it is of, and how far before it."""
        self._waiting: dict[_End, None] = {}
        """Ends that aren't counted yet."""
        # By turn and bin: returns, and units of time spent there without one, of ends forgotten.
        self._returns = [[0] * _BINS for _ in Turn]
        self._exposure = [[0.0] * _BINS for _ in Turn]
        self._promise = [[0.0] * _BINS for _ in Turn]
        self._since_learned = 0
        self._learn(0)

    def began(self, keys: Sequence[Hashable], now: int) -> tuple[int | None, Turn]:
        """A prompt with these keys came, the key of its longest prefix first.

        Returns:
            How far before the end of an earlier prompt it parts from it, as told to `ended`: 0 if it goes on from
            there, None if it goes on from no earlier prompt. And which turn that makes it.
        """
        ends = self._ends
        for key in keys:
            found = ends.get(key)
            if found is None or found[0].uses >= _TRUNK_USES:
                continue
            end, before = found
            end.uses += 1
            if not end.counted:
                self._returns[end.turn][self._bin(now - end.since)] += 1
                self._count(end, now)
            return before, Turn.FIRST if before else Turn(min(end.turn + 1, Turn.LATER))
        return None, Turn.FIRST

    def ended(self, places: Sequence[tuple[Hashable, int]], now: int, turn: Turn) -> None:
        """A prompt was served.

        Args:
            places: the keys of places where a later prompt may go on, and how far before the end each is, in any unit;
                the last place first.
            now: the time.
            turn: which turn it was, as `began` said.
        """
        end: _End | None = None
        for key, before in places:
            if key not in self._ends:
                # One prompt counts once, by its last end that isn't known yet.
                end = end or _End(now, turn)
                self._ends[key] = end, before
                self._waiting[end] = None
        while len(self._ends) > _REMEMBERED:
            _, (old, _) = self._ends.popitem(last=False)
            if not old.counted:
                self._count(old, now)
        self._since_learned += 1
        if self._since_learned >= _LEARN_EVERY:
            self._learn(now)

    def promise(self, age: int, turn: Turn) -> float:
        """Returns for each unit of time, if what such a turn left is kept at this age."""
        return self._promise[turn][self._bin(age)]

    def _bin(self, age: int) -> int:
        return min((age // self._unit).bit_length(), _BINS - 1)

    def _count(self, end: _End, now: int) -> None:
        end.counted = True
        del self._waiting[end]
        self._expose(self._exposure, end, now)

    def _expose(self, table: list[list[float]], end: _End, now: int) -> None:
        """Add the time that an end has waited to each bin that it passed."""
        age = (now - end.since) / self._unit
        row = table[end.turn]
        start, stop = 0.0, 1.0
        for index in range(_BINS):
            if age <= stop:
                row[index] += age - start
                return
            row[index] += stop - start
            start, stop = stop, 2 * stop

    def _learn(self, now: int) -> None:
        """Make the table anew: O(ends that wait), once in `_LEARN_EVERY` prompts."""
        self._since_learned = 0
        exposure = [row.copy() for row in self._exposure]
        for end in self._waiting:
            self._expose(exposure, end, now)
        first = [self._risk(exposure, index, (Turn.FIRST,)) for index in range(_BINS)]
        others = [self._risk(exposure, index, (Turn.SECOND, Turn.LATER)) for index in range(_BINS)]
        for turn in Turn:
            risks = first
            if turn != Turn.FIRST:
                risks = [
                    (returned + _SHARED_WEIGHT) / (time + _SHARED_WEIGHT / shared)
                    for returned, time, shared in zip(self._returns[turn], exposure[turn], others, strict=True)
                ]
            self._promise[turn] = [_gittins(risks, index) for index in range(_BINS)]

    def _risk(self, exposure: list[list[float]], index: int, turns: Sequence[Turn]) -> float:
        """Returns per unit of time in a bin, of some turns together."""
        returned = sum(self._returns[turn][index] for turn in turns) + _PRIOR_WEIGHT
        return returned / (sum(exposure[turn][index] for turn in turns) + _PRIOR_WEIGHT * _PRIOR_RISK * 2.0**index)


def _gittins(risks: Sequence[float], first: int) -> float:
    """The best ratio of returns to time from bin ``first`` on, given each bin's risk of a return per unit of time."""
    best = gain = time = 0.0
    waiting = 1.0
    for index in range(first, len(risks)):
        width = 2.0 ** max(index - 1, 0)
        come = 1 - exp(-risks[index] * width)
        gain += waiting * come
        time += waiting * width * (1 - come / 2)
        waiting *= 1 - come
        best = max(best, gain / time)
    return best

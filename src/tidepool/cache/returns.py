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
_TRUNK_USES = 2
"""Prompts that may go on from one end, until it counts as what many prompts begin with."""


class _End:
    """Where a prompt ended."""

    __slots__ = ("continued", "counted", "since", "uses")

    def __init__(self, since: int, continued: bool) -> None:
        self.since = since
        self.continued = continued
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
        # By kind (0 new, 1 continued) and bin: returns, and units of time spent there without one, of ends forgotten.
        self._returns = [[0] * _BINS, [0] * _BINS]
        self._exposure = [[0.0] * _BINS, [0.0] * _BINS]
        self._promise = [[0.0] * _BINS, [0.0] * _BINS]
        self._since_learned = 0
        self._learn(0)

    def began(self, keys: Sequence[Hashable], now: int) -> int | None:
        """A prompt with these keys came, the key of its longest prefix first.

        Returns:
            How far before the end of an earlier prompt it parts from it, as told to `ended`: 0 if it goes on from
            there, None if it goes on from no earlier prompt.
        """
        ends = self._ends
        for key in keys:
            found = ends.get(key)
            if found is None or found[0].uses >= _TRUNK_USES:
                continue
            end, before = found
            end.uses += 1
            if not end.counted:
                self._returns[end.continued][self._bin(now - end.since)] += 1
                self._count(end, now)
            return before
        return None

    def ended(self, places: Sequence[tuple[Hashable, int]], now: int, *, continued: bool) -> None:
        """A prompt was served.

        Args:
            places: the keys of places where a later prompt may go on, and how far before the end each is, in any unit;
                the last place first.
            now: the time.
            continued: whether it went on from an earlier one.
        """
        end: _End | None = None
        for key, before in places:
            if key not in self._ends:
                # One prompt counts once, by its last end that isn't known yet.
                end = end or _End(now, continued)
                self._ends[key] = end, before
                self._waiting[end] = None
        while len(self._ends) > _REMEMBERED:
            _, (old, _) = self._ends.popitem(last=False)
            if not old.counted:
                self._count(old, now)
        self._since_learned += 1
        if self._since_learned >= _LEARN_EVERY:
            self._learn(now)

    def promise(self, age: int, *, continued: bool) -> float:
        """Returns for each unit of time, if what is ``age`` old is kept."""
        return self._promise[continued][self._bin(age)]

    def _bin(self, age: int) -> int:
        return min((age // self._unit).bit_length(), _BINS - 1)

    def _count(self, end: _End, now: int) -> None:
        end.counted = True
        del self._waiting[end]
        self._expose(self._exposure, end, now)

    def _expose(self, table: list[list[float]], end: _End, now: int) -> None:
        """Add the time that an end has waited to each bin that it passed."""
        age = (now - end.since) / self._unit
        row = table[end.continued]
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
        for kind in (0, 1):
            risks = []
            for index in range(_BINS):
                prior_time = _PRIOR_WEIGHT * _PRIOR_RISK * 2**index
                risks.append((self._returns[kind][index] + _PRIOR_WEIGHT) / (exposure[kind][index] + prior_time))
            self._promise[kind] = [_gittins(risks, index) for index in range(_BINS)]


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

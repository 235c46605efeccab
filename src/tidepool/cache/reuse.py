"""When prompts are continued: learned from those that were, still cached or not.

A prompt's end is remembered by a key (a hash of the text up to there) long after its blocks are evicted. When a later
prompt contains that key, that is a *return*, after a time that is known whether or not the cache lasted for it. The
later prompt leaves a cached prefix with the same beginning, and the wait for the next return starts. From these times
follows how likely a return is at any age, and from that the *reuse index* of a cached prefix: hits gained for the time
that its memory stays taken,

    reuse_index(age) = max over t of  P(return in [age, age + t])  /  E[time until then, or t if nobody comes]

which is the Gittins index of a bandit that pays once (Gittins, 1979), here over ages in powers of two.

Time is counted in bytes that the arena handed out, for that is what ages a cache: an idle server keeps everything.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from math import exp
from typing import NamedTuple, Protocol

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
_SHARED_USES = 2
"""Prompts that may continue from one place, until it counts as a shared prefix."""


class TurnClass(IntEnum):
    """Which turn of a conversation a prompt is: the more there were, the likelier is another."""

    FIRST = 0
    """It continues no earlier prompt."""
    SECOND = 1
    LATER = 2
    NONE = 3
    """No turn of any, but what prompts of different conversations begin with."""


@dataclass(frozen=True)
class PrefixMatch:
    """What is known of a prompt when it comes."""

    turn: TurnClass
    distance: int | None = None
    """How far before the end of an earlier prompt it branches from it, as told to `ReuseModel.ended`: 0 if it contains
    all of it, None if it continues no earlier prompt, or a shared prefix."""
    shared: Hashable | None = None
    """The key of the longest known place that it shares with prompts of other conversations."""
    place: Hashable | None = field(default=None, compare=False)
    """The key of the longest known place that it shares with any prompt."""


class ResumePoint(NamedTuple):
    """Where a later prompt may continue one that was served."""

    key: Hashable
    distance: int
    """How far before the end of the prompt it is, in any unit; 0 for places that are as good as the end."""
    kept: bool
    """Whether a state was left there. If not, it only tells where prompts branch."""


class Observer(Protocol):
    """Told what the record is told, for policies with a record of their own."""

    def came(self, match: PrefixMatch) -> None:
        """A prompt came."""

    def ended(self, places: Sequence[ResumePoint], tokens: int, now: int) -> None:
        """A prompt was served; see `ReuseModel.ended`."""


class _Wait:
    """One wait for a return."""

    __slots__ = ("counted", "places", "since", "turn")

    def __init__(self, since: int, turn: TurnClass) -> None:
        self.since = since
        self.turn = turn
        self.places = 0
        """Places where a return would end it."""
        self.counted = False
        """The time until the first return, or until it was given up, is in the record."""


class _Known:
    """What is known of a place."""

    __slots__ = ("distance", "uses", "wait")

    def __init__(self, distance: int) -> None:
        self.distance = distance
        self.uses = 0
        """Prompts that continued from here."""
        self.wait: _Wait | None = None
        """For the next of them; None where nothing was left."""


class ReuseModel:
    """The record of returns.

    Args:
        unit: the first age bin, in bytes allocated: a small share of the memory, for ages under it aren't told apart.
    """

    def __init__(self, unit: int) -> None:
        self.observers: list[Observer] = []
        self._unit = max(unit, 1)
        self._places: OrderedDict[Hashable, _Known] = OrderedDict()
        """By key; the place that a prompt ended at last is last."""
        self._waits: dict[_Wait, None] = {}
        """Those that aren't counted yet."""
        # By turn and bin: returns, and units of time spent there without one, of waits that are over.
        self._returns = [[0] * _BINS for _ in TurnClass]
        self._exposure = [[0.0] * _BINS for _ in TurnClass]
        self._reuse_index = [[0.0] * _BINS for _ in TurnClass]
        self._since_learned = 0
        self.return_ages: deque[int] = deque(maxlen=_LEARN_EVERY * 16)
        """Ages at returns, cached still or not, since somebody took them from here."""
        self._learn(0)

    def began(self, keys: Sequence[Hashable], now: int) -> PrefixMatch:
        """A prompt with these keys came, the key of its longest prefix first."""
        known = next(((key, self._places[key]) for key in keys if key in self._places), None)
        match = self._returned(*known, now) if known else PrefixMatch(TurnClass.FIRST)
        for observer in self.observers:
            observer.came(match)
        return match

    def _returned(self, key: Hashable, known: _Known, now: int) -> PrefixMatch:
        """A prompt continues from here."""
        known.uses += 1
        wait = known.wait
        if wait is not None and not wait.counted:
            self._returns[wait.turn][self._bin(now - wait.since)] += 1
            self.return_ages.append(now - wait.since)
            self._count(wait, now)
        if known.uses > _SHARED_USES:
            return PrefixMatch(TurnClass.FIRST, shared=key, place=key)
        if known.distance:
            return PrefixMatch(TurnClass.FIRST, known.distance, key, key)
        earlier = TurnClass.FIRST if wait is None else wait.turn
        return PrefixMatch(TurnClass(min(earlier + 1, TurnClass.LATER)), 0, place=key)

    def ended(self, places: Sequence[ResumePoint], now: int, match: PrefixMatch, tokens: int = 0) -> None:
        """A prompt was served.

        Args:
            places: where a later prompt may continue.
            now: the time.
            match: what `began` said of it.
            tokens: up to the last state that it left.
        """
        for observer in self.observers:
            observer.ended(places, tokens, now)
        own, of_shared = _Wait(now, match.turn), _Wait(now, TurnClass.NONE)
        shared = None if match.shared is None else self._places.get(match.shared)
        if shared is not None:
            self._await(match.shared, shared.distance, of_shared, now)
        for place in places:
            known = self._places.get(place.key)
            if place.kept:
                many = known is not None and (known is shared or known.uses >= _SHARED_USES)
                self._await(place.key, place.distance, of_shared if many else own, now)
            elif known is None:
                self._places[place.key] = _Known(place.distance)
        while len(self._places) > _REMEMBERED:
            self._give_up(self._places.popitem(last=False)[1], now)
        self._since_learned += 1
        if self._since_learned >= _LEARN_EVERY:
            self._learn(now)

    def _await(self, key: Hashable, distance: int, wait: _Wait, now: int) -> None:
        """The next return to this place ends this wait: what was left there is part of a new cached prefix now."""
        known = self._places.setdefault(key, _Known(distance))
        self._places.move_to_end(key)
        known.distance = distance
        if known.wait is not wait:
            self._give_up(known, now)
            known.wait = wait
            wait.places += 1
            self._waits[wait] = None

    def _give_up(self, known: _Known, now: int) -> None:
        """What this place has waited for doesn't come any more."""
        wait = known.wait
        if wait is not None:
            wait.places -= 1
            if not wait.places and not wait.counted:
                self._count(wait, now)

    def reuse_index(self, age: int, turn: TurnClass) -> float:
        """Returns for each unit of time, if what such a turn left is kept at this age.

        Known where a bin of ages begins, and drawn straight in between: of two prefixes in one bin the older isn't as
        good as the younger.
        """
        table = self._reuse_index[turn]
        units = age / self._unit
        index = min(int(units).bit_length(), _BINS - 1)
        if index == _BINS - 1:
            return table[index]
        start = 2.0 ** (index - 1) if index else 0.0
        return table[index] + (units - start) / (2.0**index - start) * (table[index + 1] - table[index])

    def _bin(self, age: int) -> int:
        return min((age // self._unit).bit_length(), _BINS - 1)

    def _count(self, wait: _Wait, now: int) -> None:
        wait.counted = True
        del self._waits[wait]
        self._expose(self._exposure, wait, now)

    def _expose(self, table: list[list[float]], wait: _Wait, now: int) -> None:
        """Add the time waited to each bin that it passed."""
        age = (now - wait.since) / self._unit
        row = table[wait.turn]
        start, stop = 0.0, 1.0
        for index in range(_BINS):
            if age <= stop:
                row[index] += age - start
                return
            row[index] += stop - start
            start, stop = stop, 2 * stop

    def _learn(self, now: int) -> None:
        """Make the table anew: O(waits), once in `_LEARN_EVERY` prompts."""
        self._since_learned = 0
        exposure = [row.copy() for row in self._exposure]
        for wait in self._waits:
            self._expose(exposure, wait, now)
        others = [self._risk(exposure, index, (TurnClass.SECOND, TurnClass.LATER)) for index in range(_BINS)]
        for turn in TurnClass:
            risks = [self._risk(exposure, index, (turn,)) for index in range(_BINS)]
            if turn in (TurnClass.SECOND, TurnClass.LATER):
                risks = [
                    (returned + _SHARED_WEIGHT) / (time + _SHARED_WEIGHT / shared)
                    for returned, time, shared in zip(self._returns[turn], exposure[turn], others, strict=True)
                ]
            self._reuse_index[turn] = [_gittins(risks, index) for index in range(_BINS)]

    def _risk(self, exposure: list[list[float]], index: int, turns: Sequence[TurnClass]) -> float:
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

"""What waits is known: requests that wait are hits to come.

A request that waits for memory will look its prompt up in the cache when its turn comes. What it would find is evicted
for others meanwhile, when the queue is long: then its prompt is read anew, which makes the others wait longer. So the
longest state of each waiting prompt in the cache is kept track of. Requests that have much to lose go before those that
have not, and the cached prefix that they wait for goes last (`Arena.protect`). Protecting without reordering does harm:
what is kept for somebody at the end of a long queue is missing to those before.

States are named by keys as in `tidepool.cache.retention`. Work is done when a request begins to wait, when one ends,
and when a state that somebody waits for is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

WORTH = 0.5
"""A request has much to lose if at least this share of its prompt is cached."""
PASSED = 64
"""Requests that may go before one that came earlier, at most."""


@dataclass(slots=True)
class _Waiter:
    keys: Sequence[Hashable]
    number: int
    """In the order of arrival."""
    passes: int
    """Requests that had gone before others when it came."""
    place: int = 0
    """Keys of its prompt up to the longest state that is cached; 0 for none."""


class Waiting:
    """Requests that wait, and the longest cached state of each one's prompt.

    Args:
        protect: told of a key that somebody begins to wait for (True), or nobody waits for any more (False).
    """

    def __init__(self, protect: Callable[[Hashable, bool], None]) -> None:
        self._protect = protect
        self._waiters: dict[Hashable, _Waiter] = {}
        self._awaited: dict[Hashable, set[Hashable]] = {}
        """By key of a cached state, the requests of which it is the longest."""
        self._states: set[Hashable] = set()
        """Keys of states in the cache."""
        self._worthy: list[tuple[int, Hashable]] = []
        """A heap of (number, name) of requests that had much to lose at some time."""
        self._arrivals = 0
        self.passes = 0
        """Requests so far that went before others that had come earlier."""

    def __len__(self) -> int:
        return len(self._waiters)

    def __contains__(self, name: Hashable) -> bool:
        return name in self._waiters

    def arrives(self, name: Hashable, keys: Sequence[Hashable]) -> None:
        """A request waits; those that wait already came before it."""
        self._arrivals += 1
        waiter = self._waiters[name] = _Waiter(keys, self._arrivals, self.passes)
        self._place(name, waiter, len(keys))

    def leaves(self, name: Hashable) -> None:
        """A request waits no more."""
        waiter = self._waiters.pop(name, None)
        if waiter is not None:
            self._forget(name, waiter)

    def awaits(self, key: Hashable) -> bool:
        """Whether somebody waits for the state with this key."""
        return key in self._awaited

    # States.

    def cached(self, key: Hashable) -> None:
        """A state with this key is in the cache."""
        self._states.add(key)

    def removed(self, key: Hashable) -> None:
        """It is there no more; another may have taken its place."""
        self._states.discard(key)

    def forget_states(self) -> None:
        """The cache is empty."""
        self._states.clear()
        for key in tuple(self._awaited):
            self.lost(key)

    def lost(self, key: Hashable) -> None:
        """It was evicted: those who wait for it fall back to the next shorter one."""
        for name in tuple(self._awaited.get(key, ())):
            waiter = self._waiters[name]
            before = waiter.place - 1
            self._forget(name, waiter)
            self._place(name, waiter, before)

    def left(self, key: Hashable, place: int) -> None:
        """A request has ended and left a state; ``place`` is the number of keys up to it. O(requests that wait)."""
        for name, waiter in self._waiters.items():
            if waiter.place < place <= len(waiter.keys) and waiter.keys[place - 1] == key:
                self._forget(name, waiter)
                self._place(name, waiter, place)

    def _place(self, name: Hashable, waiter: _Waiter, most: int) -> None:
        """Find the longest cached state of up to ``most`` keys."""
        keys, states = waiter.keys, self._states
        waiter.place = next((place for place in range(most, 0, -1) if keys[place - 1] in states), 0)
        if not waiter.place:
            return
        key = keys[waiter.place - 1]
        names = self._awaited.setdefault(key, set())
        if not names:
            self._protect(key, True)
        names.add(name)
        if self._much_to_lose(waiter):
            heappush(self._worthy, (waiter.number, name))

    def _forget(self, name: Hashable, waiter: _Waiter) -> None:
        if waiter.place:
            key = waiter.keys[waiter.place - 1]
            names = self._awaited[key]
            names.discard(name)
            if not names:
                del self._awaited[key]
                self._protect(key, False)
        waiter.place = 0

    @staticmethod
    def _much_to_lose(waiter: _Waiter) -> bool:
        return waiter.place >= WORTH * len(waiter.keys)

    # Order.

    def goes_before(self, head: Hashable) -> Hashable | None:
        """Who goes before the request at the head of the queue: the earliest that has much to lose, unless that one has
        itself, or so many have gone before it already. None if nobody."""
        first = self._waiters.get(head)
        if first is None or self._much_to_lose(first) or self.passes - first.passes >= PASSED:
            return None
        while self._worthy:
            number, name = self._worthy[0]
            waiter = self._waiters.get(name)
            if waiter is not None and waiter.number == number and self._much_to_lose(waiter):
                self.passes += 1
                return name
            heappop(self._worthy)
        return None

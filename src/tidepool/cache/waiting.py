"""Who goes first of the requests that wait: what will hit is known.

A request that waits for memory will look its prompt up in the cache when its turn comes. When the queue is long, what
it would find is evicted for others meanwhile; then its prompt is read anew, which makes the others wait longer. So the
longest cached state of each waiting prompt is kept track of, and requests that have much to lose go before those that
have not. They take little time, and leave what their next turns will hit.

To evict last what requests wait for looks like the same thing, and does harm: what is kept for somebody at the end of a
long queue is missing to those before (docs/research/prefix-caching.md).

States are named by keys as in `tidepool.cache.retention`. Work is done when a request begins to wait, when one ends,
and when the order is asked for.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
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
    """Keys of its prompt up to the longest state that was cached when it was looked for last; 0 for none."""


class Waiting:
    """Requests that wait, and the longest cached state of each one's prompt."""

    def __init__(self) -> None:
        self._waiters: dict[Hashable, _Waiter] = {}
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

    # States.

    def cached(self, key: Hashable) -> None:
        """A state with this key is in the cache."""
        self._states.add(key)

    def removed(self, key: Hashable) -> None:
        """It is there no more."""
        self._states.discard(key)

    def forget_states(self) -> None:
        """The cache is empty."""
        self._states.clear()

    # Requests.

    def arrives(self, name: Hashable, keys: Sequence[Hashable]) -> None:
        """A request waits; those that wait already came before it. O(keys)."""
        self._arrivals += 1
        waiter = self._waiters[name] = _Waiter(keys, self._arrivals, self.passes)
        self._look(name, waiter, len(keys))

    def leaves(self, name: Hashable) -> None:
        """A request waits no more."""
        self._waiters.pop(name, None)

    def left(self, key: Hashable, place: int) -> None:
        """A request has ended and left a state; ``place`` is the number of keys up to it. O(requests that wait)."""
        for name, waiter in self._waiters.items():
            if waiter.place < place <= len(waiter.keys) and waiter.keys[place - 1] == key:
                self._look(name, waiter, place)

    def goes_before(self, head: Hashable) -> Hashable | None:
        """Who goes before the request at the head of the queue: the earliest that has much to lose, unless that one has
        itself, or so many have gone before it already. None if nobody."""
        first = self._waiters.get(head)
        if first is None or self.passes - first.passes >= PASSED or self._has_much_to_lose(head, first):
            return None
        while self._worthy:
            number, name = self._worthy[0]
            waiter = self._waiters.get(name)
            if waiter is not None and waiter.number == number and self._has_much_to_lose(name, waiter):
                self.passes += 1
                return name
            heappop(self._worthy)
        return None

    def _has_much_to_lose(self, name: Hashable, waiter: _Waiter) -> bool:
        """What was found for it may have gone since."""
        if waiter.place and waiter.keys[waiter.place - 1] not in self._states:
            self._look(name, waiter, waiter.place - 1)
        return waiter.place >= WORTH * len(waiter.keys)

    def _look(self, name: Hashable, waiter: _Waiter, most: int) -> None:
        """Find the longest cached state of up to ``most`` keys."""
        keys, states = waiter.keys, self._states
        waiter.place = next((place for place in range(most, 0, -1) if keys[place - 1] in states), 0)
        if waiter.place >= WORTH * len(keys):
            heappush(self._worthy, (waiter.number, name))

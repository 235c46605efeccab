"""Which cached memory goes first.

What one request leaves in the cache is a *cached prefix*: blocks of every group. They are of use together
or not at all, for a hit needs the attention of a whole prefix *and* the states at its end. So memory is judged, and
evicted, by cached prefixes. The arena files cached blocks under them; a policy says which one is evicted next.
`LeastRecentlyUsed` is the shortest policy there is; `ExpectedReturn` is the one that tidepool uses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from enum import IntEnum
from itertools import islice
from math import log2
from typing import Protocol

from tidepool.cache.reuse import ReuseModel, TurnClass


class PriorityClass(IntEnum):
    """What is known of a cached prefix."""

    LOW = 0
    """Of little use: states shortly behind another one of their request, and what is left of broken cached prefixes."""
    FIRST = 1
    """Of a prompt that continues no earlier one."""
    SECOND = 2
    """Of a prompt that continues such a one, as the second turn of a conversation does."""
    LATER = 3
    """Of a prompt that continues a second turn or a later one."""
    SHARED = 4
    """What prompts of different requests begin with, such as a system prompt."""


PRIORITY_OF_TURN = {
    TurnClass.FIRST: PriorityClass.FIRST,
    TurnClass.SECOND: PriorityClass.SECOND,
    TurnClass.LATER: PriorityClass.LATER,
    TurnClass.NONE: PriorityClass.SHARED,
}
"""The class of a cached prefix, by the turn whose return times it is judged by; nothing is expected of LOW."""
TURN_OF_PRIORITY = {priority: turn for turn, priority in PRIORITY_OF_TURN.items()}
_PER_OCTAVE = 4
"""Classes of values between one and its double. In a class values count as equal, and only ages are compared."""
_LEAST_SHARE = 1 / 64
"""Lower shares of attention count as this one."""


def value_class(value: float, least: float) -> int:
    """The class of a value; what is below ``least``, a positive one, counts as that."""
    return round(_PER_OCTAVE * log2(max(value, least)))


def value_of_class(number: int) -> float:
    """The value that all of a class count as."""
    value: float = 2.0 ** (number / _PER_OCTAVE)
    return value


class CachedPrefix:
    """Cached blocks that go together.

    Invariant: ``live`` counts the blocks that are cached and whose pool names this one. Other entries of ``blocks``
    are stale: blocks that were hit, and are of another one by now.
    """

    __slots__ = ("blocks", "broken", "bytes", "live", "priority", "queue", "running", "since", "state_bytes")

    def __init__(self, priority: PriorityClass, *, running: bool) -> None:
        self.priority = priority
        self.running = running
        """Its request hasn't finished: nobody can come back for it yet."""
        self.broken = False
        """Some of it was evicted, so the rest is of little use."""
        self.since = 0
        """When its request finished; see `Arena.now`. Meaningless while that runs."""
        self.blocks: deque[int] = deque()
        """In the order in which they go, each one number: ``block x groups + group``. A pair takes longer to make."""
        self.live = 0
        self.bytes = 0
        """Of those that are cached."""
        self.state_bytes = 0
        """Of the states among them."""
        self.queue: OrderedDict[CachedPrefix, None] | None = None
        """The policy's queue that it waits in."""


class Policy(Protocol):
    """What the arena asks of a policy. Every call costs O(1)."""

    low_together: bool
    """Whether blocks of low priority are one cached prefix; else each release makes one, that ages by itself."""

    def keep(self, prefix: CachedPrefix) -> None:
        """A cached prefix got its first block, its request finished, or it was broken."""

    def drop(self, prefix: CachedPrefix) -> None:
        """A cached prefix has lost its last block."""

    def victim(self, now: int) -> CachedPrefix | None:
        """The cached prefix to take blocks from at time ``now``; None if there is none."""


class LeastRecentlyUsed:
    """The cached prefix whose request finished the longest ago.

    Args:
        low_together: see `Policy`. Without, a state is evicted by its own last use, whatever is known of it.
    """

    def __init__(self, *, low_together: bool = True) -> None:
        self.low_together = low_together
        self._queue: OrderedDict[CachedPrefix, None] = OrderedDict()

    def keep(self, prefix: CachedPrefix) -> None:
        """See `Policy`."""
        self._queue[prefix] = None
        self._queue.move_to_end(prefix, last=not prefix.broken)

    def drop(self, prefix: CachedPrefix) -> None:
        """See `Policy`."""
        self._queue.pop(prefix, None)

    def victim(self, now: int) -> CachedPrefix | None:
        """See `Policy`."""
        return next(iter(self._queue), None)


class FinishedFirst(ABC):
    """What is broken or of low priority goes first, what running requests have left so far last.

    A running request's attention is there anyway, and a state alone takes little. Between the two a policy decides.
    """

    low_together = True

    def __init__(self) -> None:
        self._low: OrderedDict[CachedPrefix, None] = OrderedDict()
        self._running: OrderedDict[CachedPrefix, None] = OrderedDict()

    @abstractmethod
    def queue_of(self, prefix: CachedPrefix) -> OrderedDict[CachedPrefix, None]:
        """The queue for what a finished request has left, behind all that is in it."""

    @abstractmethod
    def next_finished(self, now: int) -> CachedPrefix | None:
        """Which one of these queues is evicted next; None if they are empty."""

    def keep(self, prefix: CachedPrefix) -> None:
        """See `Policy`."""
        self.drop(prefix)
        if prefix.broken or prefix.priority == PriorityClass.LOW:
            prefix.queue = self._low
        else:
            prefix.queue = self._running if prefix.running else self.queue_of(prefix)
        prefix.queue[prefix] = None

    def drop(self, prefix: CachedPrefix) -> None:
        """See `Policy`."""
        if prefix.queue is not None:
            del prefix.queue[prefix]
            prefix.queue = None

    def victim(self, now: int) -> CachedPrefix | None:
        """See `Policy`."""
        return next(iter(self._low), None) or self.next_finished(now) or next(iter(self._running), None)


class ExpectedReturn(FinishedFirst):
    """The cached prefix that promises the fewest tokens for the memory and time that it takes.

    That is its reuse index, the hits expected for each unit of time, times the tokens that a hit saves for each byte. A
    state takes as much after ten tokens as after ten thousand, so what decides the second is how much of its bytes is
    attention.

    How long people take to come back is learned (`tidepool.cache.reuse`). Where memory holds cached prefixes for less
    time than that, the oldest are the next to be hit, and keeping every new one a little longer serves nobody: then the
    youngest go, and the cache keeps *some* for long enough. So the oldest and the youngest of each class are compared,
    which finds the lowest index of all where the index has a single peak over age.

    Shared prefixes are hit by everybody; of those only the oldest can go.
    """

    def __init__(self, reuse: ReuseModel) -> None:
        super().__init__()
        self._reuse = reuse
        # By turn and by class of the share of attention, the oldest first.
        self._queues: dict[tuple[TurnClass, int], OrderedDict[CachedPrefix, None]] = {}

    def queue_of(self, prefix: CachedPrefix) -> OrderedDict[CachedPrefix, None]:
        """See `FinishedFirst`."""
        turn = TURN_OF_PRIORITY[prefix.priority]
        attention = 1 - prefix.state_bytes / prefix.bytes
        # What is states alone says nothing of its length: to host memory they go before their attention.
        weighs = attention and turn != TurnClass.NONE
        number = value_class(attention, _LEAST_SHARE) if weighs else 0
        return self._queues.setdefault((turn, number), OrderedDict())

    def next_finished(self, now: int) -> CachedPrefix | None:
        """See `FinishedFirst`."""
        least: tuple[float, CachedPrefix] | None = None
        for (turn, number), queue in self._queues.items():
            ends = [*islice(queue, 1), *islice(reversed(queue), int(turn != TurnClass.NONE))]
            for prefix in ends:
                index = self._reuse.reuse_index(now - prefix.since, turn) * value_of_class(number)
                if least is None or index < least[0]:
                    least = index, prefix
        return least and least[1]

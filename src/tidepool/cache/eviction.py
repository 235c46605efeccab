"""Which cached memory goes first.

What one request leaves in the cache is a *leaf*: blocks of every group. They are of use together or not at all, for a
hit needs the attention of a whole prefix *and* the states at its end. So memory is judged, and goes, by leaves. The
arena files cached blocks under leaves and takes them away; a policy says which leaf is next. `LeastRecentlyUsed` is the
shortest policy there is; `ExpectedReturn` is the one that tidepool uses.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from enum import IntEnum
from itertools import islice
from typing import Protocol

from tidepool.cache.returns import Returns, Turn


class Standing(IntEnum):
    """What is known of a leaf."""

    SPARE = 0
    """Of little use: states that the same request left another shortly before, and what broken leaves still have."""
    FIRST = 1
    """Of a prompt that went on from no earlier one."""
    SECOND = 2
    """Of a prompt that went on where such a prompt had ended, as the second turn of a conversation does."""
    LATER = 3
    """Of a prompt that went on from a second turn or a later one."""
    TRUNK = 4
    """What prompts of different requests begin with, such as a system prompt."""


OF_TURN = {
    Turn.FIRST: Standing.FIRST,
    Turn.SECOND: Standing.SECOND,
    Turn.LATER: Standing.LATER,
    Turn.NONE: Standing.TRUNK,
}
"""What a leaf is, by the turn whose times of return it is judged by; of spares nothing is expected."""


class Leaf:
    """Cached blocks that go together.

    Invariant: ``live`` counts the blocks that are cached and whose pool names this leaf. Other entries of ``blocks``
    are stale: blocks that were hit, and are of another leaf by now.
    """

    __slots__ = ("blocks", "broken", "live", "queue", "running", "since", "standing")

    def __init__(self, standing: Standing, *, running: bool) -> None:
        self.standing = standing
        self.running = running
        """Its request hasn't finished: nobody can come back for it yet."""
        self.broken = False
        """Some of it was evicted, so the rest is of little use."""
        self.since = 0
        """When its request finished; see `Arena.turnover`. Meaningless while that runs."""
        self.blocks: deque[tuple[int, int]] = deque()
        """(group, block) in the order in which they go."""
        self.live = 0
        self.queue: OrderedDict[Leaf, None] | None = None
        """The policy's queue that it waits in."""


class Policy(Protocol):
    """What the arena asks of a policy. Every call costs O(1)."""

    def keep(self, leaf: Leaf) -> None:
        """A leaf got its first block, its request finished, or it was broken."""

    def drop(self, leaf: Leaf) -> None:
        """A leaf has lost its last block."""

    def coldest(self, now: int) -> Leaf | None:
        """The leaf to take blocks from at time ``now``; None if there is none."""


class LeastRecentlyUsed:
    """The leaf whose request finished the longest ago."""

    def __init__(self) -> None:
        self._queue: OrderedDict[Leaf, None] = OrderedDict()

    def keep(self, leaf: Leaf) -> None:
        """See `Policy`."""
        self._queue[leaf] = None
        self._queue.move_to_end(leaf, last=not leaf.broken)

    def drop(self, leaf: Leaf) -> None:
        """See `Policy`."""
        self._queue.pop(leaf, None)

    def coldest(self, now: int) -> Leaf | None:
        """See `Policy`."""
        return next(iter(self._queue), None)


class ExpectedReturn:
    """The leaf that promises the fewest hits for the time that its memory is taken.

    How long people take to come back is learned (`tidepool.cache.returns`). Where memory holds leaves for less time
    than that, the oldest are the next to be hit, and keeping every new one a little longer serves nobody: then the
    youngest go, and the cache keeps *some* leaves long enough. So the oldest and the youngest leaf of each standing
    are compared, which finds the least promising of all where the promise has a single peak over age.

    Trunks are hit by everybody; of those only the oldest can go. What running requests have left so far goes when
    nothing else is left: their attention is there anyway, and a state alone takes little.
    """

    def __init__(self, returns: Returns) -> None:
        self._returns = returns
        # Of requests that finished, by standing, and of those that run; the oldest first.
        self._queues: tuple[OrderedDict[Leaf, None], ...] = tuple(OrderedDict() for _ in Standing)
        self._running: OrderedDict[Leaf, None] = OrderedDict()

    def keep(self, leaf: Leaf) -> None:
        """See `Policy`."""
        self.drop(leaf)
        if leaf.broken:
            leaf.queue = self._queues[Standing.SPARE]
        else:
            leaf.queue = self._running if leaf.running else self._queues[leaf.standing]
        leaf.queue[leaf] = None

    def drop(self, leaf: Leaf) -> None:
        """See `Policy`."""
        if leaf.queue is not None:
            del leaf.queue[leaf]
            leaf.queue = None

    def coldest(self, now: int) -> Leaf | None:
        """See `Policy`."""
        spares = self._queues[Standing.SPARE]
        return next(iter(spares), None) or self._least_promising(now) or next(iter(self._running), None)

    def _least_promising(self, now: int) -> Leaf | None:
        least: tuple[float, Leaf] | None = None
        for turn, standing in OF_TURN.items():
            queue = self._queues[standing]
            ends = [*islice(queue, 1), *islice(reversed(queue), int(standing != Standing.TRUNK))]
            for leaf in ends:
                promise = self._returns.promise(now - leaf.since, turn)
                if least is None or promise < least[0]:
                    least = promise, leaf
        return least and least[1]

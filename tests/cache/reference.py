"""Slow, obviously right accounts of the arena, for test_against_reference.py, and of returns, for test_reuse.py.

`Account` keeps no counters and no indices: which blocks are in use and which are cached, and everything else is counted
anew each time it is asked for. It doesn't choose blocks. It is told which ones the core handed out and which went, and
says whether that was allowed and what must be possible now.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, exp, log2

from tidepool.cache import PrefixMatch, ResumePoint, Retention, TurnClass, Usage, reuse

Block = tuple[int, int]
"""(group, block)"""


@dataclass(frozen=True)
class Layout:
    """How the memory is cut."""

    per_extent: tuple[int, ...]
    strides: tuple[int, ...]
    block_bytes: tuple[int, ...]
    firsts: tuple[int, ...]
    """The block of each group with which its extent 0 starts."""
    extents: int | None
    """Extents of an elastic partition, extent 0 for the null blocks; None for a fixed one."""
    total_bytes: int
    state_groups: frozenset[int] = frozenset()
    """Those whose blocks are states."""

    def extent_of(self, group: int, block: int) -> int:
        """The number of the extent that a block lies in; every group of a fixed partition has one, number 0."""
        return (block - self.firsts[group]) // self.per_extent[group]


class CachedPrefix:
    """Cached blocks that one request left."""

    def __init__(self, *, shared: bool, low: bool = False, turn: int = 0) -> None:
        self.shared, self.low, self.turn = shared, low, turn
        self.since = 0
        """When its request ended, or else when it got its first block; the account's own clock."""
        self.age_from = 0
        """The same in bytes handed out."""
        self.running = True
        self.broken = False
        self.attention = 1.0
        """The share of its bytes that were attention when its request ended, or else when it got its first block."""

    @property
    def quarter_octaves(self) -> int:
        """The share of attention, as prefixes are compared by it: less than a 64th counts as one, nothing as all."""
        return round(4 * log2(max(self.attention, 1 / 64))) if self.attention else 0


class Account:
    """What is in use, what is cached and whose it is."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.groups = range(len(layout.per_extent))
        self.refs: dict[Block, int] = {}
        """Blocks in use, with their references."""
        self.cached: dict[Block, CachedPrefix] = {}
        self.shared_blocks: set[Block] = set()
        self.last_prefix: dict[Block, CachedPrefix | None] = {}
        """The prefix that a block was in last, or that of the request that it was handed out to."""
        self.requests: dict[Hashable, tuple[CachedPrefix, CachedPrefix]] = {}
        self.low = CachedPrefix(shared=False, low=True)
        self.bytes_allocated = self.moves = self.released_count = self.clock = 0
        self.last_owner: dict[int, int] = {}

    # What must be possible.

    def pinned(self, group: int, blocks: Iterable[Block]) -> set[int]:
        """Extents of a group that can't change hands when ``blocks`` are in use."""
        if self.layout.extents is None:
            return {0}
        return {self.layout.extent_of(g, block) for g, block in blocks if g == group}

    def available(self, blocks: Iterable[Block] | None = None) -> int:
        """Extents in which none of these blocks lies, by default none that is in use now."""
        if self.layout.extents is None:
            return 0
        blocks = list(self.refs if blocks is None else blocks)
        return self.layout.extents - 1 - sum(len(self.pinned(g, blocks)) for g in self.groups)

    def extents_needed(self, needs: Sequence[int], touched: Sequence[Sequence[int]]) -> int:
        """Extents that are available no more once the touched blocks are in use and every group has what it needs."""
        blocks = {*self.refs, *((g, block) for g in self.groups for block in touched[g])}
        extents = 0
        for g in self.groups:
            room = len(self.pinned(g, blocks)) * self.layout.per_extent[g] - sum(group == g for group, _ in blocks)
            extents += ceil(max(needs[g] - room, 0) / self.layout.per_extent[g])
        return extents + self.available() - self.available(blocks)

    def most(self, group: int) -> int:
        """Blocks that one group can get if no other asks."""
        per_extent = self.layout.per_extent[group]
        pinned = len(self.pinned(group, self.refs)) * per_extent - sum(g == group for g, _ in self.refs)
        return pinned + self.available() * per_extent

    def owned(self) -> dict[tuple[int, int], list[Block]]:
        """(group, extent) of all extents that belong to a group, with their blocks that aren't clean."""
        owned: dict[tuple[int, int], list[Block]] = {}
        if self.layout.extents is None:
            owned = {(g, 0): [] for g in self.groups}
        for g, block in (*self.refs, *self.cached):
            owned.setdefault((g, self.layout.extent_of(g, block)), []).append((g, block))
        return owned

    def unowned(self) -> int:
        """Extents that no group has."""
        return 0 if self.layout.extents is None else self.layout.extents - 1 - len(self.owned())

    def usage(self) -> Usage:
        """Where the bytes are."""
        sizes, strides = self.layout.block_bytes, self.layout.strides
        owned = self.owned()
        if self.layout.extents is None:
            extent_bytes = 0
            null = self.layout.total_bytes - sum(self.layout.per_extent[g] * strides[g] for g in self.groups)
        else:
            null = extent_bytes = self.layout.total_bytes // self.layout.extents
        return Usage(
            total=self.layout.total_bytes,
            in_use=sum(sizes[g] for g, _ in self.refs),
            cached=sum(sizes[g] for g, _ in self.cached),
            free=sum((self.layout.per_extent[g] - len(blocks)) * sizes[g] for (g, _), blocks in owned.items()),
            unowned=self.unowned() * extent_bytes,
            padding=sum(self.layout.per_extent[g] * (strides[g] - sizes[g]) for g, _ in owned),
            null=null,
        )

    # What happened.

    def start(self, request: Hashable, turn: int) -> None:
        """A request begins."""
        self.requests[request] = CachedPrefix(shared=False, turn=turn), CachedPrefix(shared=True)

    def finish(self, request: Hashable) -> None:
        """A request ends."""
        for prefix in self.requests.pop(request):
            prefix.running = False
            self._now(prefix)
            self._weigh(prefix)

    def allocated(self, group: int, blocks: Sequence[int], request: Hashable | None) -> None:
        """The core handed out these blocks: none may be in use or cached, or lie where another group's do."""
        owned = self.owned()
        for block in blocks:
            extent = self.layout.extent_of(group, block)
            assert block >= self.layout.firsts[group], "the null block"
            assert self.layout.extents is None or 0 < extent < self.layout.extents
            assert (group, block) not in self.refs, "handed out while in use"
            assert (group, block) not in self.cached, "handed out while its contents could be asked for"
            assert not any((other, extent) in owned for other in self.groups if other != group) or (
                self.layout.extents is None
            ), "in an extent that another group has"
            self.refs[group, block] = 1
            self.shared_blocks.discard((group, block))
            self.last_prefix[group, block] = self.requests[request][0] if request is not None else None

    def touched(self, group: int, blocks: Sequence[int], request: Hashable | None, *, shared: bool) -> None:
        """References were added."""
        for block in blocks:
            self.cached.pop((group, block), None)
            self.refs[group, block] = self.refs.get((group, block), 0) + 1
            if shared:
                self.shared_blocks.add((group, block))
                if request is not None:
                    self.last_prefix[group, block] = self.requests[request][1]

    def released(self, group: int, blocks: Sequence[int], keep: Sequence[int], request: Hashable | None) -> None:
        """References were dropped."""
        together: dict[bool, CachedPrefix] = {}
        new: set[CachedPrefix] = set()
        for index, block in enumerate(blocks):
            name = group, block
            self.refs[name] -= 1
            if self.refs[name]:
                continue
            del self.refs[name]
            self.released_count += 1
            if not keep or keep[index] == Retention.DROP:
                continue
            shared, before = name in self.shared_blocks, self.last_prefix[name]
            if keep[index] == Retention.LOW:
                prefix = self.low
            elif request is not None:
                prefix = self.requests[request][shared]
            elif before is not None and before.shared == shared:
                prefix = before
            else:
                prefix = together.setdefault(shared, CachedPrefix(shared=shared))
                prefix.running = False
            if prefix not in self.cached.values():
                self._now(prefix)
                new.add(prefix)
            self.cached[name] = self.last_prefix[name] = prefix
        for prefix in new:
            self._weigh(prefix)

    def lost(self, group: int, block: int) -> CachedPrefix:
        """A cached block turned clean. Returns the prefix that it was in."""
        return self.cached.pop((group, block))

    def moved(self, extent: int, old: int | None, new: int) -> None:
        """A group got an extent: nobody may have anything in it."""
        assert not any(number == extent for _, number in self.owned()), "moved with blocks in it"
        assert old == self.last_owner.get(extent)
        self.moves += old not in (None, new)
        self.last_owner[extent] = new

    def may_go(self, policy: str, index: Callable[[CachedPrefix], float]) -> set[CachedPrefix]:
        """Leaves that may lose a block now, if the policy is ``lru`` or ``returns``."""
        leaves = set(self.cached.values())
        if policy == "lru":
            return {min(leaves, key=lambda prefix: prefix.since), *(prefix for prefix in leaves if prefix.broken)}
        if low := {prefix for prefix in leaves if prefix.low or prefix.broken}:
            return low
        ended = [prefix for prefix in leaves if not prefix.running]
        if not ended:
            return {min(leaves, key=lambda prefix: prefix.since)}
        oldest_trunk = min((prefix.since for prefix in ended if prefix.shared), default=0)
        ended = [prefix for prefix in ended if not prefix.shared or prefix.since == oldest_trunk]
        kinds: dict[Hashable, list[CachedPrefix]] = {}
        for prefix in sorted(ended, key=lambda prefix: prefix.since):
            kinds.setdefault("shared" if prefix.shared else (prefix.turn, prefix.quarter_octaves), []).append(prefix)
        candidates = [prefix for kind in kinds.values() for prefix in (kind[0], kind[-1])]
        worth = {
            prefix: index(prefix) * (1.0 if prefix.shared else 2.0 ** (prefix.quarter_octaves / 4))
            for prefix in candidates
        }
        return {prefix for prefix in candidates if worth[prefix] == min(worth.values())}

    def _weigh(self, prefix: CachedPrefix) -> None:
        blocks = [(g, self.layout.strides[g]) for (g, _), each in self.cached.items() if each is prefix]
        attention = sum(size for g, size in blocks if g not in self.layout.state_groups)
        prefix.attention = attention / sum(size for _, size in blocks) if blocks else 1.0

    def _now(self, prefix: CachedPrefix) -> None:
        self.clock += 1
        prefix.since, prefix.age_from = self.clock, self.bytes_allocated


class Wait:
    """Somebody may come back to what one prompt left."""

    def __init__(self, since: int, turn: TurnClass) -> None:
        self.since, self.turn = since, turn
        self.places: set[Hashable] = set()
        """Those where this is what is waited for."""
        self.over: int | None = None
        self.returned = False


class Place:
    """A place where a prompt went on or may go on."""

    def __init__(self, distance: int) -> None:
        self.distance, self.uses = distance, 0
        self.wait: Wait | None = None


class ReturnAccount:
    """A slow account of `ReuseModel`: all waits there ever were, counted anew for each question."""

    def __init__(self, unit: int) -> None:
        self.unit = unit
        self.waits: list[Wait] = []
        self.places: dict[Hashable, Place] = {}
        """The one that was waited at last is last."""

    def began(self, keys: Sequence[Hashable], now: int) -> tuple[TurnClass, int | None, Hashable, Hashable]:
        """A prompt came. Returns what is to be known of it: turn, distance, shared, place."""
        key = next((key for key in keys if key in self.places), None)
        if key is None:
            return TurnClass.FIRST, None, None, None
        place = self.places[key]
        place.uses += 1
        if place.wait is not None and place.wait.over is None:
            place.wait.over, place.wait.returned = now, True
        if place.uses > 2:
            return TurnClass.FIRST, None, key, key
        if place.distance:
            return TurnClass.FIRST, place.distance, key, key
        second = place.wait is None or place.wait.turn == TurnClass.FIRST
        return TurnClass.SECOND if second else TurnClass.LATER, 0, None, key

    def ended(self, points: Sequence[ResumePoint], now: int, match: PrefixMatch, remembered: int) -> None:
        """A prompt was served."""
        own, of_shared = Wait(now, match.turn), Wait(now, TurnClass.NONE)
        self.waits += own, of_shared
        if match.shared in self.places:
            self.wait_at(match.shared, self.places[match.shared].distance, of_shared)
        for point in points:
            place = self.places.get(point.key)
            if point.kept:
                many = place is not None and (point.key == match.shared or place.uses >= 2)
                self.wait_at(point.key, point.distance, of_shared if many else own)
            elif place is None:
                self.places[point.key] = Place(point.distance)
        for key in list(self.places)[: max(len(self.places) - remembered, 0)]:
            self.leave(key, self.places.pop(key), now)

    def wait_at(self, key: Hashable, distance: int, wait: Wait) -> None:
        """From now on this is what is waited for at a place."""
        place = self.places[key] = self.places.pop(key) if key in self.places else Place(distance)
        place.distance = distance
        if place.wait is not wait:
            self.leave(key, place, wait.since)
            place.wait = wait
        wait.places.add(key)

    def leave(self, key: Hashable, place: Place, now: int) -> None:
        """Nothing is waited for at a place any more."""
        if (wait := place.wait) is not None:
            wait.places.remove(key)
            if not wait.places and wait.over is None:
                wait.over = now

    def index(self, age: int, turn: TurnClass, now: int) -> float:
        """The index at an age: on a straight line between those at the ends of its bin."""
        edges: list[int] = [0, *(1 << power for power in range(reuse._BINS))]
        units = age / self.unit
        for start, stop in list(pairwise(edges))[:-1]:
            if units < stop:
                first, last = self.index_from(start, turn, now), self.index_from(stop, turn, now)
                return first + (last - first) * (units - start) / (stop - start)
        return self.index_from(2 ** (reuse._BINS - 2), turn, now)

    def index_from(self, units: int, turn: TurnClass, now: int) -> float:
        """Hits for the time that memory is taken, at best, from the start of a bin on.

        The head of `tidepool.cache.reuse` defines it.
        """
        edges: list[int] = [0, *(1 << power for power in range(reuse._BINS))]
        bins = list(pairwise(edges))
        later = (TurnClass.SECOND, TurnClass.LATER)
        risks = []
        for number, (start, stop) in enumerate(bins):
            returned, time = self.seen(number, start, stop, (turn,), now)
            if turn in later:
                of_all, time_of_all = self.seen(number, start, stop, later, now)
                prior = of_all / time_of_all
                (returned, time) = self.seen(number, start, stop, (turn,), now, prior=False)
                returned += reuse._SHARED_WEIGHT
                time += reuse._SHARED_WEIGHT / prior
            risks.append(returned / time)
        first = edges.index(units)
        ratios = []
        for last in range(first, len(bins)):
            alive, hits, taken = 1.0, 0.0, 0.0
            for risk, (start, stop) in list(zip(risks, bins, strict=True))[first : last + 1]:
                come = alive * (1 - exp(-risk * (stop - start)))
                hits += come
                taken += come * (stop - start) / 2 + (alive - come) * (stop - start)  # They come in the middle.
                alive -= come
            ratios.append(hits / taken)
        return max(ratios)

    def seen(
        self, number: int, start: int, stop: int, turns: Sequence[TurnClass], now: int, *, prior: bool = True
    ) -> tuple[float, float]:
        """(returns at an age from ``start`` to ``stop``, units of time waited at it) of some turns."""
        returned, time = 0.0, 0.0
        if prior:
            returned, time = reuse._PRIOR_WEIGHT, reuse._PRIOR_WEIGHT * reuse._PRIOR_RISK * 2**number
        for wait in self.waits:
            if wait.turn not in turns or (wait.over is None and not wait.places):
                continue
            age = ((now if wait.over is None else wait.over) - wait.since) / self.unit
            time += min(max(age - start, 0), stop - start)
            last = number == reuse._BINS - 1
            returned += wait.returned and start <= age and (age < stop or last)
        return returned, time

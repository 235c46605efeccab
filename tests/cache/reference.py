"""A slow, obviously right account of the arena, for test_against_reference.py.

It keeps no counters and no indices: which blocks are in use and which are cached, and everything else is counted anew
each time it is asked for. It doesn't choose blocks. It is told which ones the core handed out and which went, and says
whether that was allowed and what must be possible now.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from math import ceil

from tidepool.cache import Retention, Usage

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
        self.bytes_allocated = self.moves = self.clock = 0
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

    def admits(self, needs: Sequence[int], touched: Sequence[Sequence[int]]) -> bool:
        """Whether every group gets what it needs once the touched blocks are in use."""
        blocks = {*self.refs, *((g, block) for g in self.groups for block in touched[g])}
        extents = 0
        for g in self.groups:
            room = len(self.pinned(g, blocks)) * self.layout.per_extent[g] - sum(group == g for group, _ in blocks)
            extents += ceil(max(needs[g] - room, 0) / self.layout.per_extent[g])
        return extents <= self.available(blocks)

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

    def usage(self) -> Usage:
        """Where the bytes are."""
        sizes, strides = self.layout.block_bytes, self.layout.strides
        owned = self.owned()
        if self.layout.extents is None:
            unowned = 0
            null = self.layout.total_bytes - sum(self.layout.per_extent[g] * strides[g] for g in self.groups)
        else:
            null = self.layout.total_bytes // self.layout.extents
            unowned = (self.layout.extents - 1 - len(owned)) * null
        return Usage(
            total=self.layout.total_bytes,
            in_use=sum(sizes[g] for g, _ in self.refs),
            cached=sum(sizes[g] for g, _ in self.cached),
            free=sum((self.layout.per_extent[g] - len(blocks)) * sizes[g] for (g, _), blocks in owned.items()),
            unowned=unowned,
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

    def touched(self, group: int, blocks: Sequence[int], *, shared: bool) -> None:
        """References were added."""
        for block in blocks:
            self.cached.pop((group, block), None)
            self.refs[group, block] = self.refs.get((group, block), 0) + 1
            if shared:
                self.shared_blocks.add((group, block))

    def released(self, group: int, blocks: Sequence[int], keep: Sequence[int], request: Hashable | None) -> None:
        """References were dropped."""
        together: dict[bool, CachedPrefix] = {}
        for index, block in enumerate(blocks):
            name = group, block
            self.refs[name] -= 1
            if self.refs[name]:
                continue
            del self.refs[name]
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
            self.cached[name] = self.last_prefix[name] = prefix

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
        kinds = [[prefix for prefix in ended if (prefix.shared, prefix.turn) == (False, turn)] for turn in range(3)]
        kinds.append([prefix for prefix in ended if prefix.shared])
        by_age = [sorted(kind, key=lambda prefix: prefix.since) for kind in kinds if kind]
        candidates = [prefix for kind in by_age for prefix in (kind[0], kind[-1])]
        least = min(map(index, candidates))
        return {prefix for prefix in candidates if index(prefix) == least}

    def _now(self, prefix: CachedPrefix) -> None:
        self.clock += 1
        prefix.since, prefix.age_from = self.clock, self.bytes_allocated

"""A slow, obviously right account of the arena, for test_against_reference.py.

It keeps no counters and no indices: which blocks are in use and which are cached, and everything else is counted anew
each time it is asked for. It doesn't choose blocks. It is told which ones the core handed out and which went, and says
whether that was allowed and what must be possible now.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from math import ceil

from tidepool.cache import Keep, Usage

Block = tuple[int, int]
"""(group, block)"""


@dataclass(frozen=True)
class Layout:
    """How the memory is cut."""

    slots: tuple[int, ...]
    strides: tuple[int, ...]
    block_bytes: tuple[int, ...]
    firsts: tuple[int, ...]
    """The block of each group with which its extent 0 starts."""
    extents: int | None
    """Extents of an elastic partition, extent 0 for the null blocks; None for a fixed one."""
    total_bytes: int

    def extent_of(self, group: int, block: int) -> int:
        """The number of the extent that a block lies in; every group of a fixed partition has one, number 0."""
        return (block - self.firsts[group]) // self.slots[group]


class Leaf:
    """Cached blocks that one request left."""

    def __init__(self, *, trunk: bool, spare: bool = False, turn: int = 0) -> None:
        self.trunk, self.spare, self.turn = trunk, spare, turn
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
        self.groups = range(len(layout.slots))
        self.refs: dict[Block, int] = {}
        """Blocks in use, with their references."""
        self.cached: dict[Block, Leaf] = {}
        self.trunks: set[Block] = set()
        self.last_leaf: dict[Block, Leaf | None] = {}
        """The leaf that a block was in last, or that of the request that it was handed out to."""
        self.requests: dict[Hashable, tuple[Leaf, Leaf]] = {}
        self.spares = Leaf(trunk=False, spare=True)
        self.turnover = self.moves = self.clock = 0
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
            room = len(self.pinned(g, blocks)) * self.layout.slots[g] - sum(group == g for group, _ in blocks)
            extents += ceil(max(needs[g] - room, 0) / self.layout.slots[g])
        return extents <= self.available(blocks)

    def most(self, group: int) -> int:
        """Blocks that one group can get if no other asks."""
        slots = self.layout.slots[group]
        pinned = len(self.pinned(group, self.refs)) * slots - sum(g == group for g, _ in self.refs)
        return pinned + self.available() * slots

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
            null = self.layout.total_bytes - sum(self.layout.slots[g] * strides[g] for g in self.groups)
        else:
            null = self.layout.total_bytes // self.layout.extents
            unowned = (self.layout.extents - 1 - len(owned)) * null
        return Usage(
            total=self.layout.total_bytes,
            in_use=sum(sizes[g] for g, _ in self.refs),
            cached=sum(sizes[g] for g, _ in self.cached),
            clean=sum((self.layout.slots[g] - len(blocks)) * sizes[g] for (g, _), blocks in owned.items()),
            unowned=unowned,
            padding=sum(self.layout.slots[g] * (strides[g] - sizes[g]) for g, _ in owned),
            null=null,
        )

    # What happened.

    def start(self, request: Hashable, turn: int) -> None:
        """A request begins."""
        self.requests[request] = Leaf(trunk=False, turn=turn), Leaf(trunk=True)

    def finish(self, request: Hashable) -> None:
        """A request ends."""
        for leaf in self.requests.pop(request):
            leaf.running = False
            self._now(leaf)

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
            self.trunks.discard((group, block))
            self.last_leaf[group, block] = self.requests[request][0] if request is not None else None

    def touched(self, group: int, blocks: Sequence[int], *, trunk: bool) -> None:
        """References were added."""
        for block in blocks:
            self.cached.pop((group, block), None)
            self.refs[group, block] = self.refs.get((group, block), 0) + 1
            if trunk:
                self.trunks.add((group, block))

    def released(self, group: int, blocks: Sequence[int], keep: Sequence[int], request: Hashable | None) -> None:
        """References were dropped."""
        together: dict[bool, Leaf] = {}
        for index, block in enumerate(blocks):
            name = group, block
            self.refs[name] -= 1
            if self.refs[name]:
                continue
            del self.refs[name]
            if not keep or keep[index] == Keep.NO:
                continue
            trunk, before = name in self.trunks, self.last_leaf[name]
            if keep[index] == Keep.SPARE:
                leaf = self.spares
            elif request is not None:
                leaf = self.requests[request][trunk]
            elif before is not None and before.trunk == trunk:
                leaf = before
            else:
                leaf = together.setdefault(trunk, Leaf(trunk=trunk))
                leaf.running = False
            if leaf not in self.cached.values():
                self._now(leaf)
            self.cached[name] = self.last_leaf[name] = leaf

    def lost(self, group: int, block: int) -> Leaf:
        """A cached block turned clean. Returns the leaf that it was in."""
        return self.cached.pop((group, block))

    def moved(self, extent: int, old: int | None, new: int) -> None:
        """A group got an extent: nobody may have anything in it."""
        assert not any(number == extent for _, number in self.owned()), "moved with blocks in it"
        assert old == self.last_owner.get(extent)
        self.moves += old not in (None, new)
        self.last_owner[extent] = new

    def may_go(self, policy: str, promise: Callable[[Leaf], float]) -> set[Leaf]:
        """Leaves that may lose a block now, if the policy is ``lru`` or ``returns``."""
        leaves = set(self.cached.values())
        if policy == "lru":
            return {min(leaves, key=lambda leaf: leaf.since), *(leaf for leaf in leaves if leaf.broken)}
        if spares := {leaf for leaf in leaves if leaf.spare or leaf.broken}:
            return spares
        ended = [leaf for leaf in leaves if not leaf.running]
        if not ended:
            return {min(leaves, key=lambda leaf: leaf.since)}
        oldest_trunk = min((leaf.since for leaf in ended if leaf.trunk), default=0)
        ended = [leaf for leaf in ended if not leaf.trunk or leaf.since == oldest_trunk]
        kinds = [[leaf for leaf in ended if (leaf.trunk, leaf.turn) == (False, turn)] for turn in range(3)]
        kinds.append([leaf for leaf in ended if leaf.trunk])
        by_age = [sorted(kind, key=lambda leaf: leaf.since) for kind in kinds if kind]
        candidates = [leaf for kind in by_age for leaf in (kind[0], kind[-1])]
        least = min(map(promise, candidates))
        return {leaf for leaf in candidates if promise(leaf) == least}

    def _now(self, leaf: Leaf) -> None:
        self.clock += 1
        leaf.since, leaf.age_from = self.clock, self.turnover

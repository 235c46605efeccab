"""One group's blocks, and what each is doing.

A block is *in use* (referenced), *cached* (unreferenced, but its contents may still be asked for), or *clean*. Blocks
live in extents; the pool keeps, for every extent that it holds, how many of its blocks are in use and how many are
cached, and which are clean. It knows nothing of other groups: `tidepool.cache.arena` decides who gets which extent.

It also remembers whose a cached block is: its *leaf* (`tidepool.cache.eviction`).

Every operation costs O(1) a block, plus O(1) for an extent that changes its standing. Queues are OrderedDicts and not
dicts: finding the first key of a dict whose first keys have been deleted takes time in their number.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from tidepool.cache.eviction import Leaf


class Extent:
    """A pool's account of one extent.

    Invariant: blocks in use + cached + clean == slots. The extent is *pinned* while ``pins`` > 0, *idle* once
    only cached blocks keep it, and leaves the pool when all its blocks are clean.
    """

    __slots__ = ("cached", "filed", "first", "fresh", "number", "pins", "returned", "slots")

    def __init__(self, number: int, first: int, slots: int) -> None:
        self.number = number
        self.first = first
        self.slots = slots
        self.pins = 0
        """Blocks in use, and one more where the extent is held for good."""
        self.cached = 0
        """Cached blocks."""
        self.fresh = 0
        """Slots from here on haven't been handed out since the extent came."""
        self.returned: list[int] = []
        """Clean blocks below ``fresh``, the last returned on top: its bytes are the likeliest in a device's cache."""
        self.filed = -1
        """The class in which the pool's index of extents with clean blocks has this one; -1 for none."""

    @property
    def clean(self) -> int:
        """Number of clean blocks."""
        return self.slots - self.fresh + len(self.returned)

    def take_clean(self, count: int) -> list[int]:
        """Hand out ``count`` clean blocks; the caller has checked that there are so many."""
        reused = min(count, len(self.returned))
        blocks: list[int] = []
        if reused:
            blocks = self.returned[-reused:]
            del self.returned[-reused:]
        if count > reused:
            start = self.first + self.fresh
            self.fresh += count - reused
            blocks.extend(range(start, start + count - reused))
        return blocks


_IDLE = 32


class Pool:
    """The blocks of one group.

    Args:
        slots: blocks in an extent.
        blocks: block ids run from 0 to ``blocks - 1``.
        first: block ids before this one are never handed out, and extent e starts at block ``first + e x slots``.
    """

    def __init__(self, slots: int, blocks: int, first: int = 0) -> None:
        self.slots = slots
        self.first = first
        self.refs = [0] * blocks
        """References to each block; 0 for cached and clean ones."""
        self.leaves: list[Leaf | None] = [None] * blocks
        """The leaf of each cached block, and the one that a block in use may join when it turns cached; None for clean
        blocks."""
        self.trunk = bytearray(blocks)
        """1 for blocks that several prompts begin with."""
        self.extents: dict[int, Extent] = {}
        """Extents that this pool holds, by number."""
        self.idle: set[int] = set()
        """Extents with cached blocks and none in use."""
        self.in_use = 0
        """Blocks in use."""
        self.cached = 0
        """Cached blocks."""
        self.pinned = 0
        """Extents with a block in use; they can't change hands."""
        # Extents with clean blocks, in classes by clean.bit_length(): class k has 2^(k-1) to 2^k - 1 of them. Pinned
        # ones come first, idle ones from class _IDLE on; a bit of _nonempty for each class that has any.
        self._partial: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(2 * _IDLE)]
        self._nonempty = 0

    def extent_of(self, block: int) -> Extent:
        """The extent that holds ``block``."""
        return self.extents[(block - self.first) // self.slots]

    def is_cached(self, block: int) -> bool:
        """Whether the block is unreferenced and kept."""
        return self.leaves[block] is not None and not self.refs[block]

    @property
    def clean(self) -> int:
        """Number of clean blocks in extents that this pool holds."""
        return len(self.extents) * self.slots - self.in_use - self.cached

    @property
    def usable(self) -> int:
        """Blocks that this pool could hand out without another extent getting pinned: clean and cached ones."""
        return self.pinned * self.slots - self.in_use

    # What the arena calls. Each keeps the invariants of `Extent` and the indices above.

    def add(self, number: int) -> Extent:
        """Receive an extent; all its blocks are clean, and the caller is about to take one."""
        extent = self.extents[number] = Extent(number, self.first + number * self.slots, self.slots)
        self._file(extent)
        return extent

    def hold(self, number: int) -> None:
        """Pin an extent for good: it never turns idle or comes free."""
        extent = self.extents[number]
        extent.pins = 1
        self.pinned += 1
        self._file(extent)

    def remove(self, number: int) -> None:
        """Give up an extent whose blocks are all clean."""
        del self.extents[number]

    def partial(self) -> Extent | None:
        """A pinned extent with clean blocks, among the fullest; None if there is none."""
        return self._first_from(0, _IDLE)

    def idle_with(self, count: int) -> Extent | None:
        """An idle extent with at least ``count`` clean blocks and few more; None if there is none for sure."""
        return self._first_from(_IDLE + count.bit_length() + (count & (count - 1) > 0), 2 * _IDLE)

    def idle_widest(self, least: int) -> Extent | None:
        """An idle extent with as many clean blocks as any, up to a factor of two; None if it has under ``least``."""
        highest = self._nonempty.bit_length() - 1
        if highest < _IDLE:
            return None
        extent = self.extents[next(iter(self._partial[highest]))]
        return extent if extent.clean >= least else None

    def _first_from(self, start: int, stop: int) -> Extent | None:
        """An extent of the lowest class from ``start`` to before ``stop``: that fills extents up, so that others come
        free whole."""
        nonempty = self._nonempty & ((1 << stop) - (1 << start))
        if not nonempty:
            return None
        return self.extents[next(iter(self._partial[(nonempty & -nonempty).bit_length() - 1]))]

    def take(self, extent: Extent, count: int, leaf: Leaf | None) -> list[int]:
        """Hand out up to ``count`` clean blocks of an extent, each with one reference, for a request with this leaf."""
        blocks = extent.take_clean(min(count, extent.clean))
        for block in blocks:
            self.refs[block] = 1
            self.leaves[block] = leaf
            self.trunk[block] = 0
        self._pin(extent, len(blocks))
        return blocks

    def touch(self, block: int) -> None:
        """Reference a block that is in use or cached."""
        self.refs[block] += 1
        if self.refs[block] == 1:
            extent = self.extent_of(block)
            extent.cached -= 1
            self.cached -= 1
            self._pin(extent, 1)

    def release(self, block: int, *, keep: bool) -> Extent:
        """Drop a reference. The last one leaves the block clean, or cached if ``keep``, and the caller gives it a leaf.

        Returns its extent.
        """
        extent = self.extent_of(block)
        self.refs[block] -= 1
        if self.refs[block] == 0:
            if keep:
                extent.cached += 1
                self.cached += 1
            else:
                self.leaves[block] = None
                extent.returned.append(block)
            self._unpin(extent)
        return extent

    def forget(self, block: int) -> Extent:
        """Turn a cached block clean. Returns its extent."""
        extent = self.extent_of(block)
        extent.cached -= 1
        self.cached -= 1
        self.leaves[block] = None
        extent.returned.append(block)
        if not extent.cached:
            self.idle.discard(extent.number)
        self._file(extent)
        return extent

    def kept(self) -> Iterator[int]:
        """Cached blocks."""
        return (block for block in self._handed_out() if self.is_cached(block))

    def live(self) -> Iterator[int]:
        """Blocks in use."""
        return (block for block in self._handed_out() if self.refs[block])

    def _handed_out(self) -> Iterator[int]:
        """Blocks that aren't fresh."""
        for extent in self.extents.values():
            yield from range(extent.first, extent.first + extent.fresh)

    # Standing of extents.

    def _pin(self, extent: Extent, blocks: int) -> None:
        """Count ``blocks`` more in use."""
        if extent.pins == 0:
            self.pinned += 1
            self.idle.discard(extent.number)
        extent.pins += blocks
        self.in_use += blocks
        self._file(extent)

    def _unpin(self, extent: Extent) -> None:
        """Count one block less in use."""
        extent.pins -= 1
        self.in_use -= 1
        if extent.pins == 0:
            self.pinned -= 1
            if extent.cached:
                self.idle.add(extent.number)
        self._file(extent)

    def _file(self, extent: Extent) -> None:
        """Keep the index of extents with clean blocks true after a change."""
        clean = extent.clean
        if not clean or not (extent.pins or extent.cached):
            place = -1
        else:
            place = clean.bit_length() + (0 if extent.pins else _IDLE)
        if place == extent.filed:
            return
        if extent.filed >= 0:
            members = self._partial[extent.filed]
            del members[extent.number]
            if not members:
                self._nonempty &= ~(1 << extent.filed)
        if place >= 0:
            self._partial[place][extent.number] = None
            self._nonempty |= 1 << place
        extent.filed = place

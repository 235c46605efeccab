"""One group's blocks, and what each is doing.

A block is *in use* (referenced), *cached* (unreferenced, but its contents may still be asked for), or *free*. Blocks
live in extents; the pool keeps, for every extent that it holds, how many of its blocks are in use and how many are
cached, and which are free. It knows nothing of other groups: `tidepool.cache.arena` decides who gets which extent.

It also remembers whose a cached block is: its *cached prefix* (`tidepool.cache.eviction`).

Every operation costs O(1) a block, plus O(1) for an extent that turns pinned, idle or free. Queues are OrderedDicts and
not dicts: finding the first key of a dict whose first keys have been deleted takes time in their number.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator

from tidepool.cache.eviction import CachedPrefix


class Extent:
    """A pool's account of one extent.

    Invariant: blocks in use + cached + free == blocks. The extent is *pinned* while ``pins`` > 0, *idle* once
    only cached blocks keep it, and leaves the pool when all its blocks are free.
    """

    __slots__ = ("blocks", "bucket", "cached", "first", "never_used", "number", "pins", "returned")

    def __init__(self, number: int, first: int, blocks: int) -> None:
        self.number = number
        self.first = first
        self.blocks = blocks
        self.pins = 0
        """Blocks in use, and one more where the extent is held for good."""
        self.cached = 0
        """Cached blocks."""
        self.never_used = 0
        """Blocks from here on haven't been handed out since the extent came."""
        self.returned: list[int] = []
        """Free blocks below ``never_used``, the last returned on top: its bytes are likely in a cache."""
        self.bucket = -1
        """The class in which the pool's index of extents with free blocks has this one; -1 for none."""

    @property
    def free(self) -> int:
        """Number of free blocks."""
        return self.blocks - self.never_used + len(self.returned)

    def take_free(self, count: int) -> list[int]:
        """Hand out ``count`` free blocks; the caller has checked that there are so many."""
        reused = min(count, len(self.returned))
        blocks: list[int] = []
        if reused:
            blocks = self.returned[-reused:]
            del self.returned[-reused:]
        if count > reused:
            start = self.first + self.never_used
            self.never_used += count - reused
            blocks.extend(range(start, start + count - reused))
        return blocks


_IDLE = 32


class Pool:
    """The blocks of one group.

    Args:
        blocks_per_extent: blocks in an extent.
        blocks: block ids run from 0 to ``blocks - 1``.
        first: block ids before this one are never handed out, and extent e starts at block
            ``first + e x blocks_per_extent``.
    """

    def __init__(self, blocks_per_extent: int, blocks: int, first: int = 0) -> None:
        self.blocks_per_extent = blocks_per_extent
        self.first = first
        self.refs = [0] * blocks
        """References to each block; 0 for cached and free ones."""
        self.prefixes: list[CachedPrefix | None] = [None] * blocks
        """Of a cached block its cached prefix, of a block in use the one that it may join, of a free one None."""
        self.shared = bytearray(blocks)
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
        self.moves = 0
        """Extents so far that another pool had before."""
        self.evictions = 0
        """Cached blocks so far that were taken for something else."""
        # Extents with free blocks, in classes by free.bit_length(): class k has 2^(k-1) to 2^k - 1 of them. Pinned
        # ones come first, idle ones from class _IDLE on; a bit of _nonempty for each class that has any.
        self._partial: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(2 * _IDLE)]
        self._nonempty = 0

    def extent_of(self, block: int) -> Extent:
        """The extent that holds ``block``."""
        return self.extents[(block - self.first) // self.blocks_per_extent]

    def is_cached(self, block: int) -> bool:
        """Whether the block is unreferenced and kept."""
        return self.prefixes[block] is not None and not self.refs[block]

    @property
    def free(self) -> int:
        """Number of free blocks in extents that this pool holds."""
        return len(self.extents) * self.blocks_per_extent - self.in_use - self.cached

    @property
    def usable(self) -> int:
        """Blocks that this pool could hand out without another extent getting pinned: free and cached ones."""
        return self.pinned * self.blocks_per_extent - self.in_use

    # What the arena calls. Each keeps the invariants of `Extent` and the indices above.

    def add(self, number: int) -> Extent:
        """Receive an extent; all its blocks are free, and the caller is about to take one."""
        extent = self.extents[number] = Extent(
            number, self.first + number * self.blocks_per_extent, self.blocks_per_extent
        )
        self._file(extent)
        return extent

    def hold(self, number: int) -> None:
        """Pin an extent for good: it never turns idle or comes free."""
        extent = self.extents[number]
        extent.pins = 1
        self.pinned += 1
        self._file(extent)

    def remove(self, number: int) -> None:
        """Give up an extent whose blocks are all free."""
        del self.extents[number]

    def partial(self) -> Extent | None:
        """A pinned extent with free blocks, among the fullest; None if there is none."""
        return self._first_from(0, _IDLE)

    def idle_with(self, count: int) -> Extent | None:
        """An idle extent with at least ``count`` free blocks and few more; None if there is none for sure."""
        return self._first_from(_IDLE + count.bit_length() + (count & (count - 1) > 0), 2 * _IDLE)

    def idle_widest(self, least: int) -> Extent | None:
        """An idle extent with as many free blocks as any, up to a factor of two; None if it has under ``least``."""
        highest = self._nonempty.bit_length() - 1
        if highest < _IDLE:
            return None
        extent = self.extents[next(iter(self._partial[highest]))]
        return extent if extent.free >= least else None

    def _first_from(self, start: int, stop: int) -> Extent | None:
        """An extent of the lowest class from ``start`` to before ``stop``: that fills extents up, so that others come
        free whole."""
        nonempty = self._nonempty & ((1 << stop) - (1 << start))
        if not nonempty:
            return None
        return self.extents[next(iter(self._partial[(nonempty & -nonempty).bit_length() - 1]))]

    def take(self, extent: Extent, count: int, prefix: CachedPrefix | None) -> list[int]:
        """Hand out up to ``count`` free blocks of an extent, each with one reference, to be filed under ``prefix``."""
        blocks = extent.take_free(min(count, extent.free))
        for block in blocks:
            self.refs[block] = 1
            self.prefixes[block] = prefix
            self.shared[block] = 0
        self._pin(extent, len(blocks))
        return blocks

    def touch(self, blocks: Iterable[int]) -> list[int]:
        """Reference blocks that are in use or cached. Returns those that were cached."""
        woken: list[int] = []
        refs = self.refs
        for extent, run in self._by_extent(blocks):
            before = len(woken)
            for block in run:
                if not refs[block]:
                    woken.append(block)
                refs[block] += 1
            if count := len(woken) - before:
                extent.cached -= count
                self.cached -= count
                self._pin(extent, count)
        return woken

    def release(self, blocks: Iterable[int], keep: Iterable[int]) -> tuple[list[tuple[int, int]], list[Extent]]:
        """Drop a reference to each block. The last one leaves a block free, or cached if its ``keep`` isn't 0.

        Returns:
            (the blocks that turned cached, each with its ``keep``, for the caller to file; the extents whose blocks are
            all free now).
        """
        keeping = iter(keep)
        cached: list[tuple[int, int]] = []
        empty: list[Extent] = []
        refs, prefixes = self.refs, self.prefixes
        for extent, run in self._by_extent(blocks):
            before, freed = len(cached), 0
            for block, kept in zip(run, keeping, strict=False):
                left = refs[block] = refs[block] - 1
                if left:
                    continue
                if kept:
                    cached.append((block, kept))
                else:
                    freed += 1
                    prefixes[block] = None
                    extent.returned.append(block)
            extent.cached += len(cached) - before
            self.cached += len(cached) - before
            self._unpin(extent, len(cached) - before + freed)
            if not extent.pins and not extent.cached:
                empty.append(extent)
        return cached, empty

    def _by_extent(self, blocks: Iterable[int]) -> Iterator[tuple[Extent, list[int]]]:
        """Blocks in their order, by runs that lie in one extent: a request's blocks lie together."""
        run: list[int] = []
        start = stop = 0
        for block in blocks:
            if not start <= block < stop:
                if run:
                    yield self.extent_of(start), run
                run = []
                start = block - (block - self.first) % self.blocks_per_extent
                stop = start + self.blocks_per_extent
            run.append(block)
        if run:
            yield self.extent_of(start), run

    def forget(self, block: int) -> Extent:
        """Turn a cached block free. Returns its extent."""
        extent = self.extent_of(block)
        extent.cached -= 1
        self.cached -= 1
        self.prefixes[block] = None
        extent.returned.append(block)
        if not extent.cached:
            self.idle.discard(extent.number)
        self._file(extent)
        return extent

    def set_apart(self, extent: Extent) -> list[int]:
        """Take no block from this extent until one of it is released or turned free. Returns its cached blocks."""
        self._place(extent, -1)
        return [block for block in range(extent.first, extent.first + extent.never_used) if self.is_cached(block)]

    def kept(self) -> Iterator[int]:
        """Cached blocks."""
        return (block for block in self._handed_out() if self.is_cached(block))

    def live(self) -> Iterator[int]:
        """Blocks in use."""
        return (block for block in self._handed_out() if self.refs[block])

    def _handed_out(self) -> Iterator[int]:
        """Blocks that aren't never_used."""
        for extent in self.extents.values():
            yield from range(extent.first, extent.first + extent.never_used)

    # Extents in use and idle.

    def _pin(self, extent: Extent, blocks: int) -> None:
        """Count ``blocks`` more in use."""
        if extent.pins == 0:
            self.pinned += 1
            self.idle.discard(extent.number)
        extent.pins += blocks
        self.in_use += blocks
        self._file(extent)

    def _unpin(self, extent: Extent, blocks: int) -> None:
        """Count ``blocks`` less in use."""
        extent.pins -= blocks
        self.in_use -= blocks
        if extent.pins == 0:
            self.pinned -= 1
            if extent.cached:
                self.idle.add(extent.number)
        self._file(extent)

    def _file(self, extent: Extent) -> None:
        """Keep the index of extents with free blocks true after a change."""
        free = extent.free
        if not free or not (extent.pins or extent.cached):
            place = -1
        else:
            place = free.bit_length() + (0 if extent.pins else _IDLE)
        self._place(extent, place)

    def _place(self, extent: Extent, place: int) -> None:
        """Put an extent into a class of that index; -1 for none."""
        if place == extent.bucket:
            return
        if extent.bucket >= 0:
            members = self._partial[extent.bucket]
            del members[extent.number]
            if not members:
                self._nonempty &= ~(1 << extent.bucket)
        if place >= 0:
            self._partial[place][extent.number] = None
            self._nonempty |= 1 << place
        extent.bucket = place

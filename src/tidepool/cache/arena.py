"""The arena: who owns which extent, and who gives up what.

All groups' blocks live in one arena. In the *elastic* partition it is cut into equal extents; each belongs to one
group or to none, and an extent without a block in use can change hands. In the *fixed* partition every group holds
its share for good.

A request's blocks should lie together, so that they come free together: an extent in which many requests have a block
is seldom idle, and what can't become idle no other group can have. So an allocation
 - goes on in the extent in which the request has its last block;
 - takes new extents for as many blocks as fill them, and for the rest too if the request is long;
 - and else fills gaps in extents that short requests share.
New extents are unowned ones, or the idle one that was used the longest ago, whoever has it: what is cached there is
lost, and the extent changes hands whole. Before an idle one goes, cached blocks go that lie in the group's own pinned
extents, for nobody else could have that memory.

A new extent may be one that another group could have had. The arena keeps count of what an admission promised to each
group (see `Arena.admit`), and no group spends another's promise; it then makes do with its pinned extents, down to the
gaps in those of other requests. That is why an admitted request always gets its blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tidepool.cache.eviction import coldest_idle_extent
from tidepool.cache.geometry import Geometry, Share
from tidepool.cache.pool import Extent, Pool

LONG_REQUEST = 4
"""Extents from which on a request's last one is its own: half filled on average, it wastes an eighth at most."""


class OutOfBlocksError(RuntimeError):
    """A pool was asked for more blocks than it can get; ask `Arena.admit` first."""


@dataclass(frozen=True)
class Usage:
    """Where the arena's bytes are. ``clean + cached + in_use + unowned + padding + null == total``."""

    total: int
    in_use: int
    cached: int
    clean: int
    unowned: int
    padding: int
    null: int
    """Bytes at the start of the arena that belong to nobody."""


class Arena:
    """Pools for all groups over one memory.

    Group numbers index the groups in the order given. Block ids are per group: a block is named by (group, block),
    never by its id alone. Block 0 of every group is the null block, which is never handed out.

    Two callbacks tell the owner of the blocks' contents what is lost:
    ``on_evict(group, blocks)`` before cached blocks turn clean or leave with their extent, and
    ``on_move(extent, old_group, new_group)`` when a group gets an extent; ``old_group`` is None if it had no owner.
    """

    def __init__(
        self,
        pools: Sequence[Pool],
        *,
        unowned: Sequence[int],
        strides: Sequence[int],
        block_bytes: Sequence[int],
        extent_bytes: int,
        total_bytes: int,
        null_bytes: int,
        on_evict: Callable[[int, list[int]], None] | None = None,
        on_move: Callable[[int, int | None, int], None] | None = None,
    ) -> None:
        self.pools = tuple(pools)
        self._unowned = list(unowned)
        self._strides = tuple(strides)
        self._block_bytes = tuple(block_bytes)
        self._extent_bytes = extent_bytes
        self._total_bytes = total_bytes
        self._null_bytes = null_bytes
        self._on_evict = on_evict or (lambda group, blocks: None)
        self._on_move = on_move or (lambda extent, old, new: None)
        self._promised = [0] * len(self.pools)
        self._promised_total = 0
        self._now = 0
        self.moves = 0
        """Extents that changed hands so far, from one group to another without being unowned between."""

    @classmethod
    def elastic(
        cls,
        geometry: Geometry,
        extents: int,
        *,
        on_evict: Callable[[int, list[int]], None] | None = None,
        on_move: Callable[[int, int | None, int], None] | None = None,
    ) -> Arena:
        """An arena of ``extents`` extents, all but extent 0 unowned; extent 0 holds every group's null block."""
        return cls(
            [Pool(cut.slots, extents * cut.slots) for cut in geometry.cuts],
            unowned=range(extents - 1, 0, -1),
            strides=[cut.stride for cut in geometry.cuts],
            block_bytes=[cut.block_bytes for cut in geometry.cuts],
            extent_bytes=geometry.extent_bytes,
            total_bytes=extents * geometry.extent_bytes,
            null_bytes=geometry.extent_bytes,
            on_evict=on_evict,
            on_move=on_move,
        )

    @classmethod
    def fixed(
        cls,
        shares: Sequence[Share],
        total_bytes: int,
        *,
        on_evict: Callable[[int, list[int]], None] | None = None,
    ) -> Arena:
        """An arena in which every group holds its share as one extent that never leaves it."""
        pools = [Pool(share.blocks, share.first + share.blocks, share.first) for share in shares]
        for pool in pools:
            pool.add(0)
            pool.hold(0)
        used = sum(share.blocks * share.stride for share in shares)
        return cls(
            pools,
            unowned=(),
            strides=[share.stride for share in shares],
            block_bytes=[share.block_bytes for share in shares],
            extent_bytes=0,
            total_bytes=total_bytes,
            null_bytes=total_bytes - used,
            on_evict=on_evict,
        )

    # Admission.

    @property
    def available(self) -> int:
        """Extents that could go to any group: unowned and idle ones."""
        return len(self._unowned) + sum(len(pool.idle) for pool in self.pools)

    def extents_needed(self, needs: Sequence[int], touched: Sequence[Sequence[int]]) -> tuple[list[int], int]:
        """What an allocation would take from `available`.

        A group's need is met first by its pinned extents, then by whole extents: ceil((need - usable) / slots).
        Touching a cached block in an idle extent pins that extent, so it leaves `available` once, however many of
        its blocks are touched, and its other blocks become usable.

        Args:
            needs: new blocks for each group.
            touched: cached blocks of each group that will be referenced first, without repeats.

        Returns:
            (extents for each group's new blocks, idle extents that the touched blocks pin).
        """
        charges: list[int] = []
        pinned_by_touch = 0
        for pool, need, blocks in zip(self.pools, needs, touched, strict=True):
            usable = pool.usable
            if blocks:
                idle = {number for block in blocks if (number := (block - pool.first) // pool.slots) in pool.idle}
                pinned_by_touch += len(idle)
                usable += len(idle) * pool.slots - len(blocks)
            charges.append(-(-(need - usable) // pool.slots) if need > usable else 0)
        return charges, pinned_by_touch

    def admit(self, needs: Sequence[int], touched: Sequence[Sequence[int]] | None = None) -> bool:
        """Whether ``needs[g]`` blocks of every group g can be had, and if so promise them.

        The promise holds until `settle` or the next `admit`. In between, touch the blocks named here and allocate
        up to ``needs``; both then succeed.
        """
        charges, pinned = self.extents_needed(needs, touched or [()] * len(self.pools))
        if sum(charges) + pinned > self.available:
            self.settle()
            return False
        self.promise(charges)
        return True

    def promise(self, charges: Sequence[int]) -> None:
        """Set extents aside for each group, in place of any earlier promise. The caller has compared them with
        `available`."""
        self._promised = list(charges)
        self._promised_total = sum(charges)

    def settle(self) -> None:
        """End the promise."""
        if self._promised_total:
            self.promise([0] * len(self.pools))

    # Blocks.

    def allocate(self, group: int, count: int, *, last: int | None = None, held: int = 0) -> list[int]:
        """Hand out ``count`` blocks of a group, each with one reference.

        Args:
            group: the group.
            count: blocks.
            last: the block that the request got last, if any: where it goes on if it can.
            held: blocks that the request has in this group already.

        Raises:
            OutOfBlocksError: there are fewer to be had; nothing stays allocated.
        """
        pool = self.pools[group]
        blocks: list[int] = []
        if last is not None and (extent := pool.extent_of(last)).clean:
            blocks = pool.take(extent, count)
        long = held + count >= LONG_REQUEST * pool.slots
        while len(blocks) < count:
            missing = count - len(blocks)
            apart = self._new_extent(group, private=long) if long or missing >= pool.slots else None
            found = apart or self._some_extent(group)
            if found is None:
                self.release(group, blocks, keep=())
                raise OutOfBlocksError(f"Group {group} can't get {count} blocks: everything left is in use.")
            blocks += pool.take(found, missing)
        return blocks

    def touch(self, group: int, blocks: Sequence[int]) -> None:
        """Reference blocks that are in use or cached."""
        pool = self.pools[group]
        for block in blocks:
            pool.touch(block)

    def release(self, group: int, blocks: Sequence[int], keep: Sequence[bool]) -> None:
        """Drop one reference to each block, the first to be evicted first.

        Args:
            group: the group.
            blocks: blocks in use.
            keep: for each block, whether it stays cached when this was its last reference; ``()`` for none.
        """
        self._now += 1
        pool = self.pools[group]
        for index, block in enumerate(blocks):
            self._come_free(group, pool.release(block, keep=bool(keep) and keep[index], now=self._now))

    def forget(self, group: int, blocks: Sequence[int]) -> None:
        """Turn those of ``blocks`` that are cached clean; the caller has dropped their contents already."""
        pool = self.pools[group]
        for block in blocks:
            if pool.is_cached(block):
                self._come_free(group, pool.forget(block))

    def address(self, group: int, block: int) -> int:
        """Byte at which a block starts in the arena."""
        return block * self._strides[group]

    def usage(self) -> Usage:
        """Where the bytes are now. Costs O(groups)."""
        sums = [0, 0, 0]
        padding = 0
        for pool, stride, block_bytes in zip(self.pools, self._strides, self._block_bytes, strict=True):
            for index, blocks in enumerate((pool.in_use, pool.cached, pool.clean)):
                sums[index] += blocks * block_bytes
                padding += blocks * (stride - block_bytes)
        return Usage(
            total=self._total_bytes,
            in_use=sums[0],
            cached=sums[1],
            clean=sums[2],
            unowned=len(self._unowned) * self._extent_bytes,
            padding=padding,
            null=self._null_bytes,
        )

    # The search.

    def _some_extent(self, group: int) -> Extent | None:
        """An extent with a clean block for a few blocks of any request; None if nothing can be had."""
        pool = self.pools[group]
        if extent := pool.partial(private=False):
            return extent
        if self._unowned and (extent := self._new_extent(group)):
            return extent
        block = pool.coldest_pinned()
        if block is not None:
            self._on_evict(group, [block])
            return pool.forget(block)
        return self._new_extent(group) or pool.partial(private=True)

    def _new_extent(self, group: int, *, private: bool = False) -> Extent | None:
        """A wholly clean extent: an unowned one, or the coldest idle one. None if it is promised to other groups."""
        if self._promised[group]:
            self._promised[group] -= 1
            self._promised_total -= 1
        elif self.available <= self._promised_total:
            return None
        if self._unowned:
            number, old = self._unowned.pop(), None
        else:
            coldest = coldest_idle_extent(self.pools)
            assert coldest is not None, "available counts unowned and idle extents"
            old, number = coldest
            self._on_evict(old, list(self.pools[old].extents[number].cached))
            self.pools[old].remove(number)
            self.moves += old != group
        self._on_move(number, old, group)
        return self.pools[group].add(number, private=private)

    def _come_free(self, group: int, extent: Extent) -> None:
        """Make an extent unowned once all its blocks are clean."""
        if extent.pins == 0 and not extent.cached:
            self.pools[group].remove(extent.number)
            self._unowned.append(extent.number)

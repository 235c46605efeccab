"""The arena: who owns which extent, and who gives up what.

All groups' blocks live in one arena. In the *elastic* partition it is cut into equal extents; each belongs to one
group or to none, and an extent without a block in use can change hands. In the *fixed* partition every group holds
its share for good.

A request's blocks should lie together, so that they come free together: an extent in which many requests have a block
is seldom idle, and what can't become idle no other group can have. So an allocation
 - goes on in the extent in which the request has its last block;
 - takes new extents for as many blocks as fill them;
 - and fills gaps in extents that requests share: those of pinned extents, then of idle ones.
New extents are unowned ones. Gaps of idle extents are filled before those are taken as long as more extents are idle
than pinned: what leaves have lost in an extent that they shared would else stay a gap for good. Where there is neither,
leaves lose their blocks, in the order that the policy gives (`tidepool.cache.eviction`), until one has come free.

A new extent may be one that another group could have had. The arena keeps count of what an admission promised to each
group (see `Arena.admit`), and no group spends another's promise; it then makes do with its pinned extents, down to the
gaps in those of other requests. That is why an admitted request always gets its blocks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from enum import IntEnum

from tidepool.cache.eviction import OF_TURN, Leaf, LeastRecentlyUsed, Policy, Standing
from tidepool.cache.geometry import Geometry, Share
from tidepool.cache.pool import Extent, Pool
from tidepool.cache.returns import Turn

WIDE_GAP = 4
"""A gap of an idle extent, its clean blocks, is wide from one in so many of its blocks on. A narrower one isn't worth
pinning the extent for unless it holds all that is asked for."""
STALE_ENTRIES = 64
"""Entries of a leaf that may be stale before they are swept out, beside as many as are true."""


class Keep(IntEnum):
    """What becomes of a block whose last reference goes."""

    NO = 0
    """Nobody can ask for its contents: it turns clean."""
    YES = 1
    """It stays cached."""
    SPARE = 2
    """It stays cached until memory is short; see `Standing.SPARE`."""


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
    ``on_evict(group, block)`` before a cached block turns clean, and
    ``on_move(extent, old_group, new_group)`` when a group gets an extent; ``old_group`` is the one that had it last.

    Requests are named by any key of the caller's. Where no request is named, the blocks released together are a leaf.
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
        policy: Policy | None = None,
        on_evict: Callable[[int, int], None] | None = None,
        on_move: Callable[[int, int | None, int], None] | None = None,
    ) -> None:
        self.pools = tuple(pools)
        self._unowned = list(unowned)
        self._strides = tuple(strides)
        self._block_bytes = tuple(block_bytes)
        self._extent_bytes = extent_bytes
        self._total_bytes = total_bytes
        self._null_bytes = null_bytes
        self._on_evict = on_evict or (lambda group, block: None)
        self._on_move = on_move or (lambda extent, old, new: None)
        self._promised = [0] * len(self.pools)
        self._promised_total = 0
        self._policy = policy or LeastRecentlyUsed()
        self._leaves: dict[Hashable, tuple[Leaf, Leaf]] = {}
        """Of each request that hasn't finished: its own leaf, and the one for the trunks that it began with."""
        self._spares = Leaf(Standing.SPARE, running=False)
        self._last_owner: dict[int, int] = {}
        """Which group had an extent last."""
        self.turnover = 0
        """Bytes handed out so far: the clock by which cached memory ages."""
        self.released = 0
        """Times so far that a block lost its last reference: as long as it stays, no more can be had than before."""
        self.moves = 0
        """Extents that changed hands so far: that a group got and another had had before."""

    @classmethod
    def elastic(
        cls,
        geometry: Geometry,
        extents: int,
        *,
        policy: Policy | None = None,
        on_evict: Callable[[int, int], None] | None = None,
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
            policy=policy,
            on_evict=on_evict,
            on_move=on_move,
        )

    @classmethod
    def fixed(
        cls,
        shares: Sequence[Share],
        total_bytes: int,
        *,
        policy: Policy | None = None,
        on_evict: Callable[[int, int], None] | None = None,
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
            policy=policy,
            on_evict=on_evict,
        )

    # Admission.

    @property
    def unowned(self) -> int:
        """Extents that no group has."""
        return len(self._unowned)

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
        usable, pinned_by_touch = self._usable_behind(touched)
        return self._charges(needs, usable), pinned_by_touch

    def extents_needed_at_most(self, needs: Sequence[Sequence[int]], touched: Sequence[Sequence[int]]) -> int:
        """The most that any of several needs would take from `available`, as `extents_needed` counts."""
        usable, pinned_by_touch = self._usable_behind(touched)
        return max(sum(self._charges(each, usable)) for each in needs) + pinned_by_touch

    def _usable_behind(self, touched: Sequence[Sequence[int]]) -> tuple[list[int], int]:
        """(blocks of each group to be had without another extent once some are touched, idle extents that pins)."""
        usable: list[int] = []
        pinned = 0
        for pool, blocks in zip(self.pools, touched, strict=True):
            usable.append(pool.usable)
            if blocks:
                idle = {number for block in blocks if (number := (block - pool.first) // pool.slots) in pool.idle}
                pinned += len(idle)
                usable[-1] += len(idle) * pool.slots - len(blocks)
        return usable, pinned

    def _charges(self, needs: Sequence[int], usable: Sequence[int]) -> list[int]:
        """Extents that each group's need takes beyond what is usable."""
        return [
            -(-(need - have) // pool.slots) if need > have else 0
            for pool, need, have in zip(self.pools, needs, usable, strict=True)
        ]

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

    def allocate(
        self, group: int, count: int, *, last: int | None = None, request: Hashable | None = None
    ) -> list[int]:
        """Hand out ``count`` blocks of a group, each with one reference.

        Args:
            group: the group.
            count: blocks.
            last: the block that the request got last, if any: where it goes on if it can.
            request: the request, if it was started.

        Raises:
            OutOfBlocksError: there are fewer to be had; nothing stays allocated.
        """
        pool = self.pools[group]
        leaf = None if request is None else self._leaves[request][0]
        self.turnover += count * self._strides[group]
        blocks: list[int] = []
        if last is not None and (extent := pool.extent_of(last)).clean:
            blocks = pool.take(extent, count, leaf)
        while len(blocks) < count:
            missing = count - len(blocks)
            apart = missing >= pool.slots and (bool(self._unowned) or not self._gap(pool, missing))
            found = (self._new_extent(group) if apart else None) or self._some_extent(group, missing)
            if found is None:
                self.release(group, blocks)
                raise OutOfBlocksError(f"Group {group} can't get {count} blocks: everything left is in use.")
            blocks += pool.take(found, missing, leaf)
        return blocks

    def touch(self, group: int, blocks: Sequence[int], *, trunk: bool = False) -> None:
        """Reference blocks that are in use or cached.

        Args:
            group: the group.
            blocks: the blocks.
            trunk: whether a request found them that doesn't go on from an earlier one.
        """
        pool = self.pools[group]
        for block in blocks:
            if pool.refs[block] == 0:
                self._leave(pool.leaves[block])
            pool.touch(block)
            if trunk:
                pool.trunk[block] = 1

    def release(
        self, group: int, blocks: Sequence[int], keep: Sequence[int] = (), *, request: Hashable | None = None
    ) -> None:
        """Drop one reference to each block, the first to be evicted first.

        Args:
            group: the group.
            blocks: blocks in use.
            keep: for each block a `Keep`, which counts when this was its last reference; ``()`` for none.
            request: whose reference it was; None leaves cached blocks to the request that got them last.
        """
        pool = self.pools[group]
        pair = None if request is None or not keep else self._leaves[request]
        for index, block in enumerate(blocks):
            kept = keep[index] if keep else Keep.NO
            extent = pool.release(block, keep=bool(kept))
            if pool.refs[block]:
                continue
            self.released += 1
            if kept:
                trunk, leaf = pool.trunk[block], pool.leaves[block]
                if kept == Keep.SPARE:
                    leaf = self._spares
                elif request is not None or leaf is None or trunk != (leaf.standing == Standing.TRUNK):
                    pair = pair or _leaf_pair(Turn.FIRST, running=False)
                    leaf = pair[trunk]
                self._join(leaf, group, block)
            else:
                self._come_free(group, extent)

    def start(self, request: Hashable, turn: Turn) -> None:
        """A request begins, and may now be named; ``turn`` says whether it goes on from an earlier one."""
        self._leaves[request] = _leaf_pair(turn, running=True)

    def finish(self, request: Hashable) -> None:
        """A request ends, its blocks having been released: from now on its leaves age."""
        for leaf in self._leaves.pop(request):
            leaf.running = False
            leaf.since = self.turnover
            if leaf.live:
                self._policy.keep(leaf)

    def forget(self, group: int, blocks: Sequence[int]) -> None:
        """Turn those of ``blocks`` that are cached clean; the caller has dropped their contents already."""
        pool = self.pools[group]
        for block in blocks:
            if pool.is_cached(block):
                self._clean(group, block)

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

    # Leaves.

    def _join(self, leaf: Leaf, group: int, block: int) -> None:
        """A block that just turned cached joins a leaf."""
        self.pools[group].leaves[block] = leaf
        if len(leaf.blocks) > 2 * leaf.live + STALE_ENTRIES:
            # The last entry of each block that is still the leaf's; paid for by the stale ones.
            entries = reversed(leaf.blocks)
            true = dict.fromkeys(entry for entry in entries if self._holds(leaf, *entry))
            leaf.blocks = deque(reversed(true))
        leaf.blocks.append((group, block))
        leaf.live += 1
        if leaf.live == 1:
            leaf.since = self.turnover
            self._policy.keep(leaf)

    def _leave(self, leaf: Leaf | None) -> None:
        """A cached block leaves its leaf."""
        assert leaf is not None, "every cached block has a leaf"
        leaf.live -= 1
        if leaf.live == 0:
            leaf.blocks.clear()
            self._policy.drop(leaf)

    def _clean(self, group: int, block: int) -> None:
        """Turn a cached block clean."""
        pool = self.pools[group]
        self._leave(pool.leaves[block])
        self._come_free(group, pool.forget(block))

    def _evict(self, group: int, block: int) -> None:
        """Turn a cached block clean, whose contents nobody has dropped yet."""
        self._on_evict(group, block)
        self._clean(group, block)

    # The search.

    def _some_extent(self, group: int, count: int) -> Extent | None:
        """An extent with a clean block, for ``count`` blocks; None if nothing can be had."""
        pool = self.pools[group]
        while not (extent := pool.partial()):
            if self._may_pin(group):
                extent = self._gap(pool, count)
                if not extent and self._unowned:
                    return self._new_extent(group)
                if extent := extent or pool.idle_with(count):
                    self._pins_one(group)
                    return extent
            if not self._evict_coldest():
                return None
        return extent

    def _gap(self, pool: Pool, count: int) -> Extent | None:
        """An idle extent worth pinning, with a gap for ``count`` blocks or else a wide one; None if there is neither.

        Where more extents are pinned than idle none is worth it: what is short there are extents to pin.
        """
        if len(pool.idle) <= pool.pinned:
            return None
        return pool.idle_with(count) or pool.idle_widest(-(-pool.slots // WIDE_GAP))

    def _new_extent(self, group: int) -> Extent | None:
        """A wholly clean extent. None if all are promised to other groups."""
        if not self._may_pin(group):
            return None
        while not self._unowned:
            # Each leaf seldom has more than its states to give: extents that it shared come free only with the others.
            evicted = self._evict_coldest()
            assert evicted, "available counts unowned and idle extents"
        self._pins_one(group)
        number = self._unowned.pop()
        old = self._last_owner.get(number)
        self._last_owner[number] = group
        self.moves += old not in (None, group)
        self._on_move(number, old, group)
        return self.pools[group].add(number)

    def _pins_one(self, group: int) -> None:
        """A group pins one more extent: one less is promised to it."""
        if self._promised[group]:
            self._promised[group] -= 1
            self._promised_total -= 1

    def _may_pin(self, group: int) -> bool:
        """Whether there is an extent for this group that isn't promised to others."""
        return self.available > self._promised_total - self._promised[group]

    def _evict_coldest(self) -> bool:
        """Take a block from the coldest leaf. Returns False if nothing is cached."""
        leaf = self._policy.coldest(self.turnover)
        while leaf is not None:
            group, block = leaf.blocks.popleft()
            if self._holds(leaf, group, block):
                self._break(leaf)
                self._evict(group, block)
                return True
        return False

    def _break(self, leaf: Leaf) -> None:
        """A leaf is about to lose a block."""
        if not leaf.broken and leaf is not self._spares:
            leaf.broken = True
            self._policy.keep(leaf)

    def _holds(self, leaf: Leaf, group: int, block: int) -> bool:
        """Whether an entry of a leaf is true."""
        pool = self.pools[group]
        return pool.leaves[block] is leaf and not pool.refs[block]

    def _come_free(self, group: int, extent: Extent) -> None:
        """Make an extent unowned once all its blocks are clean."""
        if extent.pins == 0 and not extent.cached:
            self.pools[group].remove(extent.number)
            self._unowned.append(extent.number)


def _leaf_pair(turn: Turn, *, running: bool) -> tuple[Leaf, Leaf]:
    """A request's own leaf, and the one for the trunks that it began with."""
    return Leaf(OF_TURN[turn], running=running), Leaf(Standing.TRUNK, running=running)

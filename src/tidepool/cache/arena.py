"""The arena: who owns which extent, and who gives up what.

All groups' blocks live in one arena. In the *elastic* partition it is divided into equal extents; each belongs to one
group or to none, and an extent without a block in use can change hands. In the *fixed* partition every group holds
its share for good.

A request's blocks should lie together, so that they come free together: an extent in which many requests have a block
is seldom idle, and what can't become idle no other group can have. So an allocation
 - begins in the extent in which the request has its last block;
 - takes new extents for as many blocks as fill them;
 - and fills gaps in extents that requests share: those of pinned extents, then of idle ones.
New extents are unowned ones. Gaps of idle extents are filled before those are taken as long as more extents are idle
than pinned: what cached prefixes have lost in an extent that they shared would else stay a gap for good. Where there is
neither, cached prefixes lose their blocks, in the order that the policy gives (`tidepool.cache.eviction`), until an
extent is free. Before that, blocks that may be relocated are gathered: where the gaps between them hold all that one
extent has, that extent comes free, and nothing is lost.

A new extent may be one that another group could have had. The arena keeps count of what an admission reserved for each
group (see `Arena.reserve`), and no group spends another's reservation; it then makes do with its pinned extents, down
to the gaps in those of other requests. That is why an admitted request always gets its blocks.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import repeat

from tidepool.cache.eviction import PRIORITY_OF_TURN, CachedPrefix, LeastRecentlyUsed, Policy, PriorityClass
from tidepool.cache.geometry import Geometry, Share
from tidepool.cache.pool import Extent, Pool
from tidepool.cache.reuse import TurnClass

WIDE_GAP = 4
"""A gap of an idle extent, its free blocks, is wide from one in so many of its blocks on. A narrower one isn't worth
pinning the extent for unless it holds all that is asked for."""
AGES = 1024
"""The last ages at eviction that are remembered, for whoever reports them."""
STALE_ENTRIES = 64
"""Entries of a cached prefix that may be stale before they are swept out, beside as many as are true."""


class Retention(IntEnum):
    """What becomes of a block whose last reference goes."""

    DROP = 0
    """Nobody can ask for its contents: it turns free."""
    KEEP = 1
    """It stays cached."""
    LOW = 2
    """It stays cached until memory is short; see `PriorityClass.LOW`."""


class OutOfBlocksError(RuntimeError):
    """A pool was asked for more blocks than it can get; ask `Arena.extents_needed` first, and reserve them."""


@dataclass(frozen=True)
class GroupUsage:
    """Where the bytes of one group's extents are."""

    in_use: int
    cached: int
    free: int
    padding: int


@dataclass(frozen=True)
class Usage:
    """Where the arena's bytes are. ``free + cached + in_use + unowned + padding + null == total``."""

    total: int
    in_use: int
    cached: int
    free: int
    unowned: int
    padding: int
    null: int
    """Bytes at the start of the arena that belong to nobody."""


class Arena:
    """Pools for all groups over one memory.

    Group numbers index the groups in the order given. Block ids are per group: a block is named by (group, block),
    never by its id alone. Block 0 of every group is the null block, which is never handed out.

    Callbacks tell the owner of the blocks' contents what is lost:
    ``on_evict(group, block)`` before a cached block turns free,
    ``on_relocate(group, block, new_block)`` when the contents of a cached block of the ``relocatable`` groups are to be
    copied to another block of the group, before anything else is done with either, and
    ``on_move(extent, old_group, new_group)`` when a group gets an extent; ``old_group`` is the one that had it last.

    ``state_groups`` are those whose blocks are states: what one costs doesn't grow with the text before it.

    Cached memory ages by ``clock``, which tells the time in bytes that some arena handed out; by default this one.

    Requests are named by any key of the caller's. Where no request is named, the blocks released
    together are a cached prefix.
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
        on_relocate: Callable[[int, int, int], None] | None = None,
        relocatable: Sequence[int] = (),
        clock: Callable[[], int] | None = None,
        state_groups: Collection[int] = (),
    ) -> None:
        self.pools = tuple(pools)
        self._unowned = list(unowned)
        self._strides = tuple(strides)
        self.block_bytes = tuple(block_bytes)
        """Of one block of each group, without padding."""
        self._extent_bytes = extent_bytes
        self.total_bytes = total_bytes
        self.null_bytes = null_bytes
        """Bytes at the start that belong to nobody."""
        self._on_evict = on_evict or (lambda group, block: None)
        self._on_move = on_move or (lambda extent, old, new: None)
        self._on_relocate = on_relocate or (lambda group, block, new: None)
        self._relocatable = tuple(relocatable)
        self._state_groups = frozenset(state_groups)
        self.relocations = 0
        """Cached blocks so far that were copied to gather them."""
        self._reserved = [0] * len(self.pools)
        self._reserved_total = 0
        self._policy = policy or LeastRecentlyUsed()
        self._prefixes: dict[Hashable, tuple[CachedPrefix, CachedPrefix]] = {}
        """By request under way: its own cached prefix, and the one for the shared prefixes that it began with."""
        self._low = CachedPrefix(PriorityClass.LOW, running=False)
        self._last_owner: dict[int, int] = {}
        """Which group had an extent last."""
        self.bytes_allocated = 0
        """Bytes handed out so far."""
        self._clock = clock
        self.released = 0
        """Times so far that a block lost its last reference: as long as it stays, no more can be had than before."""
        self.evictions: dict[PriorityClass | None, int] = dict.fromkeys((*PriorityClass, None), 0)
        """Cached prefixes that were evicted so far, by class; None for what running requests had left. A prefix counts
        when it loses its first block, a block of low priority by itself."""
        self.eviction_ages: deque[int] = deque(maxlen=AGES)
        """Ages of prefixes at their eviction, since somebody took them from here."""

    @classmethod
    def elastic(
        cls,
        geometry: Geometry,
        extents: int,
        *,
        policy: Policy | None = None,
        on_evict: Callable[[int, int], None] | None = None,
        on_move: Callable[[int, int | None, int], None] | None = None,
        on_relocate: Callable[[int, int, int], None] | None = None,
        relocatable: Sequence[int] = (),
        clock: Callable[[], int] | None = None,
        state_groups: Collection[int] = (),
    ) -> Arena:
        """An arena of ``extents`` extents, all but extent 0 unowned; extent 0 holds every group's null block."""
        return cls(
            [Pool(layout.blocks_per_extent, extents * layout.blocks_per_extent) for layout in geometry.layouts],
            unowned=range(extents - 1, 0, -1),
            strides=[layout.stride for layout in geometry.layouts],
            block_bytes=[layout.block_bytes for layout in geometry.layouts],
            extent_bytes=geometry.extent_bytes,
            total_bytes=extents * geometry.extent_bytes,
            null_bytes=geometry.extent_bytes,
            policy=policy,
            on_evict=on_evict,
            on_move=on_move,
            on_relocate=on_relocate,
            relocatable=relocatable,
            clock=clock,
            state_groups=state_groups,
        )

    @classmethod
    def fixed(
        cls,
        shares: Sequence[Share],
        total_bytes: int,
        *,
        policy: Policy | None = None,
        on_evict: Callable[[int, int], None] | None = None,
        state_groups: Collection[int] = (),
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
            state_groups=state_groups,
        )

    def begin_at_the_end(self) -> None:
        """Hand out the last extents first, and the last blocks of fixed shares; a test of addresses.

        Nothing has been allocated yet.
        """
        self._unowned.reverse()
        for extent in (extent for pool in self.pools for extent in pool.extents.values()):
            extent.never_used = extent.blocks
            extent.returned = list(range(extent.first, extent.first + extent.blocks))

    @property
    def moves(self) -> int:
        """Extents that changed hands so far: that a group got and another had had before."""
        return sum(pool.moves for pool in self.pools)

    @property
    def now(self) -> int:
        """The time by which cached memory ages: bytes handed out, by this arena or by the one that it goes by."""
        return self.bytes_allocated if self._clock is None else self._clock()

    # Admission.

    @property
    def unowned(self) -> int:
        """Extents that no group has."""
        return len(self._unowned)

    @property
    def unowned_bytes(self) -> int:
        """Bytes of the extents that no group has."""
        return len(self._unowned) * self._extent_bytes

    @property
    def available(self) -> int:
        """Extents that could go to any group: unowned and idle ones."""
        return len(self._unowned) + sum(len(pool.idle) for pool in self.pools)

    def extents_needed(self, needs: Sequence[int], touched: Sequence[Sequence[int]]) -> tuple[list[int], int]:
        """What an allocation would take from `available`.

        A group's need is met first by its pinned extents, then by whole extents: ceil((need - usable) /
        blocks_per_extent). Touching a cached block in an idle extent pins that extent, so it leaves `available` once,
        however many of its blocks are touched, and its other blocks become usable.

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
        """(blocks that each group can get without another extent once some are touched, idle extents that pins)."""
        usable: list[int] = []
        pinned = 0
        for pool, blocks in zip(self.pools, touched, strict=True):
            usable.append(pool.usable)
            if blocks:
                first, per_extent = pool.first, pool.blocks_per_extent
                idle = pool.idle.intersection([(block - first) // per_extent for block in blocks])
                pinned += len(idle)
                usable[-1] += len(idle) * pool.blocks_per_extent - len(blocks)
        return usable, pinned

    def _charges(self, needs: Sequence[int], usable: Sequence[int]) -> list[int]:
        """Extents that each group's need takes beyond what is usable."""
        return [
            -(-(need - have) // pool.blocks_per_extent) if need > have else 0
            for pool, need, have in zip(self.pools, needs, usable, strict=True)
        ]

    def reserve(self, charges: Sequence[int]) -> None:
        """Set extents aside for each group, in place of any earlier reservation.

        The caller has compared them with `available`. It holds until `release_reservation`: in between the touched
        blocks that `extents_needed` was told of are referenced and its needs allocated, and both succeed.
        """
        self._reserved = list(charges)
        self._reserved_total = sum(charges)

    def release_reservation(self) -> None:
        """End the reservation."""
        if self._reserved_total:
            self.reserve([0] * len(self.pools))

    # Blocks.

    def allocate(
        self, group: int, count: int, *, last: int | None = None, request: Hashable | None = None
    ) -> list[int]:
        """Hand out ``count`` blocks of a group, each with one reference.

        Args:
            group: the group.
            count: blocks.
            last: the block that the request got last, if any: its extent is filled first.
            request: the request, if it was started.

        Raises:
            OutOfBlocksError: there are fewer; nothing stays allocated.
        """
        pool = self.pools[group]
        prefix = None if request is None else self._prefixes[request][0]
        self.bytes_allocated += count * self._strides[group]
        blocks: list[int] = []
        if last is not None and (extent := pool.extent_of(last)).free:
            blocks = pool.take(extent, count, prefix)
        while len(blocks) < count:
            missing = count - len(blocks)
            apart = missing >= pool.blocks_per_extent and (bool(self._unowned) or not self._gap(pool, missing))
            found = (self._new_extent(group) if apart else None) or self._some_extent(group, missing)
            if found is None:
                self.release(group, blocks)
                raise OutOfBlocksError(f"Group {group} can't get {count} blocks: everything left is in use.")
            blocks += pool.take(found, missing, prefix)
        return blocks

    def touch(
        self, group: int, blocks: Sequence[int], *, shared: bool = False, request: Hashable | None = None
    ) -> None:
        """Reference blocks that are in use or cached.

        Args:
            group: the group.
            blocks: the blocks.
            shared: whether a request found them that continues no earlier one.
            request: that request. Whoever releases them, they are then cached as a shared prefix of its.
        """
        pool = self.pools[group]
        prefixes = pool.prefixes
        for prefix, count in Counter(prefixes[block] for block in pool.touch(blocks)).items():
            self._leave(prefix, group, count)
        if not shared:
            return
        own = None if request is None else self._prefixes[request][1]
        for block in blocks:
            pool.shared[block] = 1
            if own:
                prefixes[block] = own

    def allocate_for_copy(
        self, group: int, source_group: int, source: int, *, request: Hashable | None = None
    ) -> int | None:
        """Hand out a block of a group, with one reference, for a copy of what a block in use of another group holds.

        It is filed as the source would be if ``request`` released that now.

        Returns:
            The block; None if everything left is in use.
        """
        pool, shared = self.pools[source_group], self.pools[source_group].shared[source]
        prefix = pool.prefixes[source] if request is None else self._prefixes[request][shared]
        try:
            (block,) = self.allocate(group, 1)
        except OutOfBlocksError:
            return None
        self.pools[group].prefixes[block], self.pools[group].shared[block] = prefix, shared
        return block

    def adopt(self, group: int, block: int, request: Hashable) -> None:
        """A block in use goes to this request's cached prefix once it is cached, whosever it was."""
        self.pools[group].prefixes[block] = self._prefixes[request][0]

    def release(
        self, group: int, blocks: Sequence[int], keep: Sequence[int] = (), *, request: Hashable | None = None
    ) -> None:
        """Drop one reference to each block, the first to be evicted first.

        Args:
            group: the group.
            blocks: blocks in use.
            keep: for each block a `Retention`, which counts when this was its last reference; ``()`` for none.
            request: whose reference it was; None leaves cached blocks to the request that got them last,
                or found them as shared.
        """
        pool = self.pools[group]
        in_use = pool.in_use
        cached, empty = pool.release(blocks, keep or repeat(Retention.DROP))
        self.released += in_use - pool.in_use
        for extent in empty:
            self._come_free(group, extent)
        if not cached:
            return
        pair = None if request is None else self._prefixes[request]
        low = self._low if self._policy.low_together else CachedPrefix(PriorityClass.LOW, running=False)
        joining: dict[CachedPrefix, list[int]] = {}
        at_low = Retention.LOW  # Looked up once: a prompt has thousands of blocks.
        for block, kept in cached:
            shared, prefix = pool.shared[block], pool.prefixes[block]
            if kept == at_low:
                prefix = low
            elif request is not None or prefix is None or shared != (prefix.priority == PriorityClass.SHARED):
                pair = pair or _prefix_pair(TurnClass.FIRST, running=False)
                prefix = pair[shared]
            joining.setdefault(prefix, []).append(block)
        for prefix, joined in joining.items():
            self._join(prefix, group, joined)

    def start(self, request: Hashable, turn: TurnClass) -> None:
        """A request begins, and may now be named; ``turn`` says which turn of a conversation it is."""
        self._prefixes[request] = _prefix_pair(turn, running=True)

    def finish(self, request: Hashable) -> None:
        """A request ends, its blocks having been released: from now on its cached prefixes age."""
        for prefix in self._prefixes.pop(request):
            prefix.running = False
            prefix.since = self.now
            if prefix.live:
                self._policy.keep(prefix)

    def left_by(self, request: Hashable) -> Iterator[tuple[int, int]]:
        """(group, block) of what a request under way has in the cache, but for what is of low priority; in the order in
        which it goes."""
        for prefix in self._prefixes.get(request, ()):
            for entry in prefix.blocks:
                if self._holds(prefix, entry):
                    yield self._named(entry)

    def forget(self, group: int, blocks: Sequence[int]) -> None:
        """Turn those of ``blocks`` that are cached free; the caller has dropped their contents already."""
        pool = self.pools[group]
        for block in blocks:
            if pool.is_cached(block):
                self._free(group, block)

    def address(self, group: int, block: int) -> int:
        """Byte at which a block starts in the arena."""
        return block * self._strides[group]

    def usage(self) -> Usage:
        """Where the bytes are now. Costs O(groups)."""
        groups = self.usage_of_groups()
        return Usage(
            total=self.total_bytes,
            in_use=sum(group.in_use for group in groups),
            cached=sum(group.cached for group in groups),
            free=sum(group.free for group in groups),
            unowned=self.unowned_bytes,
            padding=sum(group.padding for group in groups),
            null=self.null_bytes,
        )

    def usage_of_groups(self) -> list[GroupUsage]:
        """The same for each group. Costs O(groups)."""
        return [
            GroupUsage(
                in_use=pool.in_use * size,
                cached=pool.cached * size,
                free=pool.free * size,
                padding=len(pool.extents) * pool.blocks_per_extent * (stride - size),
            )
            for pool, stride, size in zip(self.pools, self._strides, self.block_bytes, strict=True)
        ]

    # Cached prefixes.

    def _join(self, prefix: CachedPrefix, group: int, blocks: Sequence[int]) -> None:
        """Blocks that just turned cached join a cached prefix."""
        prefixes = self.pools[group].prefixes
        for block in blocks:
            prefixes[block] = prefix
        self._enter(prefix, group, blocks)
        self._count(prefix, group, len(blocks))
        if prefix.live == len(blocks):
            prefix.since = self.now
            self._policy.keep(prefix)

    def _enter(self, prefix: CachedPrefix | None, group: int, blocks: Sequence[int]) -> None:
        """Add entries to a cached prefix whose pool names it for the blocks already."""
        assert prefix is not None, "every cached block is of a cached prefix"
        if len(prefix.blocks) > 2 * prefix.live + STALE_ENTRIES:
            # The last entry of each block that is still the prefix's; paid for by the stale ones.
            entries = reversed(prefix.blocks)
            true = dict.fromkeys(entry for entry in entries if self._holds(prefix, entry))
            prefix.blocks = deque(reversed(true))
        groups = len(self.pools)
        prefix.blocks.extend([block * groups + group for block in blocks])

    def _leave(self, prefix: CachedPrefix | None, group: int, count: int = 1) -> None:
        """Cached blocks leave their cached prefix."""
        assert prefix is not None, "every cached block is of a cached prefix"
        self._count(prefix, group, -count)
        if prefix.live == 0:
            prefix.blocks.clear()
            self._policy.drop(prefix)

    def _count(self, prefix: CachedPrefix, group: int, blocks: int) -> None:
        """A cached prefix gets so many blocks; a negative number leaves it."""
        prefix.live += blocks
        prefix.bytes += blocks * self._strides[group]
        if group in self._state_groups:
            prefix.state_bytes += blocks * self._strides[group]

    def _free(self, group: int, block: int) -> None:
        """Turn a cached block free."""
        pool = self.pools[group]
        self._leave(pool.prefixes[block], group)
        self._come_free(group, pool.forget(block))

    def _evict(self, group: int, block: int) -> None:
        """Turn a cached block free, whose contents nobody has dropped yet."""
        self.pools[group].evictions += 1
        self._on_evict(group, block)
        self._free(group, block)

    # The search.

    def _some_extent(self, group: int, count: int) -> Extent | None:
        """An extent with a free block, for ``count`` blocks; None if nothing can be had."""
        pool = self.pools[group]
        while not (extent := pool.partial()):
            if self._may_pin(group):
                extent = self._gap(pool, count)
                if not extent and self._unowned:
                    return self._new_extent(group)
                if extent := extent or pool.idle_with(count):
                    self._pins_one(group)
                    return extent
                if self._gather():
                    continue
            if not self._evict_victim():
                return None
        return extent

    def _gap(self, pool: Pool, count: int) -> Extent | None:
        """An idle extent worth pinning, with a gap for ``count`` blocks or else a wide one; None if there is neither.

        Where more extents are pinned than idle none is worth it: what is short there are extents to pin.
        """
        if len(pool.idle) <= pool.pinned:
            return None
        return pool.idle_with(count) or pool.idle_widest(-(-pool.blocks_per_extent // WIDE_GAP))

    def _new_extent(self, group: int) -> Extent | None:
        """A wholly free extent. None if all are reserved for other groups."""
        if not self._may_pin(group):
            return None
        while not self._unowned and not self._gather():
            # A cached prefix seldom frees more than its states: the extents that it shares come free with the others.
            evicted = self._evict_victim()
            assert evicted, "available counts unowned and idle extents"
        self._pins_one(group)
        number = self._unowned.pop()
        old = self._last_owner.get(number)
        self._last_owner[number] = group
        self.pools[group].moves += old not in (None, group)
        self._on_move(number, old, group)
        return self.pools[group].add(number)

    def _gather(self) -> bool:
        """Empty an extent by relocating its cached blocks to gaps of others. Returns False if no gaps hold them."""
        for group in self._relocatable:
            pool = self.pools[group]
            extent = pool.idle_widest(1)
            if extent is None or pool.free - extent.free < extent.cached:
                continue
            blocks = pool.set_apart(extent)
            new: list[int] = []
            while len(new) < len(blocks):
                gap = pool.partial() or pool.idle_with(1)
                assert gap, "free blocks outside of the extent were counted"
                new += pool.take(gap, len(blocks) - len(new), None)
            for block, target in zip(blocks, new, strict=True):
                pool.prefixes[target], pool.shared[target] = pool.prefixes[block], pool.shared[block]
            pool.release(new, repeat(Retention.KEEP))
            for block, target in zip(blocks, new, strict=True):
                self._on_relocate(group, block, target)
                self._enter(pool.prefixes[target], group, (target,))
                pool.forget(block)
            self._come_free(group, extent)
            self.relocations += len(new)
            return True
        return False

    def _pins_one(self, group: int) -> None:
        """A group pins one more extent: one less is reserved for it."""
        if self._reserved[group]:
            self._reserved[group] -= 1
            self._reserved_total -= 1

    def _may_pin(self, group: int) -> bool:
        """Whether there is an extent for this group that isn't reserved for others."""
        return self.available > self._reserved_total - self._reserved[group]

    def _evict_victim(self) -> bool:
        """Take a block from the policy's victim. Returns False if nothing is cached."""
        prefix = self._policy.victim(self.now)
        while prefix is not None:
            entry = prefix.blocks.popleft()
            if self._holds(prefix, entry):
                self._break(prefix)
                self._evict(*self._named(entry))
                return True
        return False

    def _break(self, prefix: CachedPrefix) -> None:
        """A cached prefix is about to lose a block."""
        if prefix.priority == PriorityClass.LOW:
            self.evictions[PriorityClass.LOW] += 1
        elif not prefix.broken:
            self.evictions[None if prefix.running else prefix.priority] += 1
            if not prefix.running:
                self.eviction_ages.append(self.now - prefix.since)
            prefix.broken = True
            self._policy.keep(prefix)

    def _named(self, entry: int) -> tuple[int, int]:
        """(group, block) of an entry of a cached prefix."""
        block, group = divmod(entry, len(self.pools))
        return group, block

    def _holds(self, prefix: CachedPrefix, entry: int) -> bool:
        """Whether an entry of a cached prefix is true."""
        group, block = self._named(entry)
        pool = self.pools[group]
        return pool.prefixes[block] is prefix and not pool.refs[block]

    def _come_free(self, group: int, extent: Extent) -> None:
        """Make an extent unowned once all its blocks are free."""
        if extent.pins == 0 and not extent.cached:
            self.pools[group].remove(extent.number)
            self._unowned.append(extent.number)


def _prefix_pair(turn: TurnClass, *, running: bool) -> tuple[CachedPrefix, CachedPrefix]:
    """A request's own cached prefix, and the one for the shared prefixes that it began with."""
    return CachedPrefix(PRIORITY_OF_TURN[turn], running=running), CachedPrefix(PriorityClass.SHARED, running=running)

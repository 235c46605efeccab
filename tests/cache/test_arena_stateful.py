"""The arena under random use, against the properties that everything else rests on."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from admission import admit
from tidepool.cache import Arena, ExtentLayout, Geometry, OutOfBlocksError, Share


class ArenaMachine(RuleBasedStateMachine):
    """Keeps its own account of every block and compares."""

    partition = "elastic"

    @initialize(
        extents=st.integers(2, 12),
        blocks_per_extent=st.lists(st.sampled_from([1, 2, 3, 4, 6, 12]), min_size=1, max_size=4),
        relocatable=st.sets(st.integers(0, 3)),
    )
    def build(self, extents: int, blocks_per_extent: list[int], relocatable: set[int]) -> None:
        size = 96
        if self.partition == "elastic":
            layouts = tuple(ExtentLayout(size // n - (n % 3), size // n, n) for n in blocks_per_extent)
            self.arena = Arena.elastic(
                Geometry(size, layouts),
                extents,
                on_evict=self.on_evict,
                on_move=self.on_move,
                on_relocate=self.on_relocate,
                relocatable=[group for group in relocatable if group < len(layouts)],
            )
            self.strides = [layout.stride for layout in layouts]
        else:
            shares, end = [], size
            for n in blocks_per_extent:
                stride = size // n
                share = Share(stride, stride, -(-end // stride), n + extents)
                end = (share.first + share.blocks) * stride
                shares.append(share)
            self.arena = Arena.fixed(shares, end, on_evict=self.on_evict)
            self.strides = [share.stride for share in shares]
        self.groups = len(blocks_per_extent)
        self.live: list[dict[int, int]] = [{} for _ in blocks_per_extent]
        self.cached: list[set[int]] = [set() for _ in blocks_per_extent]

    def on_evict(self, group: int, block: int) -> None:
        assert block in self.cached[group], "evicted a block that wasn't cached"
        self.cached[group].remove(block)

    def on_relocate(self, group: int, block: int, new: int) -> None:
        assert new not in self.live[group]
        assert new not in self.cached[group], "relocated to a block that holds something"
        self.cached[group].remove(block)
        self.cached[group].add(new)

    def on_move(self, extent: int, old: int | None, new: int) -> None:
        for group in range(self.groups) if old is None else (old,):
            blocks_per_extent = self.arena.pools[group].blocks_per_extent
            owned = set(range(extent * blocks_per_extent, (extent + 1) * blocks_per_extent))
            assert not owned & (self.live[group].keys() | self.cached[group]), "moved with blocks in it"

    def draw_request(self, data: st.DataObject, group: int) -> dict[str, Any]:
        """Whose blocks: a request with none yet, or one that got some block last."""
        if not self.live[group] or data.draw(st.booleans()):
            return {}
        return {"last": data.draw(st.sampled_from(sorted(self.live[group])))}

    def receive(self, group: int, blocks: list[int]) -> None:
        for block in blocks:
            assert block not in self.live[group]
            assert block not in self.cached[group], "handed out a block whose contents are still cached"
            self.live[group][block] = 1

    @rule(data=st.data())
    def admit_touch_allocate(self, data: st.DataObject) -> None:
        """Admission said yes implies that every group gets its blocks."""
        needs = [data.draw(st.integers(0, 2 * pool.blocks_per_extent + 1)) for pool in self.arena.pools]
        touched = [
            data.draw(st.lists(st.sampled_from(sorted(cached)), unique=True, max_size=4)) if cached else []
            for cached in self.cached
        ]
        if not admit(self.arena, needs, touched):
            return
        for group, blocks in enumerate(touched):
            self.arena.touch(group, blocks)
            for block in blocks:
                self.cached[group].discard(block)
                self.live[group][block] = 1
        for group in data.draw(st.permutations(range(self.groups))):
            self.receive(group, self.arena.allocate(group, needs[group], **self.draw_request(data, group)))
        self.arena.release_reservation()

    @rule(data=st.data())
    def allocate_unasked(self, data: st.DataObject) -> None:
        group = data.draw(st.integers(0, self.groups - 1))
        count = data.draw(st.integers(1, 4))
        try:
            self.receive(group, self.arena.allocate(group, count, **self.draw_request(data, group)))
        except OutOfBlocksError:
            # Nobody starves: a refusal means that nothing reclaimable is left for this group.
            pool = self.arena.pools[group]
            assert pool.usable < count
            assert self.arena.available * pool.blocks_per_extent + pool.usable < count

    @precondition(lambda self: any(self.live))
    @rule(data=st.data())
    def touch_live(self, data: st.DataObject) -> None:
        group = data.draw(st.sampled_from([g for g in range(self.groups) if self.live[g]]))
        block = data.draw(st.sampled_from(sorted(self.live[group])))
        self.arena.touch(group, [block])
        self.live[group][block] += 1

    @precondition(lambda self: any(self.live))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        group = data.draw(st.sampled_from([g for g in range(self.groups) if self.live[g]]))
        blocks = data.draw(st.lists(st.sampled_from(sorted(self.live[group])), unique=True, min_size=1, max_size=8))
        keep = data.draw(st.lists(st.booleans(), min_size=len(blocks), max_size=len(blocks)))
        for block, kept in zip(blocks, keep, strict=True):
            self.live[group][block] -= 1
            if self.live[group][block] == 0:
                del self.live[group][block]
                if kept:
                    self.cached[group].add(block)
        self.arena.release(group, blocks, keep)

    @precondition(lambda self: any(self.cached))
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        group = data.draw(st.sampled_from([g for g in range(self.groups) if self.cached[g]]))
        blocks = data.draw(st.lists(st.sampled_from(sorted(self.cached[group])), unique=True, min_size=1))
        self.cached[group] -= set(blocks)
        self.arena.forget(group, blocks)

    @invariant()
    def accounts_agree(self) -> None:
        for group, pool in enumerate(self.arena.pools):
            assert set(pool.kept()) == self.cached[group]
            assert pool.cached == len(self.cached[group])
            assert set(pool.live()) == self.live[group].keys()
            assert pool.in_use == len(self.live[group])
            assert {b: n for b, n in enumerate(pool.refs) if n} == self.live[group]
            assert 0 not in self.live[group], "the null block was handed out"

    @invariant()
    def no_two_live_or_cached_blocks_overlap(self) -> None:
        spans = sorted(
            (self.arena.address(group, block), self.arena.address(group, block) + self.strides[group])
            for group in range(self.groups)
            for block in (*self.live[group], *self.cached[group])
        )
        for (_, end), (start, _) in pairwise(spans):
            assert end <= start

    @invariant()
    def bytes_add_up(self) -> None:
        u = self.arena.usage()
        assert u.free + u.cached + u.in_use + u.unowned + u.padding + u.null == u.total
        assert min(u.free, u.cached, u.in_use, u.unowned, u.padding, u.null) >= 0

    @invariant()
    def standing_of_extents_is_true(self) -> None:
        for group, pool in enumerate(self.arena.pools):
            held = 1 if self.partition == "fixed" else 0
            for number, extent in pool.extents.items():
                span = range(extent.first, extent.first + extent.blocks)
                live = sum(block in self.live[group] for block in span)
                cached = [block for block in span if block in self.cached[group]]
                assert extent.pins == live + held
                assert extent.cached == len(cached)
                assert extent.free == extent.blocks - live - len(cached)
                assert (number in pool.idle) == (extent.pins == 0)
                assert extent.pins or cached, "a wholly clean extent wasn't given back"
            assert pool.pinned == sum(extent.pins > 0 for extent in pool.extents.values())

    @invariant()
    def extents_have_one_owner(self) -> None:
        if self.partition == "elastic":
            owned = [number for pool in self.arena.pools for number in pool.extents]
            assert len(owned) == len(set(owned))
            assert 0 not in owned


class FixedArenaMachine(ArenaMachine):
    partition = "fixed"


ArenaMachine.TestCase.settings = FixedArenaMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestElastic = ArenaMachine.TestCase
TestFixed = FixedArenaMachine.TestCase

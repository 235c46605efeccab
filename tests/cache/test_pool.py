"""One group's blocks, held to what can be counted from the blocks themselves."""

from __future__ import annotations

import random

import pytest

from tidepool.cache import CachedPrefix, PriorityClass
from tidepool.cache.pool import Extent, Pool


def check(pool: Pool, clean: set[int], held: int | None) -> None:
    """Compare every count with the blocks. ``clean`` are those free; an extent ``held`` for good has a pin more."""
    pinned, idle = set(), set()
    for number, extent in pool.extents.items():
        blocks = range(extent.first, extent.first + extent.blocks)
        in_use = sum(pool.refs[block] > 0 for block in blocks)
        cached = sum(pool.is_cached(block) for block in blocks)
        assert extent.first == pool.first + number * pool.blocks_per_extent
        assert extent.pins == in_use + (number == held)
        assert extent.cached == cached
        assert extent.free == len(clean.intersection(blocks)) == extent.blocks - in_use - cached
        if extent.pins:
            pinned.add(number)
        elif cached:
            idle.add(number)
    assert (pool.pinned, pool.idle) == (len(pinned), idle)
    assert pool.free == len(clean)
    assert pool.usable == sum(pool.extents[number].cached + pool.extents[number].free for number in pinned)
    check_choices(pool, pinned, idle)


def check_choices(pool: Pool, pinned: set[int], idle: set[int]) -> None:
    """Extents with free blocks are found by how many, in classes of powers of two."""

    def size(extent: Extent | None) -> int:
        return extent.free.bit_length() if extent else 0

    partial, idle_free = ([pool.extents[e].free for e in of if pool.extents[e].free] for of in (pinned, idle))
    found = pool.partial()
    assert found is None or found.number in pinned
    assert size(found) == min(partial, default=0).bit_length(), "among the fullest"
    for count in range(1, pool.blocks_per_extent + 1):
        found = pool.idle_with(count)
        # The class in which some hold too few isn't looked at.
        enough = [free for free in idle_free if free.bit_length() > (count - 1).bit_length()]
        assert found is None or (found.number in idle and found.free >= count)
        assert size(found) == min(enough, default=0).bit_length()
        found = pool.idle_widest(count)
        assert found is None or (found.number in idle and found.free >= count)
        if found or max(idle_free, default=0) >= 2 * count:
            assert size(found) == max(idle_free).bit_length()


@pytest.mark.parametrize("seed", range(20))
def test_counts_and_choices_are_those_of_the_blocks(seed: int) -> None:
    rng = random.Random(seed)
    per_extent, first = rng.choice([1, 3, 8, 20]), rng.choice([0, 5])
    pool, prefix = Pool(per_extent, first + 6 * per_extent, first), CachedPrefix(PriorityClass.FIRST, running=False)
    clean: set[int] = set()
    held = None
    if rng.random() < 0.5:
        held = 0
        clean.update(range(first, first + per_extent))
        pool.add(held)
        pool.hold(held)
    for _ in range(250):
        live, cached = list(pool.live()), list(pool.kept())
        assert {block for block, refs in enumerate(pool.refs) if refs} == set(live)
        match rng.choice(["take", "take", "touch", "release", "release", "forget"]):
            case "take":
                number = rng.randrange(6)
                if number not in pool.extents:
                    pool.add(number)
                    clean.update(range(first + number * per_extent, first + (number + 1) * per_extent))
                extent = pool.extents[number]
                count, free = rng.randint(1, per_extent), extent.free
                if not free:
                    continue
                returned = set(extent.returned)
                blocks = pool.take(extent, count, prefix)
                assert len(set(blocks)) == len(blocks) == min(count, free)
                assert clean.issuperset(blocks)
                assert returned.issuperset(blocks) or returned.issubset(blocks), "those used last come first"
                assert {pool.extent_of(block) for block in blocks} == {extent}
                clean.difference_update(blocks)
            case "touch" if live or cached:
                blocks = rng.choices(live + cached, k=rng.randint(1, 5))
                refs = [*pool.refs]
                assert set(pool.touch(blocks)) == set(blocks) & set(cached)
                assert [after - before for before, after in zip(refs, pool.refs, strict=True)] == [
                    blocks.count(block) for block in range(len(refs))
                ]
            case "release" if live:
                blocks = rng.sample(live, k=rng.randint(1, min(5, len(live))))
                blocks += [block for block in blocks if pool.refs[block] > 1]
                keep = [rng.choice([0, 1, 1, 2]) for _ in blocks]
                refs, kept = [*pool.refs], dict(zip(blocks, keep, strict=True))
                turned, empty = pool.release(blocks, keep)
                assert [before - after for before, after in zip(refs, pool.refs, strict=True)] == [
                    blocks.count(block) for block in range(len(refs))
                ]
                idle = {block for block in blocks if not pool.refs[block]}
                assert dict(turned) == {block: kept[block] for block in idle if kept[block]}
                assert len(turned) == len(dict(turned))
                clean.update(block for block in idle if not kept[block])
                assert {extent.number for extent in empty} == {
                    number
                    for number in {pool.extent_of(block).number for block in blocks}
                    if not pool.extents[number].pins and not pool.extents[number].cached
                }
            case "forget" if cached:
                block = rng.choice(cached)
                assert pool.forget(block) is pool.extent_of(block)
                assert not pool.is_cached(block)
                clean.add(block)
        for number in [number for number, extent in pool.extents.items() if not extent.pins and not extent.cached]:
            clean.difference_update(range(first + number * per_extent, first + (number + 1) * per_extent))
            pool.remove(number)
        check(pool, clean, held)


def test_nothing_asked_for_is_nothing_taken() -> None:
    extent = Extent(1, 10, 10)
    extent.returned = [extent.take_free(3)[0]]
    assert extent.take_free(0) == []
    assert extent.take_free(2) == [10, 13]


def test_a_block_is_handed_out_as_new() -> None:
    pool, prefix = Pool(2, 4), CachedPrefix(PriorityClass.FIRST, running=False)
    pool.add(1)
    (block,) = pool.take(pool.extents[1], 1, prefix)
    pool.shared[block] = 1
    pool.release([block], [0])
    assert pool.prefixes[block] is None
    assert pool.take(pool.extents[1], 1, prefix) == [block]
    assert (pool.refs[block], pool.shared[block], pool.prefixes[block]) == (1, 0, prefix)

from __future__ import annotations

import pytest

from admission import admit
from tidepool.cache import (
    Arena,
    ExtentLayout,
    Geometry,
    OutOfBlocksError,
    Retention,
    Share,
    TurnClass,
    choose_geometry,
    group_layers,
)
from tidepool.cache.spec import FullAttention, State

MB = 1 << 20


def arena(blocks_per_extent: list[int], extents: int, **callbacks: object) -> Arena:
    layouts = tuple(ExtentLayout(120 // n, 120 // n, n) for n in blocks_per_extent)
    return Arena.elastic(Geometry(120, layouts), extents, **callbacks)  # type: ignore[arg-type]


def test_evicting_block_5_of_one_group_leaves_block_5_of_every_other_alone() -> None:
    evicted: list[tuple[int, int]] = []
    a = arena([4, 4, 4], 10, on_evict=lambda g, block: evicted.append((g, block)))
    blocks = [a.allocate(group, 4) for group in range(3)]  # one extent each
    for group in range(3):
        a.release(group, blocks[group], keep=[Retention.KEEP] * 4)
    everything = {(g, b) for g in range(3) for b in blocks[g]}
    # The same ids exist in several groups only if they share an extent number, which they can't; so name them by group.
    assert len({b for _, b in everything}) == 12
    five = next(g for g, b in everything if b == 5)
    a.forget(five, [5])
    assert not a.pools[five].is_cached(5)
    for group in range(3):
        assert sorted(a.pools[group].kept()) == [b for b in blocks[group] if (group, b) != (five, 5)]


def test_same_id_in_two_fixed_shares_is_two_blocks() -> None:
    a = Arena.fixed([Share(10, 10, 3, 8), Share(20, 20, 6, 5)], 220)
    ids = [a.allocate(0, 8), a.allocate(1, 5)]
    assert set(ids[0]) & set(ids[1]), "the shares are meant to have ids in common"
    for group in (0, 1):
        a.release(group, ids[group], keep=[Retention.KEEP] * len(ids[group]))
    shared = (set(ids[0]) & set(ids[1])).pop()
    a.forget(0, [shared])
    assert not a.pools[0].is_cached(shared)
    assert a.pools[1].is_cached(shared)


def test_no_side_starves_beside_the_others_idle_cache() -> None:
    """SGLang issue 34441: 21 MB left in the gap, 54 MB needed, and the other side holds idle cache.

    Two regions that grow toward each other can't use what the other has cached; extents change hands.
    """
    groups = group_layers({"attention": FullAttention(bytes_per_token=32 * 1024), "state": State(54 * MB)}, 16)
    geometry = choose_geometry(groups)
    attention, state = 0, 1
    moves: list[tuple[int | None, int]] = []
    a = Arena.elastic(geometry, 11, on_move=lambda _, old, new: moves.append((old, new)))
    per_extent = geometry.layouts[attention].blocks_per_extent
    cache = a.allocate(attention, 10 * per_extent - 40)
    a.release(attention, cache, keep=[Retention.KEEP] * len(cache))
    left = a.usage().unowned + a.usage().free
    assert left <= 21 * MB
    assert admit(a, [0, 3])
    assert len(a.allocate(state, 3)) == 3
    assert [move for move in moves if move[0] not in (None, move[1])] == [(attention, state)] * 3
    # And back: the state's idle memory serves attention.
    moves.clear()
    held = list(a.pools[state].live())
    a.release(state, held, keep=[Retention.KEEP] * 3)
    assert admit(a, [10 * per_extent, 0])
    a.allocate(attention, 10 * per_extent)
    assert [move for move in moves if move[0] not in (None, move[1])] == [(state, attention)] * 3


def test_one_groups_allocation_leaves_what_was_promised_to_another() -> None:
    a = arena([4, 1], 3)
    blocks = a.allocate(0, 4)
    a.release(0, blocks[1:], keep=[Retention.KEEP] * 3)
    assert admit(a, [3, 1])
    # The one unowned extent is promised to group 1, so group 0 evicts its own three cached blocks.
    assert sorted(a.allocate(0, 3)) == sorted(blocks[1:])
    assert len(a.allocate(1, 1)) == 1


def test_a_gap_of_an_idle_extent_spends_what_was_reserved() -> None:
    a = arena([4, 1], 3)
    a.release(0, a.allocate(0, 4), keep=[Retention.KEEP] * 2 + [Retention.DROP] * 2)
    assert admit(a, [2, 1])
    a.allocate(0, 2)
    assert len(a.allocate(1, 1)) == 1, "one extent was reserved for each"


def test_once_a_reservation_ends_others_may_have_it() -> None:
    a = arena([4, 1], 3)
    assert admit(a, [0, 2])
    with pytest.raises(OutOfBlocksError):
        a.allocate(0, 1)
    a.release_reservation()
    assert len(a.allocate(0, 8)) == 8


def test_without_a_promise_cached_blocks_are_kept_while_there_is_unowned_memory() -> None:
    a = arena([4, 1], 3)
    blocks = a.allocate(0, 4)
    a.release(0, blocks[1:], keep=[Retention.KEEP] * 3)
    assert admit(a, [3, 0])
    assert not set(a.allocate(0, 3)) & set(blocks)
    assert a.pools[0].cached == 3


def test_touching_many_blocks_of_one_idle_extent_counts_it_once() -> None:
    a = arena([4, 1], 4)
    blocks = a.allocate(0, 4)
    a.release(0, blocks, keep=[Retention.KEEP] * 4)
    assert a.available == 3
    assert a.extents_needed([0, 2], [blocks, []]) == ([0, 2], 1)
    assert admit(a, [0, 2], [blocks, []])
    assert not admit(a, [0, 3], [blocks, []])
    assert admit(a, [2, 2], [blocks[:2], []]), "the touched extent's other blocks are usable"
    assert not admit(a, [3, 2], [blocks[:2], []])


def test_the_idle_extent_unused_for_longest_goes_whoever_has_it() -> None:
    order: list[tuple[int, int]] = []
    a = arena([2, 2], 3, on_evict=lambda g, block: order.append((g, block)))
    old, new = a.allocate(0, 2), a.allocate(1, 2)
    a.release(0, old, keep=[Retention.KEEP] * 2)
    a.release(1, new, keep=[Retention.KEEP] * 2)
    a.allocate(1, 1)
    assert order == [(0, block) for block in old], "group 0's extent was used longer ago than group 1's own"
    a.allocate(1, 1)
    assert len(order) == 2, "the rest of that extent is clean"
    a.allocate(0, 1)
    assert order[2:] == [(1, block) for block in new]


def test_long_prompts_come_free_whole_beside_decoding() -> None:
    """Blocks of a long prompt share no extent with single blocks, so finishing it frees whole extents."""
    a = arena([10], 20)
    decoding = [a.allocate(0, 1) for _ in range(5)]
    prompt = a.allocate(0, 40)
    decoding += [a.allocate(0, 1) for _ in range(5)]
    assert a.available == 14
    a.release(0, prompt, keep=[Retention.KEEP] * 40)
    assert a.available == 18, "all but the one extent that decoding uses"
    assert len(decoding) == 10


def test_a_request_goes_on_in_the_extent_of_its_last_block() -> None:
    a = arena([10], 20)
    first, second = a.allocate(0, 3), a.allocate(0, 3)
    assert {block // 10 for block in first + second} == {first[0] // 10}, "short requests share"
    long = a.allocate(0, 12)
    fuller, rest = first[0] // 10, a.allocate(0, 10)[-1] // 10
    a.release(0, long[-3:])
    a.release(0, list(a.pools[0].live())[-8:])
    assert a.pools[0].extents[fuller].free < a.pools[0].extents[rest].free, "where others would go on"
    last = rest * 10
    assert {block // 10 for block in a.allocate(0, 6, last=last)} == {rest}
    assert {block // 10 for block in a.allocate(0, 3, last=last)} > {rest}, "it has two left"


@pytest.mark.parametrize(
    ("per_extent", "pinned", "gaps", "count", "filled"),
    [
        (4, 0, [1], 1, [1]),
        (4, 1, [1], 1, []),  # As many extents are pinned as idle: what is short there are extents to pin.
        (4, 1, [1, 1], 1, [1]),
        (4, 2, [1, 1], 1, []),
        (8, 0, [7, 3, 1], 1, [1]),  # Of those that hold all that is asked for, one that little else fits in.
        (16, 0, [15, 4, 3], 4, [4]),
        (16, 0, [15, 4, 3], 3, [4]),  # One that may hold 2 only isn't looked at.
        (8, 0, [1, 2, 4], 6, [4, 2]),  # Where none does, the widest first, and none under a quarter of an extent.
        (8, 0, [1, 1], 2, []),
        (9, 0, [2], 3, []),
        (9, 0, [3], 4, [3]),
        (2, 0, [1], 2, []),  # They fill an extent.
    ],
)
def test_which_gaps_of_idle_extents_are_filled_before_a_new_extent_is_taken(
    per_extent: int, pinned: int, gaps: list[int], count: int, filled: list[int]
) -> None:
    a = Arena.elastic(Geometry(per_extent, (ExtentLayout(1, 1, per_extent),)), 12)
    whole = [a.allocate(0, per_extent) for _ in range(pinned + len(gaps))]
    for gap, blocks in zip(gaps, whole[pinned:], strict=True):
        a.release(0, blocks, keep=[Retention.DROP] * gap + [Retention.KEEP] * (per_extent - gap))
    free = {blocks[0] // per_extent: gap for gap, blocks in zip(gaps, whole[pinned:], strict=True)}
    got = dict.fromkeys(block // per_extent for block in a.allocate(0, count))
    assert [free[extent] for extent in got if extent in free] == filled
    assert a.pools[0].cached == sum(per_extent - gap for gap in gaps), "nothing is evicted while extents are unowned"


def test_cached_memory_goes_by_leaves_wherever_it_lies() -> None:
    """The older prefix gives a gap between blocks in use; the younger one, though it has a whole idle extent, stays."""
    a = arena([4, 1], 3)
    mixed = a.allocate(0, 3)
    idle = a.allocate(0, 4)
    a.release(0, mixed[:2], keep=[Retention.KEEP] * 2)
    a.release(0, idle, keep=[Retention.KEEP] * 4)
    a.allocate(0, 1)  # the clean block
    assert a.allocate(0, 1) == mixed[:1]
    assert a.pools[0].cached == 5


def test_extents_fill_up_so_that_others_come_free_whole() -> None:
    a = arena([4], 5)
    first, second = a.allocate(0, 4), a.allocate(0, 4)
    a.release(0, first[:3], keep=())
    a.release(0, second[:1], keep=())
    assert a.allocate(0, 1) == second[:1], "the fuller extent is filled first"
    a.release(0, first[3:], keep=())
    assert a.available == 3, "the other one came free whole"


def test_as_many_blocks_as_fill_an_extent_lie_in_one_though_more_is_evicted_for_it() -> None:
    a = arena([4], 3)
    mixed, idle = a.allocate(0, 4), a.allocate(0, 4)
    a.release(0, mixed[:2], keep=[Retention.KEEP] * 2)
    a.release(0, idle, keep=[Retention.KEEP] * 4)
    assert sorted(a.allocate(0, 4)) == sorted(idle)
    assert a.pools[0].cached == 0


def test_whoever_keeps_nothing_need_not_be_known() -> None:
    a = arena([4], 3)
    a.release(0, a.allocate(0, 2), request="never started")
    assert a.unowned == 2


def test_refusal_leaves_nothing_allocated() -> None:
    a = arena([2, 1], 3)
    with pytest.raises(OutOfBlocksError, match="can't get 5 blocks"):
        a.allocate(0, 5)
    assert a.usage().in_use == 0
    assert a.available == 2


def test_fixed_partition_never_lends() -> None:
    a = Arena.fixed([Share(10, 10, 3, 4), Share(30, 30, 3, 2)], 150)
    assert not admit(a, [5, 0])
    assert admit(a, [4, 2])
    blocks = a.allocate(0, 4)
    with pytest.raises(OutOfBlocksError):
        a.allocate(0, 1)
    a.release(0, blocks, keep=[Retention.KEEP] * 4)
    assert a.allocate(0, 1) == blocks[:1], "the coldest cached block is reused"


def test_a_spare_that_is_hit_again_and_again_leaves_no_trail() -> None:
    a = arena([4, 1], 5)
    blocks = a.allocate(0, 2)
    a.release(0, blocks, keep=[Retention.LOW] * 2)
    prefix = a.pools[0].prefixes[blocks[0]]
    assert prefix is not None
    for _ in range(1_000):
        a.touch(0, blocks[:1])
        a.release(0, blocks[:1], keep=[Retention.LOW])
    assert prefix.live == 2
    assert len(prefix.blocks) < 100


def test_entries_of_blocks_that_went_elsewhere_are_swept_out() -> None:
    a = Arena.elastic(Geometry(200, (ExtentLayout(1, 1, 200),)), 2)
    blocks = a.allocate(0, 200)
    a.release(0, blocks, keep=[Retention.LOW] * 200)
    prefix = a.pools[0].prefixes[blocks[0]]
    assert prefix is not None
    a.touch(0, blocks[1:])
    a.release(0, blocks[1:2], keep=[Retention.LOW])
    assert prefix.live == 2
    assert len(prefix.blocks) <= 3


def test_a_shared_block_is_left_by_its_finder_whoever_releases_it() -> None:
    a = arena([4, 1], 4)
    for name in ("first", "second"):
        a.start(name, TurnClass.FIRST)
    (state,) = a.allocate(1, 1, request="first")
    a.release(1, [state], keep=[Retention.KEEP], request="first")
    a.touch(1, [state], shared=True, request="second")
    a.finish("first")
    a.release(1, [state], keep=[Retention.KEEP])
    assert list(a.left_by("second")) == [(1, state)]


def test_states_go_before_attention_and_a_broken_leaf_before_all_others() -> None:
    order: list[tuple[int, int]] = []
    a = arena([4, 1], 4, on_evict=lambda g, block: order.append((g, block)))
    left = {}
    for name in ("first", "second"):
        a.start(name, TurnClass.FIRST)
        state = a.allocate(1, 1, request=name)
        attention = a.allocate(0, 4, request=name)
        a.release(1, state, keep=[Retention.KEEP], request=name)
        a.release(0, attention, keep=[Retention.KEEP] * 4, request=name)
        a.finish(name)
        left[name] = [(1, state[0]), *((0, block) for block in attention)]
    assert order == left["first"][:1], "the second one's attention took the place of the first one's state"
    a.allocate(1, 1)
    assert order == left["first"], "the rest of a broken prefix"
    a.allocate(1, 1)
    assert order == [*left["first"], left["second"][0]]


def test_gaps_of_idle_extents_are_filled_before_anything_is_evicted() -> None:
    evicted: list[int] = []
    a = arena([4, 1], 3, on_evict=lambda _, block: evicted.append(block))
    blocks = a.allocate(0, 2)
    a.release(0, blocks, keep=[Retention.KEEP] * 2)
    a.allocate(1, 1)
    assert a.available == 1
    assert admit(a, [2, 0])
    assert {block // 4 for block in a.allocate(0, 2)} == {blocks[0] // 4}
    assert a.available == 0
    assert not evicted


def test_gaps_are_filled_before_an_unowned_extent_is_taken() -> None:
    a = arena([4, 1], 4)
    blocks = a.allocate(0, 3)
    a.release(0, blocks, keep=[Retention.KEEP] * 3)
    unowned = a.usage().unowned
    assert [block // 4 for block in a.allocate(0, 1)] == [blocks[0] // 4]
    assert a.usage().unowned == unowned


def test_gaps_too_small_for_all_are_filled_before_anything_is_evicted() -> None:
    evicted: list[int] = []
    a = arena([4, 1], 3, on_evict=lambda _, block: evicted.append(block))
    first, second = a.allocate(0, 4), a.allocate(0, 4)
    for blocks in (first, second):
        a.release(0, blocks, keep=[Retention.KEEP] * 2 + [Retention.DROP] * 2)
    assert sorted(a.allocate(0, 4)) == sorted(first[2:] + second[2:])
    assert not evicted

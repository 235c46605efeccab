"""Packed states in the core: their sizes, how memory is divided beside them, and that they are gathered."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from tidepool.cache import (
    Arena,
    CacheConfigError,
    ExtentLayout,
    FullAttention,
    Geometry,
    Group,
    PackedState,
    Retention,
    State,
    StateFormat,
    TurnClass,
    block_align,
    choose_geometry,
    packed_groups,
    packed_page_bytes,
)


@pytest.mark.parametrize(
    ("state_format", "number_bytes", "packed"),
    [
        # 49,152 bytes of a convolution; 32 heads of 128 rows of 128 numbers.
        ("int8", 4, 49_152 + 4_096 * (128 + 4)),
        ("bfloat16", 4, 49_152 + 4_096 * 128 * 2),
        ("int8", 2, 49_152 + 4_096 * (128 + 4)),
        ("bfloat16", 2, 0),
        ("same", 4, 0),
    ],
)
def test_bytes_of_a_packed_page(state_format: StateFormat, number_bytes: int, packed: int) -> None:
    found = packed_page_bytes(state_format, rest=49_152, rows=4_096, numbers=128, number_bytes=number_bytes)
    assert found == packed


def test_short_rows_and_odd_rests() -> None:
    """Where scales take more than codes save, nothing is packed; a page is a multiple of 16 bytes."""
    assert packed_page_bytes("int8", rest=6, rows=8, numbers=4, number_bytes=2) == 0
    assert packed_page_bytes("int8", rest=4_096, rows=8, numbers=16, number_bytes=4) == 0, "hardly smaller"
    assert packed_page_bytes("int8", rest=6, rows=8, numbers=16, number_bytes=4) == 176
    assert packed_page_bytes("int8", rest=6, rows=9, numbers=15, number_bytes=4) == 0, "scales would lie askew"
    assert packed_page_bytes("int8", rest=4_096, rows=0, numbers=0, number_bytes=4) == 0


def test_a_packed_state_is_smaller() -> None:
    with pytest.raises(CacheConfigError, match="isn't smaller"):
        State(1_000, packed_bytes=1_000)


def groups_of(state: int, packed: int, token: int, layers: tuple[int, int] = (3, 1)) -> list[Group]:
    states = Group(State(state, 2, packed), tuple(f"s{n}" for n in range(layers[0])), 128, block_align(state))
    attention = Group(FullAttention(token), tuple(f"a{n}" for n in range(layers[1])), 16, block_align(16 * token))
    return [states, attention, *packed_groups([states, attention])]


def test_a_group_for_each_group_of_states_that_are_packed() -> None:
    *_, packed = groups_of(10_000, 2_560, 64)
    assert packed.cache == PackedState(2_560)
    assert packed.layers == ("s0", "s1", "s2")
    assert packed.block_bytes == 7_680
    assert packed.constant
    assert packed.blocks_for(100_000) == 0, "no running request holds one"
    assert packed_groups([Group(State(10_000), ("s",), 128)]) == ()


QWEN = (24 * 2_146_304, 24 * 589_824, 8 * 4_096)
"""Qwen3.5-4B's: state, packed as int8, token."""


def test_extents_stay_small_beside_packed_states() -> None:
    """They are padded by more than others for that."""
    geometry = choose_geometry(groups_of(*QWEN, layers=(1, 1)))
    states, attention, packed = geometry.layouts
    assert states.blocks_per_extent == 1
    assert packed.blocks_per_extent == 3
    assert max(states.padding, attention.padding) < 0.01
    assert packed.padding < 0.2


def test_extents_hold_several_states_where_else_nothing_would_be_gained() -> None:
    """Two states of bfloat16, packed as int8, take more than one."""
    geometry = choose_geometry(groups_of(1_000_000, 535_000, 4_096, layers=(1, 1)))
    states, _, packed = geometry.layouts
    assert (states.blocks_per_extent, packed.blocks_per_extent) == (2, 3)


@given(
    state=st.integers(1_000, 40_000).map(lambda n: n * 64),
    share=st.floats(0.2, 0.85),
    token=st.integers(2, 64).map(lambda n: n * 64),
)
def test_every_geometry_beside_packed_states_tiles(state: int, share: float, token: int) -> None:
    packed = int(state * share) // 16 * 16
    geometry = choose_geometry(groups_of(state, packed, token))
    states, attention, packed_layout = geometry.layouts
    assert geometry.extent_bytes <= 17 * 3 * state
    assert max(states.padding, attention.padding) < 0.08
    assert packed_layout.padding < 0.5
    # What it is for.
    assert packed_layout.blocks_per_extent > states.blocks_per_extent


class Contents:
    """What an arena's blocks hold, kept as its owner keeps it."""

    def __init__(self, extents: int) -> None:
        layouts = (ExtentLayout(12, 12, 1), ExtentLayout(1, 1, 12), ExtentLayout(3, 3, 4))
        self.arena = Arena.elastic(
            Geometry(12, layouts),
            extents,
            on_evict=self.evict,
            on_relocate=self.relocate,
            relocatable=(2,),
        )
        self.of: dict[tuple[int, int], str] = {}

    def evict(self, group: int, block: int) -> None:
        del self.of[group, block]

    def relocate(self, group: int, block: int, new: int) -> None:
        assert (group, new) not in self.of
        self.of[group, new] = self.of.pop((group, block))

    def keep(self, group: int, name: str, *, request: str | None = None) -> int:
        """Cache something."""
        (block,) = self.arena.allocate(group, 1, request=request)
        self.of[group, block] = name
        self.arena.release(group, [block], [Retention.KEEP], request=request)
        return block

    def drop(self, group: int, block: int) -> None:
        del self.of[group, block]
        self.arena.forget(group, [block])


def test_gaps_are_gathered_before_anything_is_evicted() -> None:
    """Two extents of packed states, half of each gone: a third one's worth of attention finds room."""
    memory = Contents(extents=4)
    blocks = [memory.keep(2, f"state {n}") for n in range(8)]
    (first,) = memory.arena.allocate(0, 1)
    for n in (0, 2, 5, 7):
        memory.drop(2, blocks[n])
    assert memory.arena.unowned == 0
    got = memory.arena.allocate(1, 12)
    assert len(got) == 12
    assert sorted(memory.of.values()) == ["state 1", "state 3", "state 4", "state 6"], "nothing was evicted"
    assert memory.arena.relocations == 2
    assert len({block // 4 for _, block in memory.of}) == 1
    memory.arena.release(0, [first])


def test_what_was_relocated_goes_with_its_prefix() -> None:
    """It leaves as early as it would have where it was, and its request can name it."""
    memory = Contents(extents=4)
    arena = memory.arena
    arena.start("old", TurnClass.FIRST)
    old = memory.keep(2, "old", request="old")
    fill = [memory.keep(2, f"fill {n}") for n in range(7)]
    for n in (0, 1, 4, 5):
        memory.drop(2, fill[n])
    arena.allocate(0, 1)
    arena.allocate(1, 12)
    assert arena.relocations
    assert [memory.of[place] for place in arena.left_by("old")] == ["old"]
    assert ((2, old) in memory.of) != (next(arena.left_by("old")) != (2, old))
    arena.finish("old")
    arena.release(1, list(arena.pools[1].live()))
    while "old" in memory.of.values():
        arena.allocate(2, 1)


def test_blocks_of_other_groups_stay_where_they_are() -> None:
    memory = Contents(extents=4)
    blocks = [memory.keep(1, f"attention {n}") for n in range(24)]
    for block in blocks[::2]:
        memory.drop(1, block)
    arena = memory.arena
    arena.allocate(0, 1)
    arena.allocate(0, 1)
    assert arena.relocations == 0
    assert len(memory.of) < 12, "attention was evicted"


def test_a_block_for_a_copy_is_filed_as_its_source() -> None:
    memory = Contents(extents=5)
    arena = memory.arena
    arena.start("request", TurnClass.SECOND)
    (state,) = arena.allocate(0, 1, request="request")
    packed = arena.allocate_for_copy(2, 0, state)
    assert packed is not None
    memory.of[2, packed] = "packed"
    arena.release(0, [state])
    arena.release(2, [packed], [Retention.KEEP])
    assert list(arena.left_by("request")) == [(2, packed)]


def test_no_block_for_a_copy_where_all_is_in_use() -> None:
    arena = Contents(extents=3).arena
    states = [arena.allocate(0, 1)[0] for _ in range(2)]
    assert arena.allocate_for_copy(2, 0, states[0]) is None
    assert arena.pools[0].in_use == 2

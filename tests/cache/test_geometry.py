from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from time import process_time

import pytest
from hypothesis import example, given, reject, settings, strategies as st

from tidepool.cache import (
    CacheConfigError,
    ExtentLayout,
    FullAttention,
    Geometry,
    Group,
    State,
    choose_geometry,
    choose_stage_geometries,
    fixed_shares,
    fixed_stage_shares,
    geometry_by_counts,
)
from tidepool.cache.geometry import MAX_PADDING, MAX_PADDING_MANY, MAX_PADDING_TWO, PATIENCE_MANY

ODD = 2 * (4 * (128 * 3 // 8 + 4))  # packed 3-bit codes and an fp32 norm per head and token


def attention(bytes_per_token: int, layers: int = 1, tokens: int = 16, align: int = 16) -> Group:
    names = tuple(f"attention.{bytes_per_token}.{i}" for i in range(layers))
    return Group(FullAttention(bytes_per_token), names, tokens, align)


def state(size: int, layers: int = 1, align: int = 16) -> Group:
    return Group(State(size), tuple(f"state.{size}.{i}" for i in range(layers)), 512, align)


def check(groups: list[Group], limit: float) -> None:
    geometry = choose_geometry(groups)
    for group, layout in zip(groups, geometry.layouts, strict=True):
        assert layout.blocks_per_extent * layout.stride == geometry.extent_bytes
        assert layout.stride >= group.block_bytes == layout.block_bytes
        assert layout.stride % group.align == 0
        assert layout.padding < limit


@pytest.mark.parametrize(
    ("groups", "blocks_per_extent", "padding"),
    [
        # Published shapes: Qwen3.5-4B, Qwen3.5-0.8B (fp32 states), Nemotron-3-Nano-4B (bf16 states).
        ([attention(4096, 8), state(2_146_304, 24)], (99, 1), 0.0076),
        ([attention(2048, 6), state(1_085_440, 18)], (100, 1), 0.0063),
        ([attention(4096, 4), state(2_024_448, 21)], (163, 1), 0.0051),
    ],
)
def test_published_models(groups: list[Group], blocks_per_extent: tuple[int, ...], padding: float) -> None:
    geometry = choose_geometry(groups)
    assert tuple(layout.blocks_per_extent for layout in geometry.layouts) == blocks_per_extent
    assert geometry.padding == pytest.approx(padding, abs=1e-4)
    assert geometry.layouts[0].padding == 0, "the group with the most blocks isn't padded"


@settings(max_examples=150)
@given(
    st.integers(1_000, 45_000_000),
    st.integers(1, 4096),
    st.integers(1, 48),
    st.sampled_from([16, 32]),
    st.sampled_from([1, 4, 16, 64]),
)
def test_two_groups_stay_under_one_percent(size: int, per_token: int, layers: int, tokens: int, align: int) -> None:
    size = -(-size // 256) * 256
    per_token = -(-per_token // 4) * 4
    check([attention(per_token, layers, tokens, align), state(size, align=align)], MAX_PADDING_TWO)


@st.composite
def many_groups(draw: st.DrawFn, most: int = 30) -> list[Group]:
    """A 40 MB state beside pages down to a 9 KB drafter page, packed caches of odd sizes among them."""
    heads = st.sampled_from([1, 2, 4, 8])
    packed = st.builds(
        lambda heads, dim, bits, layers: attention(2 * heads * (dim * bits // 8 + 4), layers),
        heads,
        st.sampled_from([64, 80, 128, 256]),
        st.sampled_from([2, 3, 4, 8]),
        st.integers(1, 12),
    )
    plain = st.builds(lambda heads, dim, layers: attention(4 * heads * dim, layers), heads, st.just(128), st.just(2))
    groups = [state(draw(st.integers(9_000_000, 11_000_000)) * 4), attention(576), attention(ODD)]
    return groups + draw(st.lists(packed | plain, max_size=most - 3))


@settings(max_examples=200)
@given(st.integers(1, 400), st.integers(400, 2000), st.sampled_from([1, 4, 16]))
@example(20, 99, 1)
@example(300, 1_206, 1)
@example(127, 1_271, 1)
def test_of_two_sizes_the_smaller_fills_the_smallest_extent_that_it_can(small: int, large: int, align: int) -> None:
    small, large = small * align, large * align

    def counts(extent: int) -> list[int]:
        """How many of the large blocks an extent may hold, padded by less than one percent."""
        fewest = 99 * extent // (100 * large) + 1
        return [n for n in range(fewest, min(extent // large, 128) + 1) if extent % (n * align) == 0]

    extents = range(small, math.ceil(128 * large / (1 - MAX_PADDING_TWO)), small)
    exact = next(((extent, counts(extent)[-1]) for extent in extents if counts(extent)), None)
    geometry = choose_geometry([state(large, align=align), state(small, align=align)])
    if small == large:
        assert geometry.extent_bytes == small
    elif exact is not None:
        assert (geometry.extent_bytes, geometry.layouts[0].blocks_per_extent) == exact
        assert geometry.layouts[1].padding == 0


def test_a_size_that_is_not_aligned_is_padded_and_the_extent_stays_small() -> None:
    geometry = choose_geometry([state(1_000, align=16), state(10_080, align=16)])
    assert geometry.extent_bytes == 10_080
    assert geometry.layouts[0].stride == 1_008


@settings(max_examples=30)
@given(many_groups())
def test_up_to_thirty_groups(groups: list[Group]) -> None:
    """Under 2% in an extent of at most 4 states, or else in the one that costs least, and no search takes long."""
    began = process_time()
    geometry = choose_geometry(groups)
    assert process_time() - began < 1
    check(groups, MAX_PADDING)
    states = geometry.extent_bytes / groups[0].block_bytes
    if geometry.padding >= MAX_PADDING_MANY:
        assert states * geometry.padding < MAX_PADDING / (1 - MAX_PADDING), "as good as one state in an extent"
    else:
        assert states < (PATIENCE_MANY + 1)


@settings(max_examples=60)
@given(many_groups(most=6))
def test_up_to_six_groups_stay_under_two_percent(groups: list[Group]) -> None:
    check(groups, MAX_PADDING_MANY)


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(60, 600), st.sampled_from([1, 2, 4])), min_size=3, max_size=5))
@example([(72, 1), (409, 1), (599, 1)])
@example([(600, 1), (594, 1), (591, 1)])
@example([(273, 1), (447, 1), (1202, 1)])
def test_no_better_extent_is_overlooked(sizes: list[tuple[int, int]]) -> None:
    groups = [state(size, align=align) for size, align in sizes]
    largest = max(-(-size // align) * align for size, align in sizes)

    def narrowest(extent: int, size: int, align: int) -> int:
        strides = range(-(-size // align) * align, int(size / (1 - MAX_PADDING)) + 1, align)
        return next((stride for stride in strides if extent % stride == 0), 10 * size)

    def padding(extent: int) -> float:
        return max(1 - size / narrowest(extent, size, align) for size, align in sizes)

    least: dict[int, tuple[float, int]] = {}
    for extent in range(largest, math.ceil(4 * largest / (1 - MAX_PADDING)) + 1):
        # Of equally padded extents for as many of the largest blocks any may be chosen.
        found = padding(extent), -extent
        count = extent // narrowest(extent, *max(sizes))
        least[count] = min(found, least.get(count, found))
    best = min(share for share, _ in least.values())
    geometry = choose_geometry(groups) if best < MAX_PADDING else None
    if best < MAX_PADDING_MANY:
        assert geometry is not None
        assert geometry.padding < MAX_PADDING_MANY
        if len(set(sizes)) > 2:
            fewest = min(count for count, (share, _) in least.items() if share < MAX_PADDING_MANY)
            assert geometry.layouts[sizes.index(max(sizes))].blocks_per_extent == fewest
    if geometry is not None and geometry.padding >= MAX_PADDING_MANY:
        costs = [share * -extent for share, extent in least.values() if share < MAX_PADDING]
        assert geometry.padding * geometry.extent_bytes <= min(costs) * (1 + 1e-9)


def test_twenty_two_odd_kinds_beside_large_states() -> None:
    """`bench/many_groups.py`: under 2% would take an extent of more than 4 states, 590 MB."""
    groups = [state(147_619_840, align=64), *(attention(516 + 12 * kind, align=64) for kind in range(22))]
    geometry = choose_geometry(groups)
    assert geometry.extent_bytes == 149_022_720
    assert geometry.padding == pytest.approx(0.0317, abs=1e-4)


def test_what_cannot_be_met_is_said() -> None:
    primes = [1_000_003, 999_983, 999_979, 999_961]
    with pytest.raises(CacheConfigError, match=r"4 block sizes from 999,961 to 1,000,003 bytes.*allow more padding"):
        choose_geometry([state(p, align=1 << 18) for p in primes], max_padding=0.001)
    with pytest.raises(CacheConfigError, match="at least one group"):
        choose_geometry([])


def test_equal_groups_cut_alike() -> None:
    geometry = choose_geometry([state(4096), state(4096), attention(256)])
    assert geometry.layouts[0] == geometry.layouts[1]


class TestFixedShares:
    def test_states_get_max_requests_blocks_and_attention_the_rest(self) -> None:
        groups = [attention(2048, 6), state(1_085_440, 18)]
        total = 1_094_912 * 12_288 + 256 * 18 * 1_085_440
        attn, states = fixed_shares(groups, total, 256, 32_768)
        assert states.blocks == 256
        assert states.first == 1, "the null block takes the first"
        assert attn.first * attn.stride >= (states.first + states.blocks) * states.stride
        assert (attn.first + attn.blocks) * attn.stride <= total

    def test_impossible_budgets_say_what_to_do(self) -> None:
        with pytest.raises(CacheConfigError, match=r"lower max_num_seqs, or use the elastic partition"):
            fixed_shares([attention(64), state(4096)], 4096 * 9, 8, 100)
        with pytest.raises(CacheConfigError, match=r"nothing is left for attention|more than the"):
            fixed_shares([attention(64), state(4096)], 4096, 8, 100)

    def test_states_alone_that_do_not_fit_are_refused(self) -> None:
        with pytest.raises(CacheConfigError, match=r"needs 36,864 bytes for the states of 8 requests, more than the"):
            fixed_shares([state(4096)], 4096 * 9 - 1, 8, 100)
        assert fixed_shares([state(4096)], 4096 * 9, 8, 100)[0].blocks == 8

    @given(st.integers(0, 30), st.integers(1, 300), st.integers(1, 300), st.integers(10_000, 1_000_000))
    def test_the_rest_is_split_by_what_a_request_holds(self, requests: int, one: int, two: int, total: int) -> None:
        groups = [attention(one, align=1), state(500, align=1), attention(two, tokens=64, align=1)]
        tokens = 1_000
        try:
            shares = fixed_shares(groups, total, requests, tokens)
        except CacheConfigError:
            reject()
        first, states, second = shares
        assert (states.first, states.blocks) == (-(-max(16 * one, 500, 64 * two) // 500), requests)
        rest = total - (states.first + requests) * 500
        wants = [63 * first.stride, 16 * second.stride]
        for share, want in ((first, wants[0]), (second, wants[1])):
            part = rest * want / sum(wants)
            assert part - 2 * share.stride < share.blocks * share.stride <= part + share.stride

    @given(st.integers(1, 64), st.integers(1, 40), st.integers(20_000, 10_000_000))
    def test_shares_never_overlap(self, requests: int, layers: int, total: int) -> None:
        groups = [attention(ODD, layers), state(4096, 3), state(1040), attention(64)]
        try:
            shares = fixed_shares(groups, total, requests, 4096)
        except CacheConfigError:
            return
        spans = sorted((s.first * s.stride, (s.first + s.blocks) * s.stride) for s in shares)
        assert spans[0][0] >= max(s.stride for s in shares), "block 0 is everyone's null block"
        assert spans[-1][1] <= total
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))


def stages_of(sizes: tuple[int, int], counts: list[tuple[int, int]], align: int) -> list[list[Group]]:
    """Stages with ``counts`` layers of an attention and a state group; ``sizes`` are bytes of a token and a state."""
    per_token, state_bytes = sizes
    return [
        [
            Group(FullAttention(per_token), tuple(f"a{i}" for i in range(attn)), 16, align),
            Group(State(state_bytes, 2), tuple(f"s{i}" for i in range(states)), 16, align),
        ]
        for attn, states in counts
    ]


STAGE_SIZES = st.tuples(st.integers(64, 4096), st.integers(10_000, 3_000_000))
STAGE_LAYERS = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 24)), min_size=1, max_size=4).filter(
    lambda counts: any(attn for attn, _ in counts) and any(states for _, states in counts)
)


@settings(max_examples=100)
@given(STAGE_SIZES, STAGE_LAYERS, st.lists(st.integers(10**9, 10**10), min_size=4, max_size=4))
def test_stages_have_the_same_slots(sizes: tuple[int, int], counts: list[tuple[int, int]], budgets: list[int]) -> None:
    stages = stages_of(sizes, counts, 16)
    try:
        geometries = choose_stage_geometries(stages, budgets[: len(stages)], 8192)
    except CacheConfigError:
        reject()
    assert len({tuple(layout.blocks_per_extent for layout in geometry.layouts) for geometry in geometries}) == 1
    for groups, geometry in zip(stages, geometries, strict=True):
        for group, layout in zip(groups, geometry.layouts, strict=True):
            assert layout.block_bytes == group.block_bytes
            assert layout.stride % group.align == 0
    complete = [geometry for (a, s), geometry in zip(counts, geometries, strict=True) if a and s]
    if complete:
        assert min(geometry.padding for geometry in complete) < 0.01, "the blocks_per_extent suit one stage"


@settings(max_examples=100)
@given(
    STAGE_SIZES,
    STAGE_LAYERS,
    st.lists(st.integers(10**9, 10**10), min_size=4, max_size=4),
    st.integers(1, 20),
)
def test_fixed_stages_have_the_same_blocks_and_no_overlap(
    sizes: tuple[int, int], counts: list[tuple[int, int]], budgets: list[int], requests: int
) -> None:
    stages = stages_of(sizes, counts, 64)
    try:
        by_stage = fixed_stage_shares(stages, budgets[: len(stages)], requests, 8192)
    except CacheConfigError:
        reject()
    assert len({tuple((share.first, share.blocks) for share in shares) for shares in by_stage}) == 1
    for groups, shares, budget in zip(stages, by_stage, budgets, strict=False):
        # The null blocks, the states, attention: in this order, and within the memory.
        attn, state_share = shares
        end = max(share.stride for share in shares)
        for group, share in ((groups[1], state_share), (groups[0], attn)):
            assert share.block_bytes == group.block_bytes <= share.stride
            if share.stride:
                assert share.first * share.stride >= end
                end = (share.first + share.blocks) * share.stride
        assert end <= budget
    # Attention could not have one block more on the stage that is tightest.
    slack = [budget - (s[0].first + s[0].blocks) * s[0].stride for s, budget in zip(by_stage, budgets, strict=False)]
    assert any(s[0].stride and left < s[0].stride for s, left in zip(by_stage, slack, strict=True))


@settings(max_examples=100)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 6), st.sampled_from([1, 2, 3])), min_size=1, max_size=3))
def test_the_extent_for_given_counts_is_the_smallest_that_holds_them(groups: list[tuple[int, int, int]]) -> None:
    made = geometry_by_counts([state(size, align=align) for size, _, align in groups], [n for _, n, _ in groups])
    assert [layout.blocks_per_extent for layout in made.layouts] == [n for _, n, _ in groups]

    def holds(extent: int) -> bool:
        return all(extent % (n * align) == 0 and extent >= n * size for size, n, align in groups)

    assert holds(made.extent_bytes)
    assert not any(holds(extent) for extent in range(1, made.extent_bytes))


def test_groups_without_a_layer_take_an_extent_and_no_bytes() -> None:
    nothing = Group(State(64), (), 16)
    geometry = geometry_by_counts([nothing], [3])
    assert geometry.extent_bytes == 3
    assert geometry.padding == 0
    geometry = geometry_by_counts([nothing, state(99, align=1)], [3, 1])
    assert geometry.layouts[0].block_bytes == 0
    assert geometry.padding == 0
    assert geometry.extents_for([4, 5]) == 2 + 5


@settings(max_examples=60)
@given(STAGE_SIZES, STAGE_LAYERS, st.lists(st.integers(10**6, 10**9), min_size=4, max_size=4), st.integers(1, 100_000))
@example((512, 100_000), [(4, 0), (0, 8)], [10**8, 10**9], 1_000)
@example((512, 100_000), [(4, 1), (1, 8), (2, 2)], [10**8, 10**8, 10**7], 1_000)
def test_stages_take_the_counts_of_the_stage_with_which_most_requests_run(
    sizes: tuple[int, int], counts: list[tuple[int, int]], budgets: list[int], tokens: int
) -> None:
    stages = stages_of(sizes, counts, 16)

    def requests(geometries: Sequence[Geometry]) -> float:
        extents = min(budget // each.extent_bytes for budget, each in zip(budgets, geometries, strict=False)) - 1
        per_request = [-(-tokens // 16), 2]
        layouts = geometries[0].layouts
        return extents / sum(n / layout.blocks_per_extent for n, layout in zip(per_request, layouts, strict=True))

    suited = [groups for groups, (a, s) in zip(stages, counts, strict=True) if a and s]
    if not suited:
        suited = stages_of(sizes, [(sum(a for a, _ in counts), sum(s for _, s in counts))], 16)
    try:
        chosen = choose_stage_geometries(stages, budgets[: len(stages)], tokens)
        slots = [[layout.blocks_per_extent for layout in choose_geometry(groups).layouts] for groups in suited]
    except CacheConfigError:
        reject()
    candidates = [[geometry_by_counts(groups, per_extent) for groups in stages] for per_extent in slots]
    assert requests(chosen) == max(map(requests, candidates))


@pytest.mark.parametrize("layout", [ExtentLayout(40, 40, 4), ExtentLayout(50, 40, 3)])
def test_a_cut_that_does_not_tile_its_extent_is_refused(layout: ExtentLayout) -> None:
    with pytest.raises(CacheConfigError, match="doesn't tile an extent of 120 bytes"):
        Geometry(120, (layout,))

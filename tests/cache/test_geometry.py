from __future__ import annotations

import math
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
    SlidingWindow,
    State,
    block_align,
    choose_geometry,
    choose_stage_geometries,
    fixed_shares,
    fixed_stage_shares,
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


@settings(deadline=None, max_examples=150)
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


@settings(deadline=None, max_examples=60)
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


@settings(deadline=None, max_examples=60)
@given(many_groups(most=6))
def test_up_to_six_groups_stay_under_two_percent(groups: list[Group]) -> None:
    check(groups, MAX_PADDING_MANY)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(100, 1500), st.sampled_from([1, 2, 4])), min_size=3, max_size=5))
@example([(72, 1), (409, 1), (599, 1)])
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


def test_blocks_are_aligned_as_well_as_their_pages() -> None:
    assert [block_align(page) for page in (128, 96, 16 * 561, 18, 6 * ODD)] == [64, 32, 16, 16, 64]


class TestSafetyOfSizes:
    def test_a_forced_up_block_never_exceeds_its_page(self) -> None:
        page = Group(FullAttention(ODD), ("l",), 12, page_bytes=12 * ODD)
        assert page.with_kernel_block(4).block_tokens == 12
        natural = Group(FullAttention(ODD), ("l",), 12)
        assert natural.with_kernel_block(16).page_bytes == 16 * ODD, "a natural page grows with its block"
        roomy = Group(FullAttention(ODD), ("l",), 12, page_bytes=16 * ODD + 8)
        assert roomy.with_kernel_block(16).page_bytes == 16 * ODD + 8
        with pytest.raises(CacheConfigError, match=r"block of 16 tokens needs 6,656 bytes.*has 6,000"):
            Group(FullAttention(ODD), ("l",), 12, page_bytes=6_000).with_kernel_block(16)

    @given(st.integers(1, 10_000), st.integers(1, 64), st.integers(0, 700_000), st.sampled_from([16, 32]))
    def test_whatever_the_sizes(self, per_token: int, tokens: int, page: int, kernel: int) -> None:
        try:
            group = Group(FullAttention(per_token), ("l",), tokens, page_bytes=page).with_kernel_block(kernel)
        except CacheConfigError:
            assert 0 < page < math.ceil(tokens / kernel) * kernel * per_token
        else:
            assert group.block_tokens % kernel == 0
            assert group.block_tokens * per_token <= group.page_bytes


def test_specs_refuse_nonsense() -> None:
    for make in (
        lambda: FullAttention(0),
        lambda: State(-1),
        lambda: SlidingWindow(4, 0),
    ):
        with pytest.raises(CacheConfigError):
            make()


def test_blocks_for_a_request() -> None:
    assert Group(SlidingWindow(64, 100), ("l",), 16).blocks_for(10_000) == 8
    assert Group(SlidingWindow(64, 100), ("l",), 16).blocks_for(33) == 3
    assert attention(64).blocks_for(33) == 3
    assert Group(State(64, copies=2), ("l",), 16).blocks_for(10_000) == 2


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


@settings(deadline=None, max_examples=100)
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


@settings(deadline=None, max_examples=100)
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


@pytest.mark.parametrize("layout", [ExtentLayout(40, 40, 4), ExtentLayout(50, 40, 3)])
def test_a_cut_that_does_not_tile_its_extent_is_refused(layout: ExtentLayout) -> None:
    with pytest.raises(CacheConfigError, match="doesn't tile an extent of 120 bytes"):
        Geometry(120, (layout,))

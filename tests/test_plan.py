"""Plans: the published figures, and predictions against the core's own allocator, to the block."""

from collections.abc import Sequence
from math import ceil
from typing import Any

import pytest
from hypothesis import given, reject, settings, strategies as st

import admission
from tidepool.cache import (
    Arena,
    CacheConfigError,
    ExtentLayout,
    FullAttention,
    Geometry,
    Group,
    HostTier,
    Left,
    SlidingWindow,
    State,
    TurnClass,
    choose_geometry,
    fixed_shares,
    group_layers,
)
from tidepool.capacity.memory import ElasticMemory, FixedMemory, Memory
from tidepool.capacity.predict import predict, predict_stages
from tidepool.command_line import UsageError
from tidepool.gpus import find_gpu
from tidepool.models import COMPARED_KV_DTYPES, KV_DTYPES, CacheOptions, ModelConfigError, entry, names
from tidepool.plan import Card, PlanOptions, Requests, account, admit, make_plan, parse_lengths, parse_mix
from tidepool.plan.planner import plan_groups
from tidepool.sides import TITLES
from tidepool.sizes import parse_size

# Reported for an RTX 4090, a fixed partition and 256 sequences; the tokens and states give the KV bytes.
PUBLISHED = {
    "Qwen3.5-0.8B": (1_094_912, 6 * 2048, 256 * 18 * 1_085_440, "auto", 1.35),
    "Nemotron-3-Nano-4B": (100_768, 4 * 4096, 256 * 21 * 2_024_448, "bfloat16", 7.5),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_fixed_partition_gives_the_published_tokens_less_the_null_block(name: str) -> None:
    tokens, token_bytes, states, state_dtype, ratio = PUBLISHED[name]
    budget = tokens * token_bytes + states
    caches = entry(name).model().layer_caches(CacheOptions(state_dtype=state_dtype))
    groups = plan_groups(caches, 16)
    fixed = predict(groups, budget, "fixed", 256, 262_144)
    elastic = predict(groups, budget, "elastic", 256, 262_144)
    assert isinstance(elastic, ElasticMemory)

    # The published design counts no null block. Ours overlays one of every group: a state, rounded up to whole
    # blocks of attention. That is just what one extent holds.
    extent_tokens = elastic.blocks_per_extent[0 if elastic.groups[0].token_bytes else 1] * 16
    held = fixed.tokens_with(1)
    assert held is not None
    assert held == fixed.tokens_with(256)
    assert tokens - held == extent_tokens

    beside_one = elastic.tokens_with(1)
    assert beside_one is not None
    assert beside_one >= ratio * tokens
    assert elastic.requests_of(12) == 256


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("name", names())
def test_geometry_pads_less_than_promised(name: str, kv_dtype: str) -> None:
    try:
        caches = entry(name).model().layer_caches(CacheOptions(kv_dtype=kv_dtype))
    except ModelConfigError:
        pytest.skip("latent attention has no heads to pack")
    groups = plan_groups(caches, 16)
    assert choose_geometry(groups).padding < (0.01 if len(groups) <= 2 else 0.02)


@pytest.mark.parametrize("name", ["Qwen3.5-4B", "Nemotron-3-Nano-4B", "Granite-4.0-H-Small"])
def test_host_memory_holds_the_prompts_that_are_planned(name: str) -> None:
    """Prompt after prompt is copied into a real host tier, until one pushes another out. It leaves gaps of its own."""
    lengths = (1_000, 8_000)
    options = PlanOptions(16 << 30, host_bytes=16 << 30, tp=2, contexts=lengths)
    made = make_plan(name, "", entry(name).model(), options)
    assert made.host
    memory = made.columns["elastic"].memory
    assert isinstance(memory, ElasticMemory)
    layouts = [
        ExtentLayout(group.natural_bytes, group.stride, count)
        for group, count in zip(memory.groups, memory.blocks_per_extent, strict=True)
    ]
    geometry = Geometry(memory.extent_bytes, tuple(layouts))
    for tokens in lengths:
        tier = HostTier([group.natural_bytes for group in memory.groups])
        gone: list[tuple[int, int]] = []

        def evicted(group: int, block: int, tier: HostTier = tier, gone: list[tuple[int, int]] = gone) -> None:
            gone.append((group, block))
            tier.evicted(group, block)

        tier.arena = Arena.elastic(geometry, (8 << 30) // memory.extent_bytes, on_evict=evicted)
        held = 0
        while not gone:
            left = [
                Left(index, block, (held, index, block), tokens)
                for index, group in enumerate(memory.groups)
                for block in range(1 if group.label == "state" else group.blocks_for(tokens))
            ]
            copy = tier.store(held, TurnClass.FIRST, left)
            assert copy
            tier.ended(copy.number)
            held += 1
        assert 0.9 * made.host.prompts[tokens] <= held - 1 <= made.host.prompts[tokens]


# Predictions and the allocator ------------------------------------------------------------------------------

layer_caches = st.one_of(
    st.builds(FullAttention, st.integers(30, 400)),
    st.builds(SlidingWindow, st.integers(30, 400), st.integers(1, 100)),
    st.builds(State, st.integers(2_000, 60_000), st.integers(1, 3)),
)


@st.composite
def group_lists(draw: st.DrawFn) -> list[Group]:
    """One to three groups of distinct layer caches."""
    caches = draw(st.lists(layer_caches, min_size=1, max_size=3, unique=True))
    return [
        Group(cache, tuple(f"{index}.{layer}" for layer in range(draw(st.integers(1, 5)))), 16)
        for index, cache in enumerate(caches)
    ]


def geometry_of(groups: Sequence[Group]) -> Geometry:
    """Their geometry; sizes that no extent holds with so little padding are not what is tested here."""
    try:
        return choose_geometry(groups)
    except CacheConfigError:
        reject()


def run_requests(arena: Arena, groups: Sequence[Group], lengths: Sequence[int]) -> bool:
    """Admit requests one after another; whether all were."""
    for tokens in lengths:
        needs = [group.blocks_for(tokens) for group in groups]
        if not admission.admit(arena, needs):
            return False
        for index, need in enumerate(needs):
            arena.allocate(index, need)
    return True


@settings(max_examples=150)
@given(groups=group_lists(), extents=st.integers(2, 40), lengths=st.lists(st.integers(1, 400), max_size=8))
def test_elastic_prediction_is_what_the_arena_admits(groups: list[Group], extents: int, lengths: list[int]) -> None:
    geometry = geometry_of(groups)
    budget = (extents + 1) * geometry.extent_bytes - 1
    try:
        memory = predict(groups, budget, "elastic", 256, 4096)
    except CacheConfigError:
        assert not run_requests(Arena.elastic(geometry, extents), groups, [1])
        return
    assert isinstance(memory, ElasticMemory)
    assert memory.extents == extents
    assert memory.holds([(1, tokens) for tokens in lengths]) == run_requests(
        Arena.elastic(geometry, extents), groups, lengths
    )


@settings(max_examples=150)
@given(
    groups=group_lists(),
    budget=st.integers(100_000, 4_000_000),
    lengths=st.lists(st.integers(1, 400), max_size=8),
)
def test_fixed_prediction_is_what_the_arena_admits(groups: list[Group], budget: int, lengths: list[int]) -> None:
    try:
        memory = predict(groups, budget, "fixed", 8, 400)
        shares = fixed_shares(groups, budget, 8, 400)
    except CacheConfigError:
        return
    assert isinstance(memory, FixedMemory)
    assert [group.blocks for group in memory.groups] == [share.blocks for share in shares]
    assert memory.holds([(1, tokens) for tokens in lengths]) == run_requests(
        Arena.fixed(shares, budget), groups, lengths
    )


@given(groups=group_lists(), extents=st.integers(2, 60), requests=st.integers(1, 20))
def test_tokens_with_is_the_most(groups: list[Group], extents: int, requests: int) -> None:
    budget = extents * geometry_of(groups).extent_bytes
    try:
        memory = predict(groups, budget, "elastic", 256, 4096)
    except CacheConfigError:
        return
    tokens = memory.tokens_with(requests)
    if tokens is None:
        assert not any(isinstance(group.cache, FullAttention) for group in groups)
    elif tokens:
        each, longer = divmod(tokens // 16, requests)
        assert memory.holds([(longer, (each + 1) * 16), (requests - longer, each * 16)])
        assert not memory.holds([(longer + 1, (each + 1) * 16), (requests - longer - 1, each * 16)])
    else:
        assert not memory.holds([(requests, 16)])


@given(
    groups=group_lists(),
    extents=st.integers(2, 60),
    partition=st.sampled_from(["elastic", "fixed"]),
    mix=st.lists(st.builds(Requests, st.integers(1, 6), st.integers(1, 600)), max_size=4),
)
def test_every_byte_is_accounted_for(groups: list[Group], extents: int, partition: str, mix: list[Requests]) -> None:
    budget = extents * geometry_of(groups).extent_bytes + 7
    try:
        memory = predict(groups, budget, "fixed" if partition == "fixed" else "elastic", 8, 600)
    except CacheConfigError:
        return
    admitted = admit(memory, mix)
    assert memory.holds([(item.count, item.tokens) for item in admitted])
    parts = account(memory, admitted, 16)
    assert parts.total == budget
    assert min(parts.parts().values()) >= 0


# Whole plans ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix_caching", [False, True])
@pytest.mark.parametrize("name", names())
def test_every_model_has_a_plan_whose_bytes_add_up(name: str, prefix_caching: bool) -> None:
    options = PlanOptions(kv_bytes=40 << 30, prefix_caching=prefix_caching)
    plan = make_plan(name, "", entry(name).model(), options)
    assert "stock" in plan.columns
    assert "elastic" in plan.columns
    for column in plan.columns.values():
        assert column.account.total == options.kv_bytes
        assert min(column.account.parts().values()) >= 0
        assert all(group.natural_bytes <= group.stride for group in column.memory.groups)
        counts = [tokens for tokens in column.tokens.values() if tokens is not None]
        assert counts == sorted(counts, reverse=True)


@pytest.mark.parametrize("name", ["Qwen3.5-4B", "Nemotron-3-Nano-4B", "Falcon-H1-7B", "GLM-5.3-Flash"])
@pytest.mark.parametrize("pp", [2, 3])
def test_pipeline_stages_hold_more_than_one_device(name: str, pp: int) -> None:
    model = entry(name).model()
    one, many = (make_plan(name, "", model, PlanOptions(kv_bytes=20 << 30, pp=n)) for n in (1, pp))
    for kind in ("stock", "elastic"):
        few, more = one.columns[kind].tokens[8], many.columns[kind].tokens[8]
        assert few is not None
        assert more is not None
        assert few < more < pp * few * 1.1
        assert many.columns[kind].account.total == 20 << 30


def test_slots_are_equal_on_all_stages_and_the_tightest_counts() -> None:
    large = group_layers({f"a{i}": FullAttention(100) for i in range(8)} | {"s": State(90_000)}, 16)
    small = group_layers({f"b{i}": FullAttention(100) for i in range(2)} | {"t": State(90_000)}, 16)
    alone = predict(large, 10_000_000, "elastic", 8, 1000)
    staged = predict_stages([large, small], 10_000_000, "elastic", 8, 1000)
    assert isinstance(alone, ElasticMemory)
    assert isinstance(staged, ElasticMemory)
    assert (staged.extents, staged.blocks_per_extent) == (alone.extents, alone.blocks_per_extent)


def test_a_stage_without_a_group_takes_nothing_for_it() -> None:
    both = group_layers({"a": FullAttention(100), "s": State(9_000)}, 16)
    state_only = group_layers({"t": State(9_000)}, 16)
    staged = predict_stages([both, state_only], 1_000_000, "elastic", 8, 1000)
    assert staged.units == predict(both, 1_000_000, "elastic", 8, 1000).units


def test_blocks_take_extents_on_stages_without_the_groups_layers() -> None:
    stages = [group_layers({"a": FullAttention(100)}, 16), group_layers({"s": State(9_000)}, 16)]
    staged = predict_stages(stages, 1_000_000, "elastic", 8, 1000)
    assert isinstance(staged, ElasticMemory)
    assert sorted(group.layers for group in staged.groups) == [0, 1], "one stage is the tightest"
    most = staged.extents - 1
    for one, other in ((0, 1), (1, 0)):
        blocks = [0, 0]
        blocks[one] = most * staged.blocks_per_extent[one]
        assert staged.fits(blocks)
        blocks[other] = 1
        assert not staged.fits(blocks)


def test_a_model_of_windows_and_full_attention_is_left_to_vllm() -> None:
    options = PlanOptions(kv_bytes=4 << 30)
    (reason,) = make_plan("x", "", entry("Gemma-3-4B").model(), options).fallbacks
    assert "states" in reason
    assert make_plan("x", "", entry("Qwen3.5-4B").model(), options).fallbacks == []


def test_a_partition_that_does_not_fit_says_why() -> None:
    plan = make_plan("x", "", entry("Nemotron-3-Nano-4B").model(), PlanOptions(kv_bytes=4 << 30))
    assert list(plan.columns) == ["stock", "elastic"]
    assert "256 requests" in plan.missing["fixed"]


def test_dtypes_are_compared_where_attention_can_have_them() -> None:
    rows = make_plan("x", "", entry("Qwen3.5-4B").model(), PlanOptions(kv_bytes=20 << 30)).dtypes
    by_name = {name: row for row in rows for name in (row.kv_dtype, *row.also)}
    assert set(by_name) == set(COMPARED_KV_DTYPES)
    assert "tqkv-k3v3" in by_name
    assert by_name["fp8"].token_bytes * 2 == by_name["auto"].token_bytes
    assert by_name["fp8"].tokens["elastic"] > 1.9 * by_name["auto"].tokens["elastic"]
    latent = make_plan("x", "", entry("Kimi-Linear-48B-A3B").model(), PlanOptions(kv_bytes=20 << 30)).dtypes
    assert [row.kv_dtype for row in latent] == ["auto", "fp8"]


def test_prefix_caching_and_drafts_cost_states() -> None:
    model = entry("Qwen3.5-4B").model()

    def states(options: PlanOptions) -> int:
        memory: Memory = make_plan("x", "", model, options).columns["elastic"].memory
        return next(group.blocks_for(1000) for group in memory.groups if group.label == "state")

    assert states(PlanOptions(kv_bytes=20 << 30, prefix_caching=False)) == 1
    assert states(PlanOptions(kv_bytes=20 << 30)) == 2
    assert states(PlanOptions(kv_bytes=20 << 30, speculative_tokens=3)) == 5


def test_a_head_that_drafts_is_one_layer_of_attention_more() -> None:
    model = entry("Qwen3.5-4B").model()

    def layers(mtp: bool) -> dict[str, int]:
        options = PlanOptions(kv_bytes=20 << 30, speculative_tokens=1, mtp=mtp)
        return {
            group.label: group.layers for group in make_plan("x", "", model, options).columns["elastic"].memory.groups
        }

    assert layers(False) == {"state": 24, "attention": 8}
    assert layers(True) == {"state": 24, "attention": 9}


@pytest.mark.parametrize("kind", TITLES)
def test_never_more_than_max_num_seqs_run(kind: str) -> None:
    options = PlanOptions(kv_bytes=60 << 30, max_num_seqs=3)
    columns = make_plan("x", "", entry("Qwen3.5-0.8B").model(), options).columns
    column = next(column for name, column in columns.items() if name == kind)
    assert column.max_requests == 3
    assert list(column.tokens) == [1, 3]
    assert sum(item.count for item in column.admitted) == 3


# What users type --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("18GiB", 18 << 30),
        ("1.5 gib", 3 << 29),
        ("500MB", 500_000_000),
        ("123", 123),
        ("7 B", 7),
        ("2KiB", 2048),
    ],
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "1 parsec", "0", "1e9", "nan"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(UsageError):
        parse_size(text)


def test_lengths_and_mixes() -> None:
    assert parse_lengths("1k, 500,128k") == [1000, 500, 128_000]
    assert parse_mix("32x2k,1x100") == [Requests(32, 2000), Requests(1, 100)]
    for text in ("", "x", "1.5k", "-3", "0"):
        with pytest.raises(UsageError):
            parse_lengths(text)
    for text in ("32", "x2k", "2x", "0x5"):
        with pytest.raises(UsageError):
            parse_mix(text)


def test_a_card_gives_what_weights_and_reserve_leave() -> None:
    card = Card("4090", find_gpu("4090")[1].total_bytes, 0.9, 8 << 30, 2 << 30)
    assert card.kv_bytes == ceil(int(23.52 * 2**30) * 0.9) - (10 << 30)
    with pytest.raises(UsageError, match="L40S"):
        find_gpu("3dfx")


@pytest.mark.parametrize(
    "change",
    [
        {"kv_bytes": 0},
        {"tp": 0},
        {"pp": -1},
        {"max_num_seqs": 0},
        {"max_model_len": 0},
        {"speculative_tokens": -1},
    ],
)
def test_options_must_make_sense(change: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        PlanOptions(**({"kv_bytes": 1} | change))


def test_memory_below_one_request_says_how_much_is_needed() -> None:
    with pytest.raises(UsageError, match="don't hold one request"):
        make_plan("x", "", entry("Qwen3.5-4B").model(), PlanOptions(kv_bytes=50 << 20))

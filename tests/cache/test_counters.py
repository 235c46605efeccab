"""What the core counts for those who watch it: each number against a case small enough to count by hand."""

from __future__ import annotations

import pytest

from tidepool.cache import (
    Arena,
    BranchCheckpoints,
    CheckpointRules,
    ExpectedReturn,
    ExtentLayout,
    Geometry,
    Lookup,
    LookupResult,
    LookupStatistics,
    PriorityClass,
    ResumePoint,
    Retention,
    RetentionPolicy,
    ReuseModel,
    TokenResult,
    TurnClass,
)

UNIT = 16


def arena(extents: int) -> Arena:
    """Two groups in extents of 100 bytes: 2 blocks of 49 in 50 bytes, and 5 of 20."""
    geometry = Geometry(100, (ExtentLayout(49, 50, 2), ExtentLayout(20, 20, 5)))
    return Arena.elastic(geometry, extents, policy=ExpectedReturn(ReuseModel(100)))


def leave(memory: Arena, name: str, blocks: int, turn: TurnClass = TurnClass.FIRST, group: int = 1) -> list[int]:
    """A request takes blocks, leaves them in the cache and ends."""
    memory.start(name, turn)
    got = memory.allocate(group, blocks, request=name)
    memory.release(group, got, [Retention.KEEP] * blocks, request=name)
    memory.finish(name)
    return got


def test_extents_that_move_are_counted_by_who_gets_them() -> None:
    memory = arena(3)
    first = memory.allocate(0, 4)
    memory.release(0, first)
    assert [pool.moves for pool in memory.pools] == [0, 0], "the first owner of an extent takes it from nobody"
    second = memory.allocate(1, 10)
    assert [pool.moves for pool in memory.pools] == [0, 2]
    memory.release(1, second)
    memory.allocate(1, 10)
    assert memory.moves == 2, "it has had them before"


def test_a_prefix_that_is_evicted_counts_once_by_its_class_and_its_blocks_one_by_one() -> None:
    memory = arena(4)
    leave(memory, "old", 5)
    leave(memory, "second", 5, TurnClass.SECOND)
    leave(memory, "later", 5, TurnClass.LATER)
    assert not any(memory.evictions.values())
    memory.allocate(1, 3)
    assert sum(memory.evictions.values()) == 1
    memory.allocate(1, 12)
    assert memory.evictions == {
        PriorityClass.LOW: 0,
        PriorityClass.FIRST: 1,
        PriorityClass.SECOND: 1,
        PriorityClass.LATER: 1,
        PriorityClass.SHARED: 0,
        None: 0,
    }
    assert [pool.evictions for pool in memory.pools] == [0, 15]


def test_blocks_of_low_priority_and_what_runs_are_classes_of_their_own() -> None:
    memory = arena(3)
    memory.start("running", TurnClass.FIRST)
    states = memory.allocate(0, 2, request="running")
    memory.release(0, states, [Retention.LOW, Retention.LOW], request="running")
    kept = memory.allocate(1, 5, request="running")
    memory.release(1, kept, [Retention.KEEP] * 5, request="running")
    memory.allocate(1, 10)
    assert memory.evictions[PriorityClass.LOW] == 2
    assert memory.evictions[None] == 1
    assert not memory.eviction_ages, "what runs hasn't begun to age"


def test_the_age_at_eviction_is_what_was_allocated_since() -> None:
    memory = arena(3)
    leave(memory, "old", 5)
    memory.allocate(1, 5)
    assert memory.bytes_allocated == 200
    memory.allocate(1, 1)
    # The clock has moved on by what is asked for when it is searched for.
    assert list(memory.eviction_ages) == [120]


def test_hits_and_what_is_forgotten_are_no_evictions() -> None:
    memory = arena(3)
    blocks = leave(memory, "one", 5)
    memory.touch(1, blocks[:2])
    memory.forget(1, blocks[2:])
    assert not any(memory.evictions.values())
    assert not memory.pools[1].evictions


def test_bytes_of_groups_add_up_to_the_arena() -> None:
    memory = arena(4)
    leave(memory, "one", 3)
    memory.allocate(0, 1)
    states, attention = memory.usage_of_groups()
    assert (states.in_use, states.cached, states.free, states.padding) == (49, 0, 49, 2)
    assert (attention.in_use, attention.cached, attention.free, attention.padding) == (0, 60, 40, 0)
    usage = memory.usage()
    assert usage.in_use + usage.cached + usage.free + usage.padding + usage.unowned + usage.null == 400


def test_the_age_at_return_is_known_whether_or_not_the_cache_lasted() -> None:
    reuse = ReuseModel(100)
    first = reuse.began(["a"], 0)
    reuse.ended([ResumePoint("a", 0, True), ResumePoint("b", 16, False)], 1_000, first)
    reuse.began(["a"], 1_700)
    assert list(reuse.return_ages) == [700]
    reuse.began(["a"], 1_900)
    assert list(reuse.return_ages) == [700], "one wait has one return"


# Lookups.

R, T = LookupResult, TokenResult


@pytest.mark.parametrize(
    ("lookup", "result", "tokens"),
    [
        (Lookup(100, 64, 0, 0), R.HIT, {T.DEVICE: 64, T.NEW: 36}),
        (Lookup(100, 64, 0, 0, loaded=48), R.HIT, {T.DEVICE: 16, T.HOST: 48, T.NEW: 36}),
        (Lookup(100, 32, 64, 80), R.HIT, {T.DEVICE: 32, T.NO_STATE: 32, T.EVICTED: 16, T.NEW: 20}),
        (Lookup(100, 0, 64, 64), R.NO_STATE, {T.NO_STATE: 64, T.NEW: 36}),
        (Lookup(100, 0, 0, 64), R.EVICTED, {T.EVICTED: 64, T.NEW: 36}),
        (Lookup(100, 0, 0, 0), R.NEW, {T.NEW: 100}),
        (Lookup(UNIT, 0, 0, 0), R.SHORT, {T.NEW: UNIT}),
        (Lookup(UNIT + 1, 0, 0, 0), R.NEW, {T.NEW: UNIT + 1}),
    ],
)
def test_every_lookup_has_one_result_and_every_token_too(
    lookup: Lookup, result: LookupResult, tokens: dict[TokenResult, int]
) -> None:
    statistics = LookupStatistics(UNIT)
    statistics.count(lookup, [1] * UNIT, "key")
    assert statistics.requests == dict.fromkeys(R, 0) | {result: 1}
    assert statistics.tokens == dict.fromkeys(T, 0) | tokens
    assert sum(statistics.tokens.values()) == lookup.prompt


def test_the_same_tokens_under_another_key_are_told_from_new_ones() -> None:
    statistics = LookupStatistics(UNIT)
    miss = Lookup(100, 0, 0, 0)
    for first, key in (([1] * UNIT, "a"), ([1] * UNIT, "b"), ([2] * UNIT, "c"), ([1] * UNIT, "b")):
        statistics.count(miss, first, key)
    assert statistics.requests[R.OTHER_KEY] == 1
    assert statistics.requests[R.NEW] == 3
    statistics.count(miss, [3], None)
    assert statistics.requests[R.NEW] == 4, "a prompt without a whole block has no key"


def test_first_blocks_are_forgotten() -> None:
    statistics = LookupStatistics(UNIT)
    for number in range(4097):
        statistics.count(Lookup(100, 0, 0, 0), [number], number)
    statistics.count(Lookup(100, 0, 0, 0), [0], "other")
    assert statistics.requests[R.OTHER_KEY] == 0
    statistics.count(Lookup(100, 0, 0, 0), [4096], "other")
    assert statistics.requests[R.OTHER_KEY] == 1


# Checkpoints at branch points.


def test_a_branch_checkpoint_counts_once_for_all_groups_and_is_used_once() -> None:
    checkpoints = BranchCheckpoints()
    checkpoints.leave("a")
    checkpoints.leave("a")
    checkpoints.leave("b")
    checkpoints.hit("a")
    checkpoints.hit("a")
    checkpoints.hit("elsewhere")
    assert (checkpoints.left, checkpoints.used) == (2, 1)


def test_branch_checkpoints_are_forgotten() -> None:
    checkpoints = BranchCheckpoints()
    for number in range(4097):
        checkpoints.leave(number)
    checkpoints.hit(0)
    checkpoints.hit(4096)
    assert (checkpoints.left, checkpoints.used) == (4097, 1)


def retention() -> RetentionPolicy:
    memory = arena(17)
    rules = CheckpointRules(unit=UNIT, spacing=512, stock_block=528)
    return RetentionPolicy(rules, ReuseModel(100), memory, key_tokens=UNIT, state_tokens=100.0)


def keys(text: str, tokens: int, *, after: str = "", shared: int = 0) -> list[str]:
    return [f"{after if end <= shared else text} {end}" for end in range(UNIT, tokens + 1, UNIT)]


def test_a_state_at_a_branch_point_is_counted_when_it_is_left_and_when_it_is_hit() -> None:
    policy = retention()
    prompt = keys("b", 800, after="a", shared=640)
    policy.plan("second", prompt, 800, 0, 640)
    policy.at_step_end("second", 512, 800)
    assert policy.branch_checkpoints.left == 0
    policy.at_step_end("second", 640, 800)
    policy.at_step_end("second", 640, 800)
    assert policy.branch_checkpoints.left == 1
    third = keys("c", 800, after="a", shared=640)
    policy.plan("third", third, 800, 640, 0)
    policy.admitted("third", third, [1] * 800, 640, 0, 0)
    assert policy.branch_checkpoints.used == 1
    assert policy.lookups.requests[LookupResult.HIT] == 1


def test_what_an_earlier_prompt_left_and_is_gone_was_evicted() -> None:
    policy = retention()
    first = keys("a", 640)
    policy.plan("first", first, 640, 0, 0)
    policy.state_at("first", 512)
    policy.end("first", first, 640, 640, policy.release("first"))
    second = keys("b", 800, after="a", shared=640)
    policy.plan("second", second, 800, 0, 0)
    policy.admitted("second", second, [1] * 800, 0, 0, 0)
    assert policy.lookups.requests[LookupResult.EVICTED] == 1
    assert policy.lookups.tokens == {
        TokenResult.DEVICE: 0,
        TokenResult.HOST: 0,
        TokenResult.NO_STATE: 0,
        TokenResult.EVICTED: 512,
        TokenResult.NEW: 288,
    }


def test_the_state_of_an_answer_was_left_too() -> None:
    policy, text = retention(), keys("a", 960)
    policy.plan("first", text, 640, 0, 0)
    policy.state_at("first", 800)
    policy.end("first", text, 640, 805, policy.release("first"))
    policy.begin("again", text)
    policy.admitted("again", text, [1] * 960, 0, 0, 0)
    assert policy.lookups.tokens[TokenResult.EVICTED] == 800

"""Published eviction policies choose what their descriptions say."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, strategies as st

from tidepool.cache import (
    Arena,
    CachedPrefix,
    ExtentLayout,
    Geometry,
    LeastRecentlyUsed,
    Marconi,
    PrefixMatch,
    PrefixSizes,
    PriorityClass,
    ResumePoint,
    Retention,
    ReuseModel,
    TurnClass,
    published,
    seglen,
    tail_optimized,
)
from tidepool.cache.published import MARCONI_WEIGHTS, Came, Served, Size, Weighed, hits, saved_for_each_byte

SIZES = PrefixSizes(token_bytes=2.0, state_bytes=1_000)


def prefix(tokens: int, since: int, states: int = 1) -> CachedPrefix:
    """What a finished request has left."""
    made = CachedPrefix(PriorityClass.FIRST, running=False)
    made.since = since
    made.state_bytes = 1_000 * states
    made.bytes = 2 * tokens + made.state_bytes
    return made


def drained(policy: Weighed) -> list[CachedPrefix]:
    """All that is cached, in the order in which it goes."""
    order = []
    while (victim := policy.victim(4)) is not None:
        order.append(victim)
        policy.drop(victim)
    return order


def test_what_a_prefix_saves_is_its_attention() -> None:
    assert SIZES.of(prefix(320, 0, states=2)) == (320, 640 + 2_000)
    assert SIZES.of_tokens(320) == (320, 640 + 1_000)
    assert saved_for_each_byte(Size(300, 3 * 2**20)) == 100.0, "tokens for each MiB"


@given(
    st.lists(st.tuples(st.integers(1, 4_000), st.integers(1, 50)), min_size=1, max_size=30),
    st.sampled_from(MARCONI_WEIGHTS),
)
def test_the_lowest_sum_of_recency_and_value_goes_first(given_prefixes: list[tuple[int, int]], weight: float) -> None:
    """Against the sum for every prefix, with values rounded to their classes."""
    values: dict[CachedPrefix, float] = {}
    policy = Weighed(lambda each: values[each], weight)
    now = 0
    for quarters, wait in given_prefixes:
        now += wait
        made = prefix(0, now)
        values[made] = 2.0 ** (quarters % 40 / 4)
        policy.keep(made)
    now += 1
    while values:
        oldest = max(now - each.since for each in values)
        spread = max(values.values()) - min(values.values()) or 1.0
        least = min(values.values())
        scores = {
            each: 1 - (now - each.since) / oldest + weight * (value - least) / spread for each, value in values.items()
        }
        victim = policy.victim(now)
        assert victim is not None
        assert scores[victim] == pytest.approx(min(scores.values()))
        policy.drop(victim)
        del values[victim]
    assert policy.victim(now) is None


def test_without_a_weight_it_is_lru() -> None:
    policy = Weighed(lambda each: SIZES.of(each).tokens, 0.0)
    old, new = prefix(4_096, 1), prefix(16, 2)
    for each in (old, new):
        policy.keep(each)
    assert policy.victim(3) is old


def test_seglen_keeps_what_is_long() -> None:
    policy = seglen(SIZES)
    long, short = prefix(8_192, 1), prefix(512, 2)
    for each in (long, short):
        policy.keep(each)
    assert policy.victim(3) is short


def test_t_lru_gives_up_what_is_read_again_soon_and_then_the_oldest() -> None:
    policy = tail_optimized(SIZES)
    longest, long, short = prefix(30_000, 1), prefix(10_000, 2), prefix(8_000, 3)
    for each in (longest, long, short):
        policy.keep(each)
    assert drained(policy) == [short, longest, long], "length says no more about those that are slow"


def test_what_runs_goes_last_and_what_is_broken_first() -> None:
    policy = seglen(SIZES)
    running, finished, broken = prefix(16, 1), prefix(4_096, 2), prefix(9_000, 3)
    running.running = broken.broken = True
    for each in (running, finished, broken):
        policy.keep(each)
    assert drained(policy) == [broken, finished, running]


@pytest.mark.parametrize("low_together", [True, False])
def test_states_of_low_priority_age_by_themselves_only_where_the_policy_says_so(low_together: bool) -> None:
    """A state that a later one supersedes is as good as any other to SGLang's and Jenga's order."""
    evicted: list[tuple[int, int]] = []
    arena = Arena.elastic(
        Geometry(64, (ExtentLayout(16, 16, 4), ExtentLayout(64, 64, 1))),
        4,
        policy=LeastRecentlyUsed(low_together=low_together),
        on_evict=lambda group, block: evicted.append((group, block)),
    )
    (early,) = arena.allocate(1, 1)
    (late,) = arena.allocate(1, 1)
    (middle,) = arena.allocate(1, 1)
    arena.release(1, [early], [Retention.LOW])
    arena.release(1, [middle], [Retention.KEEP])
    arena.release(1, [late], [Retention.LOW])
    arena.allocate(1, 2)
    assert evicted == [(1, early), (1, late) if low_together else (1, middle)]


def told(reuse: ReuseModel, key: str, tokens: int, now: int, match: PrefixMatch) -> None:
    reuse.ended([ResumePoint(key, 0, True)], now, match, tokens)


def test_marconi_learns_that_long_prompts_come_back() -> None:
    """Long prompts come back after two short ones, which never do, and the cache has room for little more than one."""
    reuse = ReuseModel(1)
    policy = Marconi(SIZES, reuse)
    told(reuse, "first", 4_096, 1, PrefixMatch(TurnClass.FIRST))
    policy.keep(prefix(4_096, 1))
    assert policy.weight == 0.0
    assert policy.victim(2) is not None, "the first eviction opens the window"
    for turn in range(60):
        now = 10 * turn + 10
        told(reuse, f"long-{turn}", 4_096, now, reuse.began([f"long-{turn - 1}"], now))
        for short in range(2):
            told(reuse, f"short-{turn}-{short}", 512, now + short + 1, reuse.began([], now))
    assert policy.weight > 0.0


def test_marconi_stays_with_recency_where_nothing_is_gained() -> None:
    """Whoever comes back is short and was here just before."""
    reuse = ReuseModel(1)
    policy = Marconi(SIZES, reuse)
    told(reuse, "first", 4_096, 1, PrefixMatch(TurnClass.FIRST))
    policy.keep(prefix(4_096, 1))
    policy.victim(2)
    for turn in range(60):
        now = 10 * turn + 10
        told(reuse, f"long-{turn}", 4_096, now, reuse.began([], now))
        told(reuse, f"short-{turn}", 512, now + 1, reuse.began([f"short-{turn - 1}"], now))
    assert policy.weight == 0.0


def test_marconi_serves_a_window_of_the_past_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was served before the first eviction fills the memory, and tells how long a window is."""
    simulated: list[tuple[list[Came | Served], int, float]] = []

    def spy(past: Sequence[Came | Served], capacity: int, weight: float) -> int:
        simulated.append((list(past), capacity, weight))
        return int(weight == 2.0)

    monkeypatch.setattr(published, "hits", spy)
    reuse = ReuseModel(1)
    policy = Marconi(SIZES, reuse)
    for number in range(3):
        told(reuse, f"before-{number}", 1_000, number, PrefixMatch(TurnClass.FIRST))
    policy.victim(3)
    policy.victim(3)
    nothing, shared = PrefixMatch(TurnClass.FIRST), PrefixMatch(TurnClass.FIRST, shared="s", place="s")
    for observer in reuse.observers:
        for match in (nothing, shared, PrefixMatch(TurnClass.SECOND, place="before-0")):
            observer.came(match)
    points = [ResumePoint("end", 0, True), ResumePoint("no state", 0, False), ResumePoint("far", 512, True)]
    reuse.ended(points, 4, nothing, 500)
    reuse.ended(points[1:], 4, nothing, 500)
    for number in range(25):
        told(reuse, f"after-{number}", 1_000, 5, nothing)
    assert not simulated, "29 of 30 prompts"
    told(reuse, "last", 1_000, 6, nothing)
    assert [weight for _, _, weight in simulated] == list(MARCONI_WEIGHTS)
    past, capacity, _ = simulated[0]
    assert capacity == 3 * (2_000 + 1_000)
    assert [event for event in past if isinstance(event, Came)] == [Came("s", True), Came("before-0", False)]
    assert Served(("end",), SIZES.of_tokens(500), 4) in past
    assert len(past) == 30 + 2
    assert policy.weight == 2.0
    for number in range(30):
        assert len(simulated) == len(MARCONI_WEIGHTS)
        told(reuse, f"later-{number}", 1_000, 7, nothing)
    assert len(simulated) == 2 * len(MARCONI_WEIGHTS), "the next window is as long, and begins anew"
    assert len(simulated[-1][0]) == 30


def test_the_simulation_counts_tokens_that_a_cache_of_that_size_hits() -> None:
    past: list[Came | Served] = [
        Served(("a",), SIZES.of_tokens(1_600), 1),
        Served(("b",), SIZES.of_tokens(160), 2),
        Came("a", shared=False),
        Served(("c",), SIZES.of_tokens(3_200), 3),
        Came("c", shared=True),
        Came("c", shared=True),
        Came("a", shared=False),
        Came("nobody's", shared=False),
    ]
    assert hits(past, 100_000, 0.0) == 1_600 + 3_200 + 3_200, "what a turn continues is gone once it has come"
    assert hits(past, 4_200, 0.0) == 0, "a goes for b, and c is larger than all"
    assert hits(past, 7_400, 0.0) == 1_600 + 3_200 + 3_200, "b goes for c, which fills all"

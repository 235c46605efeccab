"""What the policy of expected returns evicts first."""

from __future__ import annotations

import pytest

from tidepool.cache import CachedPrefix, ExpectedReturn, PriorityClass, ReuseModel


def left(policy: ExpectedReturn, since: int, attention: int, state: int, priority: PriorityClass) -> CachedPrefix:
    """A finished request has left so many bytes."""
    prefix = CachedPrefix(priority, running=False)
    prefix.since, prefix.bytes, prefix.state_bytes = since, attention + state, state
    policy.keep(prefix)
    return prefix


@pytest.mark.parametrize(
    ("attention", "goes"),
    [
        ((1_000, 10_000), 0),
        ((10_000, 1_000), 1),
        ((0, 1_000), 1),
        ((9_000, 10_000), 0),
    ],
    ids=["short first", "short last", "states alone say nothing of length", "about as long: the oldest"],
)
def test_of_the_same_age_goes_what_saves_less_for_each_byte(attention: tuple[int, int], goes: int) -> None:
    policy = ExpectedReturn(ReuseModel(1_000))
    prefixes = [left(policy, since, size, 5_000, PriorityClass.FIRST) for since, size in enumerate(attention)]
    assert policy.victim(10) is prefixes[goes]


def test_a_shared_prefix_is_judged_by_its_returns_alone() -> None:
    """All who come hit it, so a state after few tokens is worth as much as one after many."""
    policy = ExpectedReturn(ReuseModel(1_000))
    old = left(policy, 0, 50_000, 5_000, PriorityClass.SHARED)
    left(policy, 1, 100, 5_000, PriorityClass.SHARED)
    assert policy.victim(10) is old


def test_an_old_one_that_nobody_expects_goes_before_a_short_one() -> None:
    reuse = ReuseModel(1)
    policy = ExpectedReturn(reuse)
    old = left(policy, 0, 100_000, 5_000, PriorityClass.FIRST)
    left(policy, 5_000, 4_000, 5_000, PriorityClass.FIRST)
    assert policy.victim(5_001) is old


def test_a_prefix_that_only_states_are_left_of_has_a_class() -> None:
    policy = ExpectedReturn(ReuseModel(1))
    only = left(policy, 0, 0, 5_000, PriorityClass.LATER)
    assert policy.victim(1) is only
    policy.drop(only)
    assert policy.victim(1) is None

"""Learning when prompts are gone on from, and what the policy makes of it."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, strategies as st

from tidepool.cache import Arena, Cut, ExpectedReturn, Geometry, Keep, Returns

UNIT = 100
AGES = [0, 150, 300, 600, 1_200, 2_400, 4_800, 9_600]


def conversations(returns: Returns, count: int, gap: int | None, start: int = 0) -> int:
    """Prompts one unit apart, each gone on from ``gap`` later (None for never). Returns the time."""
    now = start
    due: list[tuple[int, int]] = []
    for number in range(count):
        now += UNIT
        while due and due[0][0] <= now:
            when, key = due.pop(0)
            assert returns.began([key], when)
        returns.ended([start + number], now, continued=False)
        if gap is not None:
            due.append((now + gap, start + number))
    return now


def test_without_evidence_the_oldest_promises_least() -> None:
    returns = Returns(UNIT)
    promises = [returns.promise(age, continued=False) for age in AGES]
    assert all(younger > older for younger, older in pairwise(promises))


def test_people_who_come_back_late_make_the_young_promise_less_than_the_old() -> None:
    returns = Returns(UNIT)
    conversations(returns, 1_000, gap=1_000)
    at_once, soon = returns.promise(0, continued=False), returns.promise(700, continued=False)
    assert soon > 1.4 * at_once
    assert returns.promise(2_500, continued=False) < at_once, "whoever hasn't come by then won't"


def test_people_who_come_back_at_once_make_the_oldest_promise_least() -> None:
    returns = Returns(UNIT)
    conversations(returns, 1_000, gap=50)
    promises = [returns.promise(age, continued=False) for age in AGES]
    assert promises[0] == max(promises)
    assert promises[0] > 10 * promises[2]


def test_kinds_are_learned_apart() -> None:
    returns = Returns(UNIT)
    conversations(returns, 500, gap=200)
    assert returns.promise(0, continued=False) > 2 * returns.promise(0, continued=True)


def test_where_many_go_on_from_is_no_end_of_a_conversation() -> None:
    returns = Returns(UNIT)
    returns.ended(["system prompt"], 0, continued=False)
    assert [returns.began(["longer", "system prompt"], now) for now in (1, 2, 3, 4)] == [True, True, False, False]


def test_the_longest_known_prefix_counts() -> None:
    returns = Returns(UNIT)
    returns.ended(["end", "checkpoint"], 0, continued=False)
    assert returns.began(["unknown", "end", "checkpoint"], 10)
    assert returns.began(["checkpoint"], 20), "both belong to one prompt, which was counted already"
    assert not returns.began(["checkpoint"], 30)


@given(
    st.lists(st.tuples(st.integers(0, 60), st.booleans(), st.integers(0, 5_000)), max_size=300),
    st.integers(1, 10_000),
)
def test_promises_stay_finite_and_positive(steps: list[tuple[int, bool, int]], unit: int) -> None:
    returns, now = Returns(unit), 0
    for key, ends, pause in steps:
        now += pause
        if ends:
            returns.ended([key], now, continued=bool(key % 2))
        else:
            returns.began([key], now)
    for continued in (False, True):
        for age in AGES:
            assert 0 < returns.promise(age, continued=continued) < 1e6


class Late(Returns):
    """Everybody comes back, but late."""

    def __init__(self) -> None:
        super().__init__(1)

    def promise(self, age: int, *, continued: bool) -> float:
        return float(age)


def left(arena: Arena, name: str) -> list[int]:
    """A request comes, leaves one extent in the cache and goes."""
    arena.start(name, continued=False)
    blocks = arena.allocate(0, 2, request=name)
    arena.release(0, blocks, keep=[Keep.YES] * 2, request=name)
    arena.finish(name)
    return blocks


def test_the_youngest_goes_where_all_come_back_late() -> None:
    arena = Arena.elastic(Geometry(20, (Cut(10, 10, 2),)), 4, policy=ExpectedReturn(Late()))
    first, second, third = (left(arena, name) for name in ("first", "second", "third"))
    fourth = left(arena, "fourth")
    assert fourth == third, "it took the place of the youngest"
    assert set(arena.pools[0].kept()) == {*first, *second, *fourth}


def test_what_running_requests_left_goes_last() -> None:
    arena = Arena.elastic(Geometry(20, (Cut(10, 10, 2),)), 4, policy=ExpectedReturn(Late()))
    arena.start("running", continued=False)
    early = arena.allocate(0, 2, request="running")
    arena.release(0, early, keep=[Keep.YES] * 2, request="running")
    left(arena, "first")
    left(arena, "second")
    arena.allocate(0, 4)
    assert set(arena.pools[0].kept()) == set(early)
    arena.allocate(0, 2)
    assert not set(arena.pools[0].kept())


def test_the_record_of_ends_has_a_bound() -> None:
    """The oldest is forgotten first, and nobody is found to have come back to it."""
    returns = Returns(UNIT)
    for key in range(5_000):
        returns.ended([key], key, continued=False)
    assert not returns.began([0], 5_000)
    assert returns.began([4_999], 5_000)
    assert returns.began([5_000 - 4_096], 5_000)

"""Learning when prompts are gone on from, and what the policy makes of it."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, strategies as st

from tidepool.cache import Arena, Cut, ExpectedReturn, Geometry, Keep, Returns, Turn

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
            assert returns.began([key], when) == (0, Turn.SECOND)
        returns.ended([(start + number, 0)], now, Turn.FIRST)
        if gap is not None:
            due.append((now + gap, start + number))
    return now


def test_without_evidence_the_oldest_promises_least() -> None:
    returns = Returns(UNIT)
    promises = [returns.promise(age, Turn.FIRST) for age in AGES]
    assert all(younger > older for younger, older in pairwise(promises))


def test_people_who_come_back_late_make_the_young_promise_less_than_the_old() -> None:
    returns = Returns(UNIT)
    conversations(returns, 1_000, gap=1_000)
    at_once, soon = returns.promise(0, Turn.FIRST), returns.promise(700, Turn.FIRST)
    assert soon > 1.4 * at_once
    assert returns.promise(2_500, Turn.FIRST) < at_once, "whoever hasn't come by then won't"


def test_people_who_come_back_at_once_make_the_oldest_promise_least() -> None:
    returns = Returns(UNIT)
    conversations(returns, 1_000, gap=50)
    promises = [returns.promise(age, Turn.FIRST) for age in AGES]
    assert promises[0] == max(promises)
    assert promises[0] > 10 * promises[2]


def test_first_turns_are_learned_apart() -> None:
    returns = Returns(UNIT)
    conversations(returns, 500, gap=200)
    assert returns.promise(0, Turn.FIRST) > 2 * returns.promise(0, Turn.SECOND)


def test_later_turns_begin_with_what_is_known_of_second_ones() -> None:
    """And are then learned apart."""
    returns, now = Returns(UNIT), 0
    before = returns.promise(0, Turn.LATER)
    for number in range(500):
        now += 10 * UNIT
        returns.ended([(number, 0)], now, Turn.SECOND)
        assert returns.began([number], now + UNIT) == (0, Turn.LATER)
    second, later = returns.promise(0, Turn.SECOND), returns.promise(0, Turn.LATER)
    assert second > 2 * before
    assert later > 0.9 * second
    for number in range(500, 10_000):
        now += 10 * UNIT
        returns.ended([(number, 0)], now, Turn.LATER)
    assert returns.promise(0, Turn.SECOND) > 10 * returns.promise(0, Turn.LATER)


def test_turns_are_counted() -> None:
    returns = Returns(UNIT)
    turn = Turn.FIRST
    for number, expected in enumerate((Turn.SECOND, Turn.LATER, Turn.LATER)):
        returns.ended([(number, 0), (-number - 1, 5)], 0, turn)
        assert returns.began([-number - 1], 1) == (5, Turn.FIRST), "it parts from the earlier one, and begins anew"
        before, turn = returns.began([number], 1)
        assert (before, turn) == (0, expected)


def test_where_many_go_on_from_is_no_end_of_a_conversation() -> None:
    returns = Returns(UNIT)
    returns.ended([("system prompt", 0)], 0, Turn.FIRST)
    assert [returns.began(["longer", "system prompt"], now)[0] for now in (1, 2, 3, 4)] == [0, 0, None, None]


def test_the_longest_known_prefix_counts() -> None:
    returns = Returns(UNIT)
    returns.ended([("end", 0), ("checkpoint", 5)], 0, Turn.FIRST)
    assert returns.began(["unknown", "end", "checkpoint"], 10)[0] == 0
    assert returns.began(["checkpoint"], 20)[0] == 5, "both belong to one prompt, which was counted already"
    assert returns.began(["checkpoint"], 30)[0] is None


def test_ends_are_forgotten_in_the_order_in_which_they_came() -> None:
    returns = Returns(UNIT)
    for number in range(20_000):
        returns.ended([(number, 0)], number, Turn.FIRST)
    assert returns.began([0], 20_000)[0] is None
    assert returns.began([19_999], 20_000)[0] == 0


@given(
    st.lists(st.tuples(st.integers(0, 60), st.booleans(), st.integers(0, 5_000)), max_size=300),
    st.integers(1, 10_000),
)
def test_promises_stay_finite_and_positive(steps: list[tuple[int, bool, int]], unit: int) -> None:
    returns, now = Returns(unit), 0
    for key, ends, pause in steps:
        now += pause
        if ends:
            returns.ended([(key, 0), (key + 100, 1)], now, Turn(key % 3))
        else:
            returns.began([key], now)
    for turn in Turn:
        for age in AGES:
            assert 0 < returns.promise(age, turn) < 1e6


class Late(Returns):
    """Everybody comes back, but late."""

    def __init__(self) -> None:
        super().__init__(1)

    def promise(self, age: int, turn: Turn) -> float:
        return float(age)


def left(arena: Arena, name: str) -> list[int]:
    """A request comes, leaves one extent in the cache and goes."""
    arena.start(name, Turn.FIRST)
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
    arena.start("running", Turn.FIRST)
    early = arena.allocate(0, 2, request="running")
    arena.release(0, early, keep=[Keep.YES] * 2, request="running")
    left(arena, "first")
    left(arena, "second")
    arena.allocate(0, 4)
    assert set(arena.pools[0].kept()) == set(early)
    arena.allocate(0, 2)
    assert not set(arena.pools[0].kept())

"""Learning when prompts are continued, and what the policy makes of it."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, strategies as st
from reference import ReturnAccount

from tidepool.cache import (
    Arena,
    ExpectedReturn,
    ExtentLayout,
    Geometry,
    PrefixMatch,
    ResumePoint,
    Retention,
    ReuseModel,
    TurnClass,
    reuse,
)

UNIT = 100
AGES = [0, 150, 300, 600, 1_200, 2_400, 4_800, 9_600]


def end(returns: ReuseModel, key: object, now: int, turn: TurnClass = TurnClass.FIRST, shared: object = None) -> None:
    """A prompt was served, which can be continued from its end only."""
    returns.ended([ResumePoint(key, 0, kept=True)], now, PrefixMatch(turn, shared=shared))


def conversations(returns: ReuseModel, count: int, gap: int | None, start: int = 0) -> int:
    """Prompts one unit apart, each continued ``gap`` later (None for never). Returns the time."""
    now = start
    due: list[tuple[int, int]] = []
    for number in range(count):
        now += UNIT
        while due and due[0][0] <= now:
            when, key = due.pop(0)
            assert returns.began([key], when) == PrefixMatch(TurnClass.SECOND, 0)
        end(returns, start + number, now)
        if gap is not None:
            due.append((now + gap, start + number))
    return now


def test_without_evidence_the_oldest_promises_least() -> None:
    returns = ReuseModel(UNIT)
    indices = [returns.reuse_index(age, TurnClass.FIRST) for age in AGES]
    assert all(younger > older for younger, older in pairwise(indices))


def test_people_who_come_back_late_make_the_young_promise_less_than_the_old() -> None:
    returns = ReuseModel(UNIT)
    conversations(returns, 1_000, gap=1_000)
    at_once, soon = returns.reuse_index(0, TurnClass.FIRST), returns.reuse_index(700, TurnClass.FIRST)
    assert soon > 1.4 * at_once
    assert returns.reuse_index(2_500, TurnClass.FIRST) < at_once, "whoever hasn't come by then won't"


def test_people_who_come_back_at_once_make_the_oldest_promise_least() -> None:
    returns = ReuseModel(UNIT)
    conversations(returns, 1_000, gap=50)
    indices = [returns.reuse_index(age, TurnClass.FIRST) for age in AGES]
    assert indices[0] == max(indices)
    assert indices[0] > 10 * indices[2]


def test_first_turns_are_learned_apart() -> None:
    returns = ReuseModel(UNIT)
    conversations(returns, 500, gap=200)
    assert returns.reuse_index(0, TurnClass.FIRST) > 2 * returns.reuse_index(0, TurnClass.SECOND)


def test_later_turns_begin_with_what_is_known_of_second_ones() -> None:
    """And are then learned apart."""
    returns, now = ReuseModel(UNIT), 0
    before = returns.reuse_index(0, TurnClass.LATER)
    for number in range(500):
        now += 10 * UNIT
        end(returns, number, now, TurnClass.SECOND)
        assert returns.began([number], now + UNIT) == PrefixMatch(TurnClass.LATER, 0)
    second, later = returns.reuse_index(0, TurnClass.SECOND), returns.reuse_index(0, TurnClass.LATER)
    assert second > 2 * before
    assert later > 0.9 * second
    for number in range(500, 3_000):
        now += 10 * UNIT
        end(returns, number, now, TurnClass.LATER)
    assert returns.reuse_index(0, TurnClass.SECOND) > 10 * returns.reuse_index(0, TurnClass.LATER)


def test_turns_are_counted() -> None:
    returns = ReuseModel(UNIT)
    turn = TurnClass.FIRST
    for number, expected in enumerate((TurnClass.SECOND, TurnClass.LATER, TurnClass.LATER)):
        places = [ResumePoint(number, 0, kept=True), ResumePoint(-number - 1, 5, kept=True)]
        returns.ended(places, 0, PrefixMatch(turn))
        parted = returns.began([-number - 1], 1)
        assert parted == PrefixMatch(TurnClass.FIRST, 5, -number - 1), "it parts from the earlier one, and begins anew"
        match = returns.began([number], 1)
        assert match == PrefixMatch(expected, 0)
        turn = match.turn


def test_where_many_go_on_from_is_a_trunk() -> None:
    returns = ReuseModel(UNIT)
    end(returns, "system prompt", 0)
    matches = [returns.began(["longer", "system prompt"], now) for now in (1, 2, 3, 4)]
    assert matches[:2] == [PrefixMatch(TurnClass.SECOND, 0)] * 2
    assert matches[2:] == [PrefixMatch(TurnClass.FIRST, shared="system prompt")] * 2


def test_the_longest_known_prefix_counts() -> None:
    returns = ReuseModel(UNIT)
    returns.ended(
        [ResumePoint("end", 0, kept=True), ResumePoint("checkpoint", 5, kept=True)], 0, PrefixMatch(TurnClass.FIRST)
    )
    assert returns.began(["unknown", "end", "checkpoint"], 10).distance == 0
    assert returns.began(["checkpoint"], 20).distance == 5
    assert returns.began(["checkpoint"], 30).distance == 5
    assert returns.began(["checkpoint"], 40).distance is None


def test_a_trunk_waits_for_a_return_each_time_that_it_was_used() -> None:
    """Also where the prompts that use it end far behind it, and one that happens to end there changes nothing."""
    returns, now = ReuseModel(UNIT), 0
    end(returns, "document", 0)
    before = [returns.reuse_index(age, TurnClass.NONE) for age in AGES]
    for number in range(400):
        now += 3 * UNIT
        match = returns.began([number, "document"], now)
        if number >= 2:
            assert match == PrefixMatch(TurnClass.FIRST, shared="document")
        key = "document" if number % 7 == 0 else number
        end(returns, key, now, match.turn, match.shared)
    after = [returns.reuse_index(age, TurnClass.NONE) for age in AGES]
    assert after[1] > 4 * before[1], "every three units somebody asks about it"
    assert after[-1] < 1.1 * before[-1]
    assert returns.reuse_index(0, TurnClass.FIRST) < 0.1 * after[1], "nobody asks about the prompts that go on from it"


def test_a_document_asked_about_again_and_again_is_no_dead_end() -> None:
    """Two questions about each, one after another, end where the document does: each is a return to what the
    one before left, and from the second question on the document counts as a trunk."""
    returns, now = ReuseModel(UNIT), 0
    for document in range(300):
        now += 20 * UNIT
        end(returns, document, now)
        for _ in range(2):
            now += 2 * UNIT
            match = returns.began([document], now)
            end(returns, document, now, match.turn)
    assert returns.reuse_index(0, TurnClass.FIRST) > 0.2
    assert returns.reuse_index(0, TurnClass.SECOND) > 0.2
    assert returns.reuse_index(0, TurnClass.NONE) < 0.05, "the third question is the last"


def test_where_nothing_is_left_no_return_is_counted() -> None:
    """But it is known from then on where prompts part."""
    left, nothing = ReuseModel(UNIT), ReuseModel(UNIT)
    for number in range(200):
        for returns, kept in ((left, True), (nothing, False)):
            now = number * 10 * UNIT
            returns.ended(
                [ResumePoint(number, 0, kept=True), ResumePoint(-1 - number, 512, kept)],
                now,
                PrefixMatch(TurnClass.FIRST),
            )
            assert returns.began([-1 - number], now + UNIT) == PrefixMatch(TurnClass.FIRST, 512, -1 - number)
    assert left.reuse_index(0, TurnClass.FIRST) > 10 * nothing.reuse_index(0, TurnClass.FIRST)


def test_a_place_that_a_later_prompt_passes_stays_what_it_is() -> None:
    returns = ReuseModel(UNIT)
    end(returns, "first turn", 0, TurnClass.LATER)
    returns.ended(
        [ResumePoint("second turn", 0, kept=True), ResumePoint("first turn", 512, kept=False)],
        1,
        PrefixMatch(TurnClass.LATER),
    )
    assert returns.began(["first turn"], 2) == PrefixMatch(TurnClass.LATER, 0)


def test_ends_are_forgotten_in_the_order_in_which_they_came(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reuse, "_REMEMBERED", 100)
    returns = ReuseModel(UNIT)
    for number in range(150):
        end(returns, number, number)
    assert [number for number in range(150) if returns.began([number], 200).distance is None] == list(range(50))


def test_no_wait_outlives_its_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often places are used anew, no more is remembered than places."""
    monkeypatch.setattr(reuse, "_REMEMBERED", 400)
    returns = ReuseModel(UNIT)
    for number in range(2_000):
        key = number % 50 if number % 2 else number
        end(returns, key, number)
    assert len(returns._waits) <= len(returns._places) == 400
    assert all(wait.places > 0 for wait in returns._waits)


@pytest.mark.parametrize("seed", range(40))
def test_the_model_agrees_with_a_slow_account_of_all_returns(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    remembered = rng.choice([4, 8, 100])
    monkeypatch.setattr(reuse, "_REMEMBERED", remembered)
    monkeypatch.setattr(reuse, "_LEARN_EVERY", 1)
    unit = rng.choice([1, 7, 100])
    model, account = ReuseModel(unit), ReturnAccount(unit)
    now = 0
    for _ in range(60):
        now += rng.choice([0, 1, unit, rng.randrange(8 * unit), rng.randrange(3_000 * unit)])
        keys = [rng.randrange(10) for _ in range(rng.randint(0, 2))]
        match = model.began(keys, now)
        assert (match.turn, match.distance, match.shared, match.place) == account.began(keys, now)
        now += rng.choice([0, rng.randrange(2 * unit)])
        points = [ResumePoint(rng.randrange(10), rng.choice([0, 0, 5]), kept=rng.random() < 0.8) for _ in range(3)]
        model.ended(points, now, match)
        account.ended(points, now, match, remembered)
        assert list(model._places) == list(account.places)
        turn, age = rng.choice(list(TurnClass)), rng.choice([0, unit - 1, unit, 2 ** rng.randrange(13) * unit])
        assert model.reuse_index(age, turn) == pytest.approx(account.index(age, turn, now), rel=1e-9)


def test_the_table_is_made_anew_once_in_so_many_prompts() -> None:
    model = ReuseModel(UNIT)
    before = model.reuse_index(0, TurnClass.FIRST)
    changed = []
    for number in range(1, 2 * reuse._LEARN_EVERY + 1):
        end(model, "key", number * UNIT)
        if (after := model.reuse_index(0, TurnClass.FIRST)) != before:
            changed.append(number)
            before = after
    assert changed == [reuse._LEARN_EVERY, 2 * reuse._LEARN_EVERY]


@given(
    st.lists(st.tuples(st.integers(0, 60), st.booleans(), st.integers(0, 5_000)), max_size=300),
    st.integers(1, 10_000),
)
def test_promises_stay_finite_and_positive(steps: list[tuple[int, bool, int]], unit: int) -> None:
    returns, now, match = ReuseModel(unit), 0, PrefixMatch(TurnClass.FIRST)
    for key, ends, pause in steps:
        now += pause
        if ends:
            places = [ResumePoint(key, 0, kept=True), ResumePoint(key + 10, 1, kept=key % 2 > 0)]
            returns.ended(places, now, match)
        else:
            match = returns.began([key], now)
    for turn in TurnClass:
        for age in AGES:
            assert 0 < returns.reuse_index(age, turn) < 1e6


class Late(ReuseModel):
    """Everybody comes back, but late."""

    def __init__(self) -> None:
        super().__init__(1)

    def reuse_index(self, age: int, turn: TurnClass) -> float:
        return float(age)


def left(arena: Arena, name: str) -> list[int]:
    """A request comes, leaves one extent in the cache and goes."""
    arena.start(name, TurnClass.FIRST)
    blocks = arena.allocate(0, 2, request=name)
    arena.release(0, blocks, keep=[Retention.KEEP] * 2, request=name)
    arena.finish(name)
    return blocks


def test_the_youngest_goes_where_all_come_back_late() -> None:
    arena = Arena.elastic(Geometry(20, (ExtentLayout(10, 10, 2),)), 4, policy=ExpectedReturn(Late()))
    first, second, third = (left(arena, name) for name in ("first", "second", "third"))
    fourth = left(arena, "fourth")
    assert fourth == third, "it took the place of the youngest"
    assert set(arena.pools[0].kept()) == {*first, *second, *fourth}


class Valley(ReuseModel):
    """Nobody comes back after 40 bytes, and later again some do."""

    def reuse_index(self, age: int, turn: TurnClass) -> float:
        return 0.0 if age == 40 else float(age)


def test_only_the_oldest_and_the_youngest_are_compared() -> None:
    arena = Arena.elastic(Geometry(20, (ExtentLayout(10, 10, 2),)), 4, policy=ExpectedReturn(Valley(1)))
    _, _, third = (left(arena, name) for name in ("first", "second", "third"))
    assert left(arena, "fourth") == third


def test_what_running_requests_left_goes_last() -> None:
    arena = Arena.elastic(Geometry(20, (ExtentLayout(10, 10, 2),)), 4, policy=ExpectedReturn(Late()))
    arena.start("running", TurnClass.FIRST)
    early = arena.allocate(0, 2, request="running")
    arena.release(0, early, keep=[Retention.KEEP] * 2, request="running")
    left(arena, "first")
    left(arena, "second")
    arena.allocate(0, 4)
    assert set(arena.pools[0].kept()) == set(early)
    arena.allocate(0, 2)
    assert not set(arena.pools[0].kept())


def test_a_broken_leaf_goes_as_a_whole() -> None:
    arena = Arena.elastic(Geometry(40, (ExtentLayout(10, 10, 4),)), 2, policy=ExpectedReturn(Late()))
    _, *cached = arena.allocate(0, 4)
    arena.release(0, cached, keep=[Retention.KEEP] * 3)
    broken = arena.allocate(0, 1)
    assert broken == cached[:1]
    arena.release(0, broken, keep=[Retention.LOW])
    assert sorted(arena.allocate(0, 2)) == cached[1:], "what is of little use came later"

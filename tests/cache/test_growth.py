"""What running requests will still need."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, strategies as st

from tidepool.cache import AnswerLengths, GroupGrowth, Growth, Outlook, headroom
from tidepool.cache.pool import Pool


def test_answers_are_expected_to_get_as_long_as_most_did() -> None:
    answers = AnswerLengths()
    assert answers.expected() == 256, "before any has ended"
    assert answers.usual() == 0, "likewise"
    rng = random.Random(0)
    lengths = [rng.randint(10, 90) for _ in range(2_000)]
    for tokens in lengths:
        answers.ended(tokens)
    longer = sum(tokens > answers.expected() for tokens in lengths)
    assert 0.1 < longer / len(lengths) < 0.25
    for _ in range(2_000):
        answers.ended(1_000)
    assert answers.expected() > 900, "older ones fade"


@pytest.mark.parametrize("others", [510, 511, 512, 767, 768])
def test_answers_weigh_half_after_512(others: int) -> None:
    """One of 2,000 tokens among others of 10: the mean and one deviation more, of counts that halve at 512, 768, ..."""
    answers = AnswerLengths()
    answers.ended(2_000)
    count, total, squares = 1.0, 2_000.0, 4e6
    for _ in range(others):
        answers.ended(10)
        count, total, squares = count + 1, total + 10, squares + 100
        if count >= 512:
            count, total, squares = count / 2, total / 2, squares / 2
    assert answers.expected() == int(total / count + (squares / count - (total / count) ** 2) ** 0.5)
    assert answers.usual() == int(total / count)
    assert answers._count == count


numbers = st.integers(0, 90)
outlooks = st.builds(Outlook, st.tuples(st.integers(0, 2), numbers), numbers, st.tuples(st.integers(0, 2), numbers))
changes = st.lists(st.tuples(st.sampled_from("abc"), st.one_of(st.none(), outlooks)), max_size=40)


@given(changes)
def test_sums_are_those_of_the_requests_under_way(changes: list[tuple[str, Outlook | None]]) -> None:
    growth, expected = Growth([GroupGrowth(0), GroupGrowth(16)]), dict[str, Outlook]()
    for request, outlook in changes:
        if outlook is None:
            growth.end(request)
            expected.pop(request, None)
        else:
            growth.set(request, outlook)
            expected[request] = outlook
        assert growth.blocks == [sum(growth.total(each)[group] for each in expected.values()) for group in (0, 1)]
        assert bool(growth) == bool(expected)
        assert all((name in growth) == (name in expected) for name in "abc")


@given(st.lists(outlooks, max_size=12), outlooks)
def test_needs_are_what_a_run_token_by_token_takes(running: list[Outlook], waiting: Outlook) -> None:
    growth = Growth([GroupGrowth(0), GroupGrowth(1)])
    for number, outlook in enumerate(running):
        growth.set(str(number), outlook)
    everyone = [*running, waiting]
    taken = []
    for tokens in range(91):
        alive = [each for each in everyone if each.answer_tokens >= tokens]
        freed = [sum(each.frees[group] for each in everyone if each.answer_tokens < tokens) for group in (0, 1)]
        soon = [sum(each.soon[group] for each in alive) for group in (0, 1)]
        taken.append([soon[0] - freed[0], soon[1] - freed[1] + tokens * len(alive)])
    needs = growth.needs(waiting)
    assert max(each[1] for each in needs) == max(each[1] for each in taken)
    assert max(each[0] for each in needs) == max(each[0] for each in taken)


def test_many_requests_cost_few_moments() -> None:
    growth = Growth([GroupGrowth(0), GroupGrowth(16)])
    for number in range(256):
        growth.set(str(number), Outlook((0, 4), number, (1, 40)))
    assert len(growth.needs(Outlook((0, 0), 10, (1, 10)))) <= 18


def test_requests_that_end_one_after_the_other_need_less_than_all_at_once() -> None:
    growth = Growth([GroupGrowth(0), GroupGrowth(16)])
    for number in range(20):
        growth.set(str(number), Outlook((0, 0), 16 * number, (1, 100)))
    waiting = Outlook((0, 0), 0, (1, 100))
    assert growth.blocks == [0, 190]
    assert max(each[1] for each in growth.needs(waiting)) < 20


@pytest.mark.parametrize(
    ("tokens", "found", "expected", "why"),
    [
        (20, (0, 0, 0), Outlook((2, 5, 1), 60, (1, 2, 2)), "its prompt's rest, behind a window at most 3 blocks"),
        (20, (1, 1, 2), Outlook((2, 5, 1), 60, (1, 1, 0)), "what it found cached others may use, too"),
        (100, (0, 0, 0), Outlook((0, 0, 0), 60, (1, 7, 3)), "its prompt is read"),
        (130, (0, 0, 0), Outlook((0, 0, 0), 30, (1, 9, 3)), "half of its answer is there"),
        (200, (0, 0, 0), Outlook((0, 0, 0), 0, (1, 13, 3)), "it gets longer than expected"),
    ],
)
def test_what_a_request_will_still_take(tokens: int, found: tuple[int, ...], expected: Outlook, why: str) -> None:
    growth = Growth([GroupGrowth(0), GroupGrowth(16), GroupGrowth(16, most=3)])
    growth.expect("request", 100, 160)
    growth.found("request", found)
    assert growth.outlook("request", tokens, states_to_come=2) == expected, why


def test_nothing_is_expected_of_a_request_that_ended() -> None:
    growth = Growth([GroupGrowth(0), GroupGrowth(16)])
    growth.expect("request", 100, 160)
    growth.found("request", (0, 3))
    growth.end("request")
    assert growth.outlook("request", 48, states_to_come=2) == Outlook((0, 0), 0, (1, 3))


def test_headroom_is_an_eighth_of_the_extents_that_attention_pins() -> None:
    def pool(pinned: int) -> Pool:
        made = Pool(4, 400)
        for number in range(pinned):
            made.take(made.add(number), 1, None)
        return made

    assert [headroom([pool(count)]) for count in (0, 7, 8, 17)] == [0, 0, 1, 2]
    assert headroom([pool(5), pool(12)]) == 2


def test_each_request_takes_half_a_block_more_on_average() -> None:
    growth = Growth([GroupGrowth(0), GroupGrowth(16)])
    assert growth.needs(Outlook((0, 0), 64, (1, 0))) == [[0, 5]], "64 tokens and 8"


def test_answers_of_one_length_are_expected_to_be_as_long() -> None:
    answers = AnswerLengths()
    for _ in range(10):
        answers.ended(10)
    assert answers.expected() == 10

"""Where a prompt leaves checkpoints, and where its steps end for them."""

from __future__ import annotations

import pytest
from hypothesis import example, given, strategies as st

from tidepool.cache import CheckpointRules, Checkpoints, FarPlaces, PromptEnds, Resumed, plan_checkpoints

SPACING = 512
CUTS = CheckpointRules(unit=16, spacing=SPACING, stock_block=528)
"""Layers that keep a state at a step's end only, where stock vLLM's block is of 528 tokens."""
WITHIN = CheckpointRules(unit=16, spacing=SPACING, within=1, column=128)
"""Layers that can save a state inside a step."""


def known(prompt_tokens: int, from_end: int = 0, from_checkpoint: int = 0, never: int = 0) -> PromptEnds:
    """Prompts of a length of which so many were continued, or never."""
    ends = PromptEnds(SPACING, lifetime=1)
    for number in range(from_end + from_checkpoint + never):
        ends.ended(prompt_tokens, ("end", number), ("checkpoint", number), now=0)
    for number in range(from_end):
        assert ends.began(("end", number)) == Resumed.END
    for number in range(from_end, from_end + from_checkpoint):
        assert ends.began(("checkpoint", number)) == Resumed.CHECKPOINT
    ends.ended(prompt_tokens, "last", None, now=2)
    return ends


NOTHING = PromptEnds(SPACING, 1)


@pytest.mark.parametrize(
    ("rules", "ends", "prompt", "computed", "branches", "cuts", "within"),
    [
        # A short prompt takes one step until its like come back.
        (CUTS, NOTHING, 400, 0, (), (), 0),
        (CUTS, known(400, never=200), 400, 0, (), (), 0),
        (CUTS, known(400, from_end=150, never=50), 400, 0, (), (384,), 0),
        (CUTS, known(100, from_end=200), 40, 0, (), (), 0),
        # Where stock vLLM cuts, one cut is free: at the place that saves most.
        (CUTS, NOTHING, 1_000, 0, (), (512,), 0),
        (CUTS, known(1_000, from_end=200), 1_000, 0, (), (992,), 0),
        (CUTS, known(1_000, from_end=100, from_checkpoint=100), 1_000, 0, (), (512, 992), 0),
        (CUTS, NOTHING, 1_000, 512, (), (), 0),
        # Long prompts leave a state at their last checkpoint alone.
        (CUTS, known(5_000, from_end=200), 5_000, 0, (), (4_608,), 0),
        (CUTS, NOTHING, 5_000, 4_608, (), (), 0),
        # Inside a step a state costs nothing: the end of prompts, the last checkpoint of long ones.
        (WITHIN, NOTHING, 400, 0, (), (), 384),
        (WITHIN, NOTHING, 1_000, 0, (), (), 992),
        (WITHIN, known(1_000, from_checkpoint=200), 1_000, 0, (), (512,), 0),
        (WITHIN, known(1_000, from_end=100, from_checkpoint=100), 1_000, 0, (), (512,), 992),
        (WITHIN, NOTHING, 5_000, 0, (), (), 4_608),
        # It needs two columns, and a start that workers can tell the place from.
        (WITHIN, NOTHING, 120, 0, (), (), 0),
        (WITHIN, NOTHING, 1_000, 904, (), (), 0),
        # Branches are always cut.
        (CUTS, NOTHING, 400, 0, (96,), (96,), 0),
        (WITHIN, NOTHING, 5_000, 0, (2_000,), (2_000,), 4_608),
        (CUTS, NOTHING, 5_000, 2_048, (2_000,), (4_608,), 0),
    ],
)
def test_where_states_are_left(
    rules: CheckpointRules,
    ends: PromptEnds,
    prompt: int,
    computed: int,
    branches: tuple[int, ...],
    cuts: tuple[int, ...],
    within: int,
) -> None:
    plan = plan_checkpoints(rules, ends, prompt, computed, branches)
    assert (plan.cuts, plan.within) == (cuts, within)
    assert all(place in plan for place in cuts)
    assert 0 not in plan


def test_a_conversation_is_cut_at_its_end_from_its_second_turn_on() -> None:
    assert plan_checkpoints(CUTS, NOTHING, 400, 128, resumed=Resumed.END).cuts == (384,)
    assert plan_checkpoints(CUTS, NOTHING, 1_000, 400, resumed=Resumed.END).cuts == (992,)


def answered(prompt_tokens: int, *, from_answer: int, from_end: int = 0) -> PromptEnds:
    """Prompts of a length that were continued from their answers, and from their ends."""
    ends = PromptEnds(SPACING, lifetime=1)
    for number in range(from_answer + from_end):
        ends.ended(prompt_tokens, ("end", number), None, 0, ("answer", number))
        assert ends.began(("answer" if number < from_answer else "end", number)) >= Resumed.END
    return ends


@pytest.mark.parametrize(
    ("ends", "moves", "cuts", "why"),
    [
        (answered(400, from_answer=20), True, (), "the state of the last turn moves on into its answer"),
        (answered(400, from_answer=20), False, (384,), "it can't"),
        (answered(400, from_answer=20, from_end=20), True, (384,), "answers don't come back so often"),
        (answered(400, from_answer=4), True, (384,), "it isn't known well enough"),
    ],
)
def test_a_prompt_isnt_cut_at_its_end_where_its_answer_will_have_the_state(
    ends: PromptEnds, moves: bool, cuts: tuple[int, ...], why: str
) -> None:
    assert plan_checkpoints(CUTS, ends, 400, 256, (), Resumed.ANSWER, moves=moves).cuts == cuts, why


def test_the_end_has_low_priority_where_it_saves_little() -> None:
    plan = plan_checkpoints(CUTS, known(1_100, from_end=80, from_checkpoint=120), 1_500, 0)
    assert plan.cuts == (1_024, 1_488)
    assert plan.low == {1_488}
    assert plan.last == 1_024


def test_a_drafter_reads_one_unit_more_than_it_gets() -> None:
    """Asked again, a prompt of 2,070 tokens has 2,048 of them hit only where 2,064 are found."""
    drafter = CheckpointRules(unit=16, spacing=SPACING, ahead=16)
    assert [drafter.last_places(tokens)[1] for tokens in (2_063, 2_064, 2_100)] == [1_536, 2_048, 2_048]
    assert [CUTS.last_places(tokens)[1] for tokens in (2_048, 2_049)] == [1_536, 2_048]


@pytest.mark.parametrize("ahead", [0, 16, 32])
def test_what_is_asked_again_finds_one_block_more_than_it_hits(ahead: int) -> None:
    for unit in (16, 32, 512):
        rules = CheckpointRules(unit=unit, spacing=512, ahead=ahead)
        for tokens in range(1, 1_700):
            found = tokens // ahead * ahead if ahead else tokens
            fits = [place for place in range(0, tokens, unit) if place + (ahead or 1) <= found]
            assert rules.last_places(tokens)[0] == max(fits, default=0), tokens


def test_prompts_count_once_and_only_when_they_are_settled() -> None:
    ends = PromptEnds(SPACING, lifetime=100)
    ends.ended(400, "a", None, now=0)
    ends.ended(400, "b", None, now=50)
    assert ends.from_end(400) == 0
    assert ends.began("a") == Resumed.END
    share = ends.from_end(400)
    assert ends.began("a") == Resumed.END, "known, but counted already"
    assert ends.from_end(400) == share > 0.3
    ends.ended(400, "c", None, now=140)
    assert ends.from_end(400) == share, "b may still come"
    ends.ended(400, "d", None, now=160)
    assert ends.from_end(400) < share
    assert ends.began("b") == Resumed.NOWHERE
    assert ends.from_end(3_000) == 0, "other lengths are another matter"


def test_shares_are_of_those_settled_and_two_more() -> None:
    ends = answered(400, from_answer=3, from_end=1)
    assert (ends.from_end(400), ends.from_answer(400)) == (4 / 6, 3 / 6)
    assert known(400, from_checkpoint=6).from_checkpoint(400) == 6 / 8
    assert PromptEnds(SPACING, 1).from_answer(400) == 0


def test_a_prompt_may_be_continued_until_its_lifetime_has_passed() -> None:
    ends = PromptEnds(SPACING, lifetime=100)
    ends.ended(400, "first", None, now=0)
    ends.ended(400, "second", None, now=100)
    assert ends.began("first") == Resumed.END
    ends.ended(400, "third", None, now=201)
    assert ends.began("second") == Resumed.NOWHERE


def test_old_counts_fade() -> None:
    ends = known(400, never=1_000)
    for number in range(600):
        ends.ended(400, number, None, now=2)
        ends.began(number)
    assert ends.from_end(400) > 0.8


steps = st.lists(st.integers(1, 3_000), min_size=1, max_size=60)


@example(2_048, [688], WITHIN, 1_552)
@given(st.integers(1, 20_000), steps, st.sampled_from([CUTS, WITHIN]), st.integers(0, 20_000))
def test_a_prompt_progresses_in_every_step_and_stops_at_every_cut(
    prompt: int, budgets: list[int], rules: CheckpointRules, branch: int
) -> None:
    plan = plan_checkpoints(rules, NOTHING, prompt, 0, (branch // 16 * 16,) if branch < prompt else ())
    at = 0
    ends: list[int] = []
    while at < prompt:
        budget = budgets[len(ends) % len(budgets)]
        reached = plan.step_end(rules, at, min(at + budget, prompt), prompt)
        assert at < reached <= min(at + budget, prompt)
        saved = reached == prompt and rules.place_within(at, prompt) == plan.within
        assert not at < plan.within < reached or saved, "a state inside a step is saved only where the layers do"
        at = reached
        ends.append(reached)
    assert set(plan.cuts) <= set(ends)


@given(st.integers(1, 20_000), st.integers(1, 2_000))
def test_a_prompt_takes_no_more_steps_than_its_tokens_and_cuts_do(prompt: int, budget: int) -> None:
    plan = plan_checkpoints(CUTS, NOTHING, prompt, 0)
    at = taken = 0
    while at < prompt:
        at = plan.step_end(CUTS, at, min(at + budget, prompt), prompt)
        taken += 1
    usable = (budget - budget // 4) // 16 * 16 or 1
    assert taken <= -(-prompt // usable) + len(plan.cuts)


def test_far_places_are_one_for_each_doubling_of_the_distance() -> None:
    far = FarPlaces(checkpoint=131_072, nearest=4_096)
    kept = [place for place in range(2_048, 131_072, 2_048) if far.keeps(place)]
    assert kept == [2_048, 67_584, 100_352, 116_736, 124_928]
    assert not any(map(FarPlaces(4_096, 4_096).keeps, range(512, 4_096, 512))), "what is near is learned"


@pytest.mark.parametrize(
    ("start", "end", "reached", "why"),
    [
        (0, 100, 100, "stock vLLM's step isn't cut short"),
        (0, 600, 528, "as stock's"),
        (0, 900, 900, "stock's leaves more than a quarter unused"),
        (0, 1_030, 1_024, "behind the place where stock's ends"),
        (0, 3_000, 2_640, "2,560 would be behind stock's"),
        (500, 600, 600, "528 leaves more than a quarter unused"),
        (440, 540, 528, "as stock's"),
        (3_700, 3_800, 3_800, "two steps are to come"),
        (3_800, 3_950, 3_936, "so that the last step can save a state"),
        (3_840, 3_850, 3_850, "nor would the next step be the last from 3,840"),
        (0, 4_000, 4_000, "the prompt has been read"),
    ],
)
def test_steps_inside_prompts_end_no_earlier_than_stocks(start: int, end: int, reached: int, why: str) -> None:
    rules = CheckpointRules(unit=16, spacing=SPACING, within=1, column=128, stock_block=528)
    assert Checkpoints().step_end(rules, start, end, prompt_end=4_000) == reached, why


def test_steps_are_filled_where_nothing_is_saved_inside_the_last() -> None:
    assert Checkpoints().step_end(CUTS, 3_800, 3_950, prompt_end=4_000) == 3_950


def test_the_users_interval_comes_first() -> None:
    rules = CheckpointRules(unit=16, spacing=SPACING, stock_block=528, interval=256)
    assert [Checkpoints().step_end(rules, start, start + 600, 4_000) for start in (0, 512, 700)] == [512, 1_024, 1_280]
    assert Checkpoints().step_end(rules, 0, 200, 4_000) == 200


def test_a_state_that_the_last_step_cannot_save_takes_a_cut() -> None:
    plan = plan_checkpoints(WITHIN, NOTHING, 1_500, 0)
    assert plan.within == 1_488
    assert plan.step_end(WITHIN, 0, 1_500, 1_500) == 1_500
    assert plan.step_end(WITHIN, 1_408, 1_500, 1_500) == 1_488, "it has no column"
    assert plan.step_end(WITHIN, 1_000, 1_495, 1_500) == 1_488, "it is not the last step"

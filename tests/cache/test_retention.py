"""What requests leave in the cache, and what of it is kept: a table for each rule."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from typing import Any

import pytest

from tidepool.cache import (
    NO_ANSWER_STATE,
    AnswerState,
    Arena,
    CheckpointRules,
    Checkpoints,
    ExpectedReturn,
    ExtentLayout,
    Geometry,
    PrefixMatch,
    Resumed,
    ResumePoint,
    Retention,
    RetentionPolicy,
    ReuseModel,
    TurnClass,
)
from tidepool.cache.retention import BRANCH_POINTS

UNIT = 16
SPACING = 512
CUTS = CheckpointRules(unit=UNIT, spacing=SPACING, stock_block=528)
WITHIN = CheckpointRules(unit=UNIT, spacing=SPACING, within=1, column=128)
DROP, KEEP, LOW = Retention.DROP, Retention.KEEP, Retention.LOW


class Spy(ReuseModel):
    """Remembers what it is told."""

    def __init__(self) -> None:
        super().__init__(1_000)
        self.told: list[tuple[list[ResumePoint], PrefixMatch]] = []

    def ended(self, places: Any, now: int, match: PrefixMatch, tokens: int = 0) -> None:
        self.told.append((list(places), match))
        super().ended(places, now, match, tokens)


def policy(rules: CheckpointRules = CUTS, extents: int = 17) -> RetentionPolicy:
    """A policy over two groups in extents of 100 bytes, all but the null extent unowned."""
    reuse = Spy()
    geometry = Geometry(100, (ExtentLayout(50, 50, 2), ExtentLayout(20, 20, 5)))
    arena = Arena.elastic(geometry, extents, policy=ExpectedReturn(reuse))
    return RetentionPolicy(rules, reuse, arena, key_tokens=UNIT, state_tokens=100.0)


def keys(text: str, tokens: int, *, after: str = "", shared: int = 0) -> list[str]:
    """Keys of a prompt that begins like ``after`` for ``shared`` tokens."""
    return [f"{after if end <= shared else text} {end}" for end in range(UNIT, tokens + 1, UNIT)]


def serve(
    retention: RetentionPolicy, name: str, prompt: list[str], tokens: int, *, state_at: int | None = None
) -> None:
    """A request comes, leaves a state and ends."""
    retention.plan(name, prompt, tokens, 0, 0)
    if state_at is not None:
        retention.state_at(name, state_at)
    last = retention.release(name)
    retention.end(name, prompt, tokens, tokens, last)


# Requests.


def test_a_prompt_is_looked_up_once() -> None:
    retention = policy()
    serve(retention, "first", keys("a", 640), 640, state_at=512)
    prompt = keys("b", 800, after="a", shared=640)
    record = retention.begin("second", prompt)
    assert (record.match.turn, record.resumed, record.continues) == (TurnClass.SECOND, Resumed.END, True)
    assert retention.begin("second", prompt) is record
    assert retention.reuse.began(prompt[::-1], 0).turn == TurnClass.SECOND, "one more use; a third would be shared"


@pytest.mark.parametrize(
    ("tokens", "branch", "continues", "planned", "why"),
    [
        (900, 320, False, 320, "a branch point gets a checkpoint"),
        (900, 328, False, 320, "where a hit can end"),
        (900, 8, False, 0, "not where none can"),
        (900, 320, True, 320, "also of a conversation, if it is short"),
        (6_000, 3_200, False, 3_200, "also far into a prompt"),
        (6_000, 3_200, True, 0, "but not behind the answer that a long one continues"),
        (6_000, 2_048, True, 0, "which is one from 2,048 tokens on"),
        (6_000, 2_032, True, 2_032, "and not before"),
    ],
)
def test_branch_points(tokens: int, branch: int, continues: bool, planned: int, why: str) -> None:
    retention = policy()
    serve(retention, "first", keys("a", 640), 640, state_at=512)
    prompt = keys("b", tokens, after="a" if continues else "", shared=640)
    assert retention.plan("second", prompt, tokens, 0, branch) == planned, why
    assert (planned in retention.checkpoints("second").cuts) == bool(planned)
    key = prompt[(planned or branch) // UNIT - 1]
    kept = retention.of_state(key, superseded=True, shared=False, low=True)
    assert kept == (KEEP if planned else LOW), "and what is kept there stays"


def test_branch_points_are_forgotten_the_oldest_first() -> None:
    retention = policy()
    for number in range(BRANCH_POINTS):
        retention.remember_branch_point(number)
    retention.remember_branch_point(0)
    retention.remember_branch_point("one more")
    kept = [retention.of_state(key, superseded=True, shared=False, low=False) for key in (0, 1, 2, "one more")]
    assert kept == [KEEP, LOW, KEEP, KEEP]


@pytest.mark.parametrize(
    ("computed", "branch", "cuts", "why"),
    [
        (0, 0, (3_584, 4_608), "where later prompts are expected to branch"),
        (3_584, 0, (4_608,), "not where a state was found already"),
        (0, 1_600, (1_600, 4_608), "not beside a branch point"),
    ],
)
def test_branch_checkpoints(computed: int, branch: int, cuts: tuple[int, ...], why: str) -> None:
    retention = policy()
    for _ in range(100):
        retention.branches.saw(1_024)
    retention.plan("request", keys("a", 5_000), 5_000, computed, branch)
    assert retention.checkpoints("request").cuts == cuts, why


@pytest.mark.parametrize(("tokens", "cuts"), [(2_500, (2_048,)), (3_000, (2_048, 2_560))])
def test_a_branch_checkpoint_has_a_long_prompt_before_it(tokens: int, cuts: tuple[int, ...]) -> None:
    retention = policy()
    for _ in range(100):
        retention.branches.saw(512)
    retention.plan("request", keys("a", tokens), tokens, 0, 0)
    assert retention.checkpoints("request").cuts == cuts


def test_where_prompts_branch_is_learned_from_those_that_come() -> None:
    retention = policy()
    for number in range(60):
        serve(retention, str(number), keys(str(number), 5_000), 5_000, state_at=4_608)
        retention.begin(f"{number} again", keys("other", 5_000, after=str(number), shared=3_600))
    retention.plan("request", keys("a", 5_000), 5_000, 0, 0)
    assert retention.checkpoints("request").cuts == (3_584, 4_608)


def test_a_prompt_takes_no_cut_where_nobody_branches() -> None:
    retention = policy(WITHIN)
    retention.plan("request", keys("a", 5_000), 5_000, 0, 0)
    plan = retention.checkpoints("request")
    assert (plan.cuts, plan.within) == ((), 4_608)


def test_steps_end_by_the_plan() -> None:
    retention = policy()
    retention.plan("request", keys("a", 900), 900, 0, 320)
    assert retention.step_end("request", 0, 900, 900) == 320
    assert retention.step_end("unknown", 0, 900, 900) == 900


def test_a_prompt_is_expected_to_be_continued_for_sixteen_times_the_memory() -> None:
    retention = policy()
    serve(retention, "a", keys("a", 640), 640, state_at=512)
    memory = retention._arena.total_bytes
    for times, known in ((15, True), (3, False)):
        for _ in range(times):
            retention._arena.release(0, retention._arena.allocate(0, memory // 50 - 2))
        serve(retention, f"{times}", keys(f"{times}", 640), 640)
        assert (keys("a", 640)[-2] in retention.prompt_ends._known) == known


def test_what_is_known_of_a_request_is_forgotten_with_it() -> None:
    retention = policy()
    serve(retention, "first", keys("a", 640), 640, state_at=512)
    assert not retention.requests
    assert not retention.checkpoints("first").cuts
    assert retention.release("first") is None
    assert retention.at_step_end("first", 512, 640) == DROP
    retention.state_at("first", 512)
    retention.end("first", keys("a", 640), 640, 640, 512)
    assert len(retention.reuse.told) == 1, "it has ended once"  # type: ignore[attr-defined]


def test_the_last_state_counts_and_a_preempted_request_begins_anew() -> None:
    retention = policy()
    retention.begin("request", keys("a", 640))
    assert retention.release("request") is None
    for tokens in (128, 512, 256):
        retention.state_at("request", tokens)
    assert retention.release("request") == 512
    assert retention.release("request") is None, "its blocks were released already"


@pytest.mark.parametrize(
    ("tokens", "computed", "last", "kept", "why"),
    [
        (1_200, 1_200, 1_024, {1_184: True, 1_024: True, 512: False}, "one of the two will do"),
        (1_200, 1_200, None, {1_184: False, 1_024: False, 512: False}, "nothing was left"),
        (1_200, 1_200, 512, {1_184: False, 1_024: False, 512: False}, "the state isn't at a checkpoint of its own"),
        (1_200, 1_100, None, None, "it left nothing and wasn't read"),
        (1_200, 1_100, 1_024, {1_184: True, 1_024: True, 512: False}, "it left a state before it was aborted"),
        (10, 10, None, {}, "too short to be continued"),
    ],
)
def test_from_where_a_prompt_may_be_continued(
    tokens: int, computed: int, last: int | None, kept: dict[int, bool] | None, why: str
) -> None:
    retention, prompt = policy(), keys("a", tokens)
    retention.plan("request", prompt, tokens, 0, 0)
    retention.end("request", prompt, tokens, computed, last)
    told: list[Any] = retention.reuse.told  # type: ignore[attr-defined]
    if kept is None:
        assert not told, why
        return
    ((points, match),) = told
    assert {point.key: point.kept for point in points} == {f"a {place}": value for place, value in kept.items()}, why
    assert {point.key: point.distance for point in points} == {
        f"a {place}": 0 if place > 512 else 512 for place in kept
    }
    assert match.turn == TurnClass.FIRST


def test_only_prompts_that_were_read_are_expected_to_be_continued() -> None:
    retention = policy()
    for name, computed in (("aborted", 600), ("read", 640)):
        prompt = keys(name, 640)
        retention.plan(name, prompt, 640, 0, 0)
        retention.end(name, prompt, 640, computed, 512)
        assert (retention.prompt_ends.began(prompt[-2]) == Resumed.END) == (name == "read")


# Answers.


def ask(retention: RetentionPolicy, count: int, *, back_at: int, first: int = 0) -> None:
    """Prompts of 640 tokens with answers up to token 800, each continued by another from ``back_at`` on."""
    for number in range(first, first + count):
        text, name = keys(f"q{number}", 800), f"q{number}"
        retention.plan(name, text, 640, 0, 0)
        retention.state_at(name, 624)
        retention.end(name, text, 640, 800, retention.release(name))
        again = keys(f"r{number}", 960, after=f"q{number}", shared=back_at)
        retention.begin(f"again {number}", again)


@pytest.mark.parametrize(
    ("back_at", "tokens", "unowned", "kept", "why"),
    [
        (800, 800, True, AnswerState(624, True), "later prompts continue from answers"),
        (800, 800, False, AnswerState(624, False), "also where memory is short"),
        (624, 800, True, NO_ANSWER_STATE, "they continue from the prompt: a template may drop what was said"),
        (0, 800, True, AnswerState(0, True), "nothing is known yet, but there is memory without use"),
        (0, 800, False, NO_ANSWER_STATE, "nothing is known, and memory is short"),
        (800, 784, True, NO_ANSWER_STATE, "it moves on after 32 tokens"),
        (800, 608, True, NO_ANSWER_STATE, "not in the prompt"),
        (800, 992, True, NO_ANSWER_STATE, "not where the text isn't known yet"),
    ],
)
def test_the_state_of_an_answer(back_at: int, tokens: int, unowned: bool, kept: AnswerState, why: str) -> None:
    retention = policy()
    ask(retention, 40 if back_at else 0, back_at=back_at)
    text = keys("a", 960)
    retention.plan("request", text, 640, 0, 0)
    retention.state_at("request", 624)
    if not unowned:
        retention._arena.allocate(0, 30)
    assert retention.answer_state("request", text, 640, tokens) == kept, why


def test_the_state_of_an_answer_moves_on_with_it() -> None:
    retention = policy()
    ask(retention, 40, back_at=800)
    text = keys("a", 960)
    retention.plan("request", text, 640, 0, 0)
    assert retention.answer_state("request", text, 640, 672) == AnswerState(0, True), "it has none to give up"
    retention.state_at("request", 672)
    retention.keeps_answer_state("request", 672)
    retention._arena.allocate(0, 30)
    assert retention.answer_state("request", text, 640, 704) == AnswerState(in_place_of=672)


def test_the_state_of_an_answer_pays_from_some_tokens_on() -> None:
    """One that would be hit by most saves more than the prompt's own, which all would hit, from a share of it on."""
    retention = policy()
    ask(retention, 40, back_at=800)
    text = keys("a", 1_600)
    retention.plan("request", text, 640, 0, 0)
    retention.state_at("request", 624)
    given_up = {tokens: retention.answer_state("request", text, 640, tokens).in_place_of for tokens in (640 + 32, 768)}
    assert given_up == {672: 624, 768: 624}
    ask(retention, 20, back_at=624, first=40)
    given_up = {tokens: retention.answer_state("request", text, 640, tokens).in_place_of for tokens in (800, 1_600)}
    assert given_up == {800: 0, 1_600: 624}


def test_the_state_of_a_branch_point_stays_beside_that_of_an_answer() -> None:
    retention = policy()
    ask(retention, 40, back_at=800)
    text = keys("a", 960)
    retention.plan("request", text, 640, 0, 320)
    retention.state_at("request", 320)
    assert retention.answer_state("request", text, 640, 800) == AnswerState(0, True)


@pytest.mark.parametrize(
    ("rules", "branch", "back_at", "computed", "answer", "cuts", "why"),
    [
        (CUTS, False, 160, 160, 64, (), "its answer will have the state that it continues from"),
        (CUTS, False, 160, 160, 63, (384,), "it may be too short for that"),
        (CUTS, True, 160, 160, 64, (384,), "that one stays, for prompts branch there"),
        (CUTS, False, 96, 96, 64, (384,), "it doesn't continue an answer"),
        (CUTS, False, 160, 0, 64, (384,), "the state is gone"),
        (replace(CUTS, answers=False), False, 160, 160, 64, (384,), "answers keep no states beside drafts"),
        (replace(CUTS, stored=True), False, 160, 160, 64, (384,), "one at its end goes to the host while it answers"),
    ],
)
def test_a_turn_isnt_cut_at_its_end_where_its_answer_keeps_a_state(
    rules: CheckpointRules, branch: bool, back_at: int, computed: int, answer: int, cuts: tuple[int, ...], why: str
) -> None:
    retention = policy(rules)
    for number in range(20):
        text, name = keys(f"q{number}", 160), f"q{number}"
        retention.plan(name, text, 100, 0, 0)
        retention.end(name, text, 100, 160, retention.release(name))
        if number:
            again = keys(f"r{number}", 208, after=f"q{number}", shared=160)
            retention.begin(f"again {number}", again)
    prompt = keys("r", 400, after="q0", shared=back_at)
    if branch:
        retention.remember_branch_point(prompt[160 // UNIT - 1])
    retention.plan("request", prompt, 400, computed, 0, answer)
    assert retention.checkpoints("request").cuts == cuts, why


def test_a_prompt_is_expected_where_its_answer_ends() -> None:
    retention, text = policy(), keys("a", 960)
    retention.plan("request", text, 640, 0, 0)
    retention.state_at("request", 800)
    retention.end("request", text, 640, 805, retention.release("request"))
    ((points, _),) = retention.reuse.told  # type: ignore[attr-defined]
    assert {point.key: point.kept for point in points} == {"a 624": True, "a 512": True, "a 800": True}
    assert retention.begin("again", keys("b", 960, after="a", shared=800)).resumed == Resumed.ANSWER


@pytest.mark.parametrize(
    ("place", "checkpoints", "last"),
    [
        (688, Checkpoints((256, 512), 0, frozenset(), 128), 512),
        (512, Checkpoints((256,), 0, frozenset(), 128), 256),
        (256, Checkpoints((), 0, frozenset(), 128), 128),
        (704, Checkpoints((256, 512), 688, frozenset(), 128), 688),
    ],
)
def test_no_state_is_left_from_a_place_on(place: int, checkpoints: Checkpoints, last: int) -> None:
    retention = policy()
    retention.plan("request", keys("a", 704), 704, 128, 0)
    retention.requests["request"].checkpoints = Checkpoints((256, 512), 688, frozenset(), 128)
    retention.state_at("request", 688)
    retention.give_up("request", place)
    assert retention.checkpoints("request") == checkpoints
    assert retention.release("request") == last
    retention.give_up("nobody", place)


def test_a_request_that_gives_up_all_states_has_none() -> None:
    retention = policy()
    retention.plan("request", keys("a", 704), 704, 0, 0)
    retention.state_at("request", 512)
    retention.give_up("request", 512)
    assert retention.release("request") is None


# What is kept.


@pytest.mark.parametrize(
    ("tokens", "kept", "why"),
    [
        (4_608, KEEP, "the last checkpoint"),
        (3_200, KEEP, "the branch point"),
        (4_096, DROP, "any other multiple of the spacing"),
        (1_000, DROP, "not where a hit can end"),
        (5_000, DROP, "behind the prompt's last token"),
    ],
)
def test_which_states_are_kept_where_steps_end(tokens: int, kept: Retention, why: str) -> None:
    retention = policy()
    retention.plan("request", keys("a", 5_000), 5_000, 0, 3_200)
    assert retention.at_step_end("request", tokens, 5_000) == kept, why


def test_a_state_that_saves_little_beside_another_is_kept_at_low_priority() -> None:
    retention = policy(WITHIN)
    for number in range(400):
        serve(retention, str(number), keys(str(number), 1_600), 1_600)
        branch = keys("b", 1_600, after=str(number), shared=1_600 if number % 2 else 1_536)
        retention.prompt_ends.began(branch[-2])
        retention.prompt_ends.began(branch[1_536 // UNIT - 1])
    retention.plan("request", keys("a", 1_600), 1_600, 0, 0)
    plan = retention.checkpoints("request")
    assert plan.low == {1_584}
    assert [retention.at_step_end("request", tokens, 1_600) for tokens in (1_536, 1_584)] == [KEEP, LOW]


def test_the_users_interval() -> None:
    retention = policy(CheckpointRules(unit=UNIT, spacing=SPACING, interval=64))
    retention.plan("request", keys("a", 2_000), 2_000, 0, 0)
    assert [retention.at_step_end("request", tokens, 2_000) for tokens in (64, 80, 640)] == [KEEP, DROP, KEEP]
    assert [retention.at_step_end("request", tokens, 640) for tokens in (640, 704)] == [DROP, DROP], "in its answer"


def test_near_places_are_left_to_branch_checkpoints() -> None:
    retention = policy()
    retention.plan("request", keys("a", 40_000), 40_000, 0, 0)
    assert [retention.at_step_end("request", 39_936 - before, 40_000) for before in (4_080, 4_096)] == [DROP, LOW]
    assert retention.at_step_end("request", 8_200, 40_000) == DROP, "no hit can end there"


@pytest.mark.parametrize(("taken", "kept"), [(0, LOW), (14, LOW), (15, DROP)])
def test_far_places_are_kept_while_memory_belongs_to_nobody(taken: int, kept: Retention) -> None:
    """A sixteenth of the 17 extents, the null extent included, is 1.06: with 15 of 16 taken there is less."""
    retention = policy()
    retention.plan("request", keys("a", 40_000), 40_000, 0, 0)
    retention._arena.allocate(0, 2 * taken)
    assert retention.at_step_end("request", 8_192, 40_000) == kept
    assert retention.at_step_end("request", 8_192, 40_000) == kept, "all groups of states get the same answer"


@pytest.mark.parametrize("superseded", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("low", [False, True])
def test_states(superseded: bool, shared: bool, low: bool) -> None:
    expected = {  # superseded, shared, low
        (False, False, False): KEEP,
        (False, False, True): LOW,
        (False, True, False): KEEP,
        (False, True, True): LOW,
        (True, False, False): LOW,
        (True, False, True): LOW,
        (True, True, False): KEEP,
        (True, True, True): KEEP,
    }
    retention = policy()
    assert retention.of_state("a", superseded=superseded, shared=shared, low=low) == expected[superseded, shared, low]


@pytest.mark.parametrize(("ahead", "last", "end"), [(0, 512, 512), (16, 512, 528), (0, None, inf), (16, None, inf)])
def test_attention_behind_the_last_state_is_dropped(ahead: int, last: int | None, end: float) -> None:
    retention = policy(CheckpointRules(unit=UNIT, spacing=SPACING, ahead=ahead))
    assert retention.attention_end(last) == end

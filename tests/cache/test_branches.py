"""Where a prompt leaves a branch checkpoint."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from tidepool.cache import BranchStatistics

DISTANCES = (512, 1024, 2048, 4096)


def record(counts: dict[int, int]) -> BranchStatistics:
    branches = BranchStatistics(DISTANCES)
    for distance, count in counts.items():
        for _ in range(count):
            branches.saw(distance)
    return branches


def test_without_evidence_no_prompt_leaves_a_branch_checkpoint() -> None:
    assert [BranchStatistics(DISTANCES).branch_checkpoint(end, 1_000) for end in (512, 10_000, 100_000)] == [0, 0, 0]


def test_conversations_leave_none() -> None:
    branches = record({0: 200, 512: 2, 4096: 3})
    assert [branches.branch_checkpoint(end, 1_500) for end in (2_048, 8_192, 32_768)] == [0, 0, 0]


@pytest.mark.parametrize("distance", DISTANCES)
def test_documents_with_questions_leave_one_before_the_question(distance: int) -> None:
    branches = record({0: 20, distance: 60})
    assert branches.branch_checkpoint(32_768, 1_500) == distance


def test_a_state_serves_those_that_part_nearer_to_the_end() -> None:
    branches = record({0: 50, 512: 30, 1024: 30})
    assert branches.branch_checkpoint(32_768, 1_500) == 1024


def test_the_larger_a_state_the_longer_a_prompt_must_be() -> None:
    branches = record({0: 100, 512: 20})
    shortest = [
        min(end for end in range(1024, 100_000, 512) if branches.branch_checkpoint(end, s)) for s in (500, 2_000, 8_000)
    ]
    assert shortest == sorted(set(shortest)), "each larger than the one before"


@pytest.mark.parametrize(
    ("prompts", "weight"), [(255, 255), (256, 128), (257, 129), (511, 383), (512, 192), (1_024, 240)]
)
def test_counts_weigh_half_after_256_prompts(prompts: int, weight: float) -> None:
    assert record({512: prompts})._counts == {0: 0, 512: weight, 1024: 0, 2048: 0, 4096: 0}


def test_what_was_common_long_ago_is_forgotten() -> None:
    branches = record({512: 1_000})
    assert branches.branch_checkpoint(32_768, 1_500) == 512
    for _ in range(2_000):
        branches.saw(0)
    assert branches.branch_checkpoint(32_768, 1_500) == 0


@pytest.mark.parametrize(("end", "distance"), [(512, 0), (513, 512), (1_024, 512), (1_025, 512), (4_096, 512)])
def test_no_checkpoint_lies_before_the_prompt(end: int, distance: int) -> None:
    """Whatever prompts do, one at the distance of the first state saves nothing."""
    branches = record({4096: 100, 512: 100})
    assert branches.branch_checkpoint(end, 1.0) == distance


@given(
    st.dictionaries(st.sampled_from((0, *DISTANCES)), st.integers(0, 600), max_size=5),
    st.integers(0, 200_000),
    st.floats(1, 50_000),
)
def test_the_choice_saves_the_most_for_each_byte(counts: dict[int, int], end: int, state_tokens: float) -> None:
    """Against every choice, with counts that are too few to fade."""
    counts = {distance: count // 5 for distance, count in counts.items()}
    if sum(counts.values()) >= 256:
        counts = dict.fromkeys(counts, 10)
    chosen = record(counts).branch_checkpoint(end, state_tokens)

    def saved_per_byte(distance: int) -> float:
        first = (counts.get(0, 0) + 8) * end
        if not distance:
            return first / (end + state_tokens)
        second = sum(n for d, n in counts.items() if 0 < d <= distance) * (end - distance)
        return (first + second) / (end + 2 * state_tokens)

    assert chosen in (0, *(d for d in DISTANCES if d < end))
    best = max(saved_per_byte(d) for d in (0, *DISTANCES) if d == 0 or d < end)
    assert saved_per_byte(chosen) == pytest.approx(best)

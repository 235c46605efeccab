"""Who goes first of the requests that wait."""

from __future__ import annotations

import random

import pytest

from tidepool.cache import Waiting
from tidepool.cache.waiting import PASSED, WORTH


def keys(text: str, count: int) -> list[str]:
    return [f"{text}{number}" for number in range(1, count + 1)]


def test_who_has_much_to_lose_goes_first() -> None:
    waiting = Waiting()
    waiting.cached("b4")
    waiting.cached("c4")
    for text in "abc":
        waiting.arrives(text, keys(text, 8))
    assert len(waiting) == 3
    assert waiting.goes_before("a") == "b", "the earliest of them"
    assert waiting.goes_before("b") is None, "which has much to lose itself"
    assert waiting.goes_before("unknown") is None, "one that was preempted keeps its place"
    waiting.leaves("b")
    waiting.leaves("b")
    assert waiting.goes_before("a") == "c"
    waiting.leaves("c")
    assert waiting.goes_before("a") is None


def test_less_than_half_of_a_prompt_is_not_much() -> None:
    waiting = Waiting()
    waiting.cached("b4")
    waiting.arrives("a", keys("a", 8))
    waiting.arrives("b", keys("b", 9))
    assert waiting.goes_before("a") is None


def test_what_was_evicted_counts_no_more() -> None:
    waiting = Waiting()
    for key in ("b4", "b6", "c8"):
        waiting.cached(key)
    for text in "abc":
        waiting.arrives(text, keys(text, 8))
    waiting.removed("b6")
    assert waiting.goes_before("a") == "b", "a shorter one is left"
    waiting.removed("b4")
    assert waiting.goes_before("a") == "c"
    waiting.forget_states()
    assert waiting.goes_before("a") is None


def test_what_is_left_meanwhile_counts() -> None:
    waiting = Waiting()
    waiting.arrives("a", keys("a", 8))
    waiting.arrives("b", keys("b", 8))
    for key, place in (("c6", 6), ("b9", 9), ("b3", 3)):
        waiting.cached(key)
        waiting.left(key, place)
    assert waiting.goes_before("a") is None, "of another prompt, behind its end, too short"
    waiting.cached("b6")
    waiting.left("b6", 6)
    assert waiting.goes_before("a") == "b"


def test_nobody_is_passed_for_ever() -> None:
    waiting = Waiting()
    waiting.arrives("first", keys("first", 8))
    for number in range(PASSED + 1):
        waiting.cached(f"{number} 8")
        waiting.arrives(number, keys(f"{number} ", 8))
        assert waiting.goes_before("first") == (number if number < PASSED else None)
        waiting.leaves(number)
    waiting.arrives("later", keys("later", 8))
    waiting.cached("x8")
    waiting.arrives("x", keys("x", 8))
    assert waiting.goes_before("later") == "x", "it came later, and was passed by nobody"


@pytest.mark.parametrize("seed", range(30))
def test_against_looking_at_everything(seed: int) -> None:
    rng = random.Random(seed)
    waiting = Waiting()
    states: set[str] = set()
    waiters: dict[int, list[str]] = {}

    def worthy(name: int) -> bool:
        prompt = waiters[name]
        return any(key in states for place, key in enumerate(prompt, 1) if place >= WORTH * len(prompt))

    for step in range(400):
        text, place = rng.choice("abc"), rng.randint(1, 12)
        match rng.choice(["cached", "removed", "arrives", "leaves", "head"]):
            case "cached":
                waiting.cached(f"{text}{place}")
                states.add(f"{text}{place}")
                waiting.left(f"{text}{place}", place)
            case "removed" if states:
                key = rng.choice(sorted(states))
                states.discard(key)
                waiting.removed(key)
            case "arrives":
                waiters[step] = keys(text, place)
                waiting.arrives(step, waiters[step])
            case "leaves" if waiters:
                name = rng.choice(sorted(waiters))
                waiting.leaves(name)
                del waiters[name]
            case "head" if waiters and waiting.passes < PASSED:
                head = min(waiters)
                expected = None if worthy(head) else next((name for name in sorted(waiters) if worthy(name)), None)
                assert waiting.goes_before(head) == expected

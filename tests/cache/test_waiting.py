"""What requests that wait will find: which state each waits for, what goes last for it, and who goes first."""

from __future__ import annotations

import random

import pytest

from tidepool.cache import Arena, ExtentLayout, Geometry, LeastRecentlyUsed, Retention, Waiting
from tidepool.cache.waiting import PASSED


class Log(dict[object, bool]):
    """Which keys are protected."""

    def __call__(self, key: object, awaited: bool) -> None:
        assert self.get(key, False) != awaited, "told of changes only"
        self[key] = awaited

    def awaited(self) -> set[object]:
        return {key for key, awaited in self.items() if awaited}


def keys(text: str, count: int) -> list[str]:
    return [f"{text}{number}" for number in range(1, count + 1)]


def test_the_longest_cached_state_is_waited_for() -> None:
    log = Log()
    waiting = Waiting(log)
    for key in ("a2", "a5", "a9", "b1"):
        waiting.cached(key)
    waiting.arrives("first", keys("a", 8))
    assert log.awaited() == {"a5"}
    assert waiting.awaits("a5")
    assert not waiting.awaits("a2")
    waiting.removed("a5")
    waiting.lost("a5")
    assert log.awaited() == {"a2"}, "the next shorter one"
    waiting.arrives("second", keys("a", 3))
    waiting.leaves("first")
    assert log.awaited() == {"a2"}, "the second waits for it, too"
    waiting.leaves("second")
    assert not log.awaited()
    waiting.leaves("second")


def test_what_is_left_meanwhile_is_waited_for() -> None:
    log = Log()
    waiting = Waiting(log)
    waiting.cached("a2")
    waiting.arrives("request", keys("a", 8))
    waiting.cached("a6")
    waiting.left("a6", 6)
    assert log.awaited() == {"a6"}
    waiting.cached("b7")
    waiting.left("b7", 7)
    waiting.left("a9", 9)
    waiting.left("a4", 4)
    assert log.awaited() == {"a6"}, "not of another prompt, nor behind its end, nor what is shorter"
    waiting.forget_states()
    assert not log.awaited()


def test_who_has_much_to_lose_goes_first() -> None:
    waiting = Waiting(Log())
    waiting.cached("b4")
    waiting.cached("c4")
    for text in "abc":
        waiting.arrives(text, keys(text, 8))
    assert waiting.goes_before("a") == "b", "the earliest of them"
    assert waiting.goes_before("b") is None, "which has much to lose itself"
    assert waiting.goes_before("unknown") is None, "one that was preempted keeps its place"
    waiting.leaves("b")
    assert waiting.goes_before("a") == "c"
    waiting.lost("c4")
    waiting.removed("c4")
    waiting.leaves("c")
    assert waiting.goes_before("a") is None


def test_less_than_half_of_a_prompt_is_not_much() -> None:
    waiting = Waiting(Log())
    waiting.cached("b4")
    waiting.arrives("a", keys("a", 8))
    waiting.arrives("b", keys("b", 9))
    assert waiting.goes_before("a") is None


def test_nobody_is_passed_for_ever() -> None:
    waiting = Waiting(Log())
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


@pytest.mark.parametrize("seed", range(20))
def test_against_looking_at_everything(seed: int) -> None:
    rng = random.Random(seed)
    log = Log()
    waiting = Waiting(log)
    states: set[str] = set()
    waiters: dict[int, list[str]] = {}
    known: dict[int, int] = {}
    for step in range(300):
        text, place = rng.choice("abc"), rng.randint(1, 12)
        match rng.choice(["cached", "left", "lost", "arrives", "leaves"]):
            case "cached" if f"{text}{place}" not in states:
                waiting.cached(f"{text}{place}")
                states.add(f"{text}{place}")
            case "left" if f"{text}{place}" in states:
                waiting.left(f"{text}{place}", place)
                for name, prompt in waiters.items():
                    if known[name] < place <= len(prompt) and prompt[place - 1] == f"{text}{place}":
                        known[name] = place
            case "lost" if states:
                key = rng.choice(sorted(states))
                states.discard(key)
                waiting.removed(key)
                waiting.lost(key)
                for name, prompt in waiters.items():
                    if known[name] and prompt[known[name] - 1] == key:
                        known[name] = max(
                            (at for at in range(known[name]) if at and prompt[at - 1] in states), default=0
                        )
            case "arrives":
                prompt = waiters[step] = keys(text, place)
                waiting.arrives(step, prompt)
                known[step] = max((at for at in range(place + 1) if at and prompt[at - 1] in states), default=0)
            case "leaves" if waiters:
                name = rng.choice(sorted(waiters))
                waiting.leaves(name)
                del waiters[name], known[name]
        assert log.awaited() == {prompt[known[name] - 1] for name, prompt in waiters.items() if known[name]}


# In the arena.


def cached(arena: Arena, request: str) -> int:
    arena.start(request, 0)  # type: ignore[arg-type]
    (block,) = arena.allocate(0, 1, request=request)
    arena.release(0, [block], [Retention.KEEP], request=request)
    arena.finish(request)
    return block


def test_what_is_waited_for_goes_last() -> None:
    gone: list[int] = []
    arena = Arena.elastic(
        Geometry(100, (ExtentLayout(100, 100, 1),)),
        6,
        policy=LeastRecentlyUsed(),
        on_evict=lambda group, block: gone.append(block),
    )
    old, awaited, young, later, last = (cached(arena, request) for request in "abcde")
    for block in (awaited, later, last):
        arena.protect(0, block, awaited=True)
    arena.protect(0, last, awaited=False)
    arena.allocate(0, 3)
    assert gone == [old, young, last]
    arena.touch(0, [awaited])
    arena.release(0, [awaited], [Retention.KEEP])
    arena.allocate(0, 1)
    assert gone[3:] == [awaited], "once it was hit, it is like any other"
    arena.allocate(0, 1)
    assert gone[-1] == later, "it goes when nothing else is left"


def test_what_is_in_use_or_low_is_not_protected() -> None:
    arena = Arena.elastic(Geometry(100, (ExtentLayout(100, 100, 1),)), 4)
    (block,) = arena.allocate(0, 1)
    arena.protect(0, block, awaited=True)
    arena.release(0, [block], [Retention.LOW])
    arena.protect(0, block, awaited=True)
    assert not arena._awaited

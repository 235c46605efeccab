"""What `tidepool verify` puts the memory through, made from fixed seeds: equal on every side and on every machine.

In most scenarios memory is so small that what they are named for has to happen, and `Scenario.must` names the counts
that prove it. All sides get the same bytes and requests. Texts are few and short, since two cores without AVX-512 read
400 tokens a second each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Literal

from tidepool.sides import Side
from tidepool.verify.task import Prompt, make_prompts

Count = Literal["cut", "preemptions", "moves", "hit_tokens", "evictions", "aborted"]
"""Something that happens to requests or memory, see `tidepool.verify.messages.Counts`."""

MAX_NUM_SEQS = 32
"""Requests that may run at once."""


@dataclass(frozen=True)
class Scenario:
    """An engine and what it is asked."""

    name: str
    title: str
    requests: Callable[[], list[Prompt]]
    """The questions, in the order in which they are sent."""
    kv_bytes: int
    must: tuple[Count, ...] = ()
    """What has to happen at least once; extents only move in the elastic partition."""
    caching: bool = False
    """Whether prefix caching is on."""
    step_tokens: int = 16_384
    """Tokens in an engine step at most, vLLM's ``max_num_batched_tokens``: longer prompts are cut."""
    chunk_tokens: int = 0
    """Tokens of one prompt in a step at most, so that many prompts are read side by side; 0 for no limit."""
    at_once: int = 1_000
    """Requests under way at once, counting those that wait for memory."""
    fixed_seqs: int = MAX_NUM_SEQS
    """Requests that may run at once in the fixed partition, which sets their states aside."""
    aborts: bool = False
    """Whether every third request is aborted while it runs."""


def _plain() -> list[Prompt]:
    return [
        *make_prompts(1, length=4_000, stories=1, questions=1),
        *make_prompts(2, length=120, stories=6, questions=2),
    ]


def _cut() -> list[Prompt]:
    return make_prompts(3, length=200, stories=3, questions=4)


def _preempted() -> list[Prompt]:
    return make_prompts(4, length=700, stories=2, questions=6)


def _moves() -> list[Prompt]:
    longs = make_prompts(5, length=1_300, stories=2, questions=2)
    shorts = make_prompts(6, length=80, stories=12, questions=2)
    return [prompt for wave in range(2) for prompts in (longs, shorts) for prompt in prompts[wave::2]]


def _shared() -> list[Prompt]:
    """Visits to four stories, two by two, that come back; every visit has six new questions.

    Half of the stories end right behind 1,280 tokens, which are whole blocks and checkpoints on every side. Hits in
    the others end within a block, so that its state is copied.
    """
    lengths = (1_290, 700)
    questions = [
        iter(make_prompts(7 + story, length=lengths[story % 2], stories=1, questions=20)) for story in range(4)
    ]
    visits = [story + first for first in (0, 0, 2, 2, 0) for story in range(2)]
    return [prompt for story in visits for _, prompt in zip(range(6), questions[story], strict=False)]


def _aborts() -> list[Prompt]:
    prompts = make_prompts(11, length=650, stories=3, questions=10)
    Random(0).shuffle(prompts)
    return prompts


MB = 1_000_000
PLAIN = Scenario("plain", "plain batch", _plain, 100 * MB)
CUT = tuple(
    Scenario(f"cut-{tokens}", f"steps of {tokens:,} tokens", _cut, 60 * MB, must=("cut",), step_tokens=tokens)
    for tokens in (48, 256, 1_024)
)
PREEMPTED = Scenario("preempted", "too little memory", _preempted, 18 * MB, must=("preemptions",), chunk_tokens=128)
MOVES = Scenario("moves", "long and short in turn", _moves, 12 * MB, must=("moves",), chunk_tokens=256, at_once=16)
SHARED = Scenario(
    "shared",
    "shared prefixes",
    _shared,
    18 * MB,
    must=("hit_tokens", "evictions"),
    caching=True,
    at_once=4,
    fixed_seqs=2,
)
ABORTS = Scenario(
    "aborts", "aborts", _aborts, 18 * MB, must=("aborted",), caching=True, step_tokens=512, at_once=8, aborts=True
)
SCENARIOS = {each.name: each for each in (PLAIN, *CUT, PREEMPTED, MOVES, SHARED, ABORTS)}


@dataclass(frozen=True)
class Part:
    """A scenario on one side."""

    scenario: Scenario
    side: Side
    poison: bool = False
    """Whether freed and moved memory is filled with values that show up wherever they are read."""

    @property
    def key(self) -> str:
        """How a worker is told what to run."""
        return self.scenario.name + "+poison" * self.poison

    @property
    def memory(self) -> str:
        """The side, for people."""
        return self.side + ", poison" * self.poison


def _on(side: Side, *scenarios: Scenario, poison: bool = False) -> tuple[Part, ...]:
    return tuple(Part(scenario, side, poison) for scenario in scenarios)


PARTS = (
    *_on("elastic", *SCENARIOS.values()),
    *_on("elastic", MOVES, SHARED, poison=True),
    *_on("stock", *SCENARIOS.values()),
    *_on("fixed", SHARED),
)
"""All there is, the side with most to do first."""
QUICK_PARTS = (*_on("elastic", PREEMPTED, MOVES, SHARED), *_on("stock", PREEMPTED, MOVES, SHARED))

"""The requests, made from fixed seeds: equal on every side and on every machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

Range = tuple[int, int]
"""Tokens, from and to, both included."""

MAX_MODEL_LEN = 2560
"""Tokens. Longer than any request here."""


@dataclass(frozen=True)
class Workload:
    """Conversations, each of one or more turns. A turn's prompt repeats all that came before it."""

    name: str
    title: str
    conversations: int
    prompt: Range
    """Tokens that each turn adds."""
    answer: Range
    """Tokens that the model writes in each turn."""
    turns: int = 1
    shared: Range = (0, 0)
    """Tokens of the system prompt that a conversation starts with."""
    system_prompts: int = 1
    """Conversations take turns in using so many system prompts."""
    at_once: int | None = None
    """Conversations under way; all from the start if None."""
    caching: bool = False
    """Whether it runs with prefix caching."""

    @property
    def requests(self) -> int:
        """Requests in all."""
        return self.conversations * self.turns


@dataclass(frozen=True)
class Turn:
    """One request: token ids, and how many tokens to write."""

    prompt: list[int]
    answer: int


SHORT = Workload("short", "short chats", conversations=96, prompt=(20, 60), answer=(32, 64))
LONG = Workload("long", "long prompts", conversations=44, prompt=(1000, 1400), answer=(24, 48))
CHAT = Workload(
    "chat",
    "shared prefixes",
    conversations=18,
    prompt=(60, 160),
    answer=(16, 16),
    turns=3,
    shared=(700, 900),
    system_prompts=6,
    at_once=12,
    caching=True,
)
WORKLOADS = (SHORT, LONG, CHAT)


def halved(workload: Workload) -> Workload:
    """Half of it, to be run on half the memory."""
    return replace(
        workload,
        conversations=workload.conversations // 2,
        at_once=workload.at_once and workload.at_once // 2,
    )


def make_conversations(workload: Workload, vocabulary: int, seed: int = 0) -> list[list[Turn]]:
    """All conversations of a workload.

    The answers that later turns repeat are drawn like the rest rather than taken from the model: otherwise one
    differing token would give the sides different requests from there on.

    Args:
        workload: what to draw.
        vocabulary: tokens in the model's vocabulary; special tokens, at either end, are not drawn.
        seed: the same seed gives the same tokens.
    """
    draw = Random(f"{workload.name} {seed}")
    low, high = 3 + vocabulary // 50, vocabulary * 9 // 10

    def tokens(count: int) -> list[int]:
        return [draw.randrange(low, high) for _ in range(count)]

    system = [tokens(draw.randint(*workload.shared)) for _ in range(workload.system_prompts)]
    conversations = []
    for index in range(workload.conversations):
        history = list(system[index % workload.system_prompts])
        turns = []
        for _ in range(workload.turns):
            history += tokens(draw.randint(*workload.prompt))
            answer = draw.randint(*workload.answer)
            turns.append(Turn(list(history), answer))
            history += tokens(answer)
        conversations.append(turns)
    return conversations


def describe(workload: Workload) -> str:
    """A workload in words, for people."""
    answers = f"answers of {_span(workload.answer)} tokens"
    if workload.turns == 1:
        return f"{workload.requests} requests at once, prompts of {_span(workload.prompt)}, {answers}"
    return (
        f"{workload.conversations} chats of {workload.turns} turns, {workload.at_once} at once, prompts of "
        f"{_span(workload.shared)} ({workload.system_prompts} different) + {_span(workload.prompt)} a turn, {answers}"
    )


def _span(values: Sequence[int]) -> str:
    low, high = values
    return f"{low:,}" if low == high else f"{low:,}-{high:,}"

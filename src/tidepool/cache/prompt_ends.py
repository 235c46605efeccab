"""What share of prompts is continued, from where, by their length: learned from those that were.

A prompt is *continued* when a later one begins with the whole of it, or with all of it up to its last checkpoint. One
that begins with its answer as well continues it from there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from enum import IntEnum

_CLASSES = 4
"""Classes of prompts by length, in spacings: under 1, under 2, under 4, and longer ones."""
_HALVE_AFTER = 256
"""Prompts of a class after which older counts weigh half."""
_DOUBT = 2.0
"""Prompts of each class that were never continued, to begin with."""


class Resumed(IntEnum):
    """From where a prompt continues an earlier one."""

    NOWHERE = 0
    CHECKPOINT = 1
    """From its last checkpoint; behind that the two differ."""
    END = 2
    """From its very end."""
    ANSWER = 3
    """From the end of its answer."""


class _Prompt:
    """A prompt that was served."""

    __slots__ = ("keys", "kind", "settled", "since")

    def __init__(self, kind: int, since: int, keys: dict[Hashable, Resumed]) -> None:
        self.kind = kind
        self.since = since
        self.keys = keys
        """Of its places, and what a prompt that continues from there does."""
        self.settled = False


class PromptEnds:
    """The record of continued prompts.

    A prompt counts once: when it is continued, or when it is so old that it isn't expected to be.

    Args:
        spacing: tokens between checkpoints.
        lifetime: bytes allocated, after which a prompt isn't expected to be continued.
    """

    def __init__(self, spacing: int, lifetime: int) -> None:
        self._spacing = spacing
        self._lifetime = lifetime
        self._served: deque[_Prompt] = deque()
        """The oldest first. Those that are settled already are still among them."""
        self._known: dict[Hashable, _Prompt] = {}
        """By each of its places, the last prompt that ended there."""
        self._settled = [0.0] * _CLASSES
        self._from_end = [0.0] * _CLASSES
        self._from_checkpoint = [0.0] * _CLASSES
        self._from_answer = [0.0] * _CLASSES
        """Of those from the end."""

    def ended(
        self,
        prompt_tokens: int,
        end: Hashable,
        checkpoint: Hashable | None,
        now: int,
        answer: Hashable | None = None,
    ) -> None:
        """A prompt was served.

        Args:
            prompt_tokens: the prompt.
            end: the key of its last place.
            checkpoint: of its last checkpoint; None if it is as good as none.
            now: the time.
            answer: of the last place in its answer; None if there is none behind ``end``.
        """
        while self._served and self._served[0].since + self._lifetime < now:
            self._forget(self._served.popleft())
        keys = {checkpoint: Resumed.CHECKPOINT, answer: Resumed.ANSWER, end: Resumed.END}
        keys.pop(None, None)
        prompt = _Prompt(self._class(prompt_tokens), now, keys)
        self._served.append(prompt)
        for key in keys:
            self._known[key] = prompt

    def began(self, key: Hashable) -> Resumed:
        """A prompt came whose longest known prefix has this key."""
        prompt = self._known.get(key)
        if prompt is None:
            return Resumed.NOWHERE
        resumed = prompt.keys[key]
        if not prompt.settled:
            self._settle(prompt)
            counts = self._from_checkpoint if resumed == Resumed.CHECKPOINT else self._from_end
            counts[prompt.kind] += 1
            self._from_answer[prompt.kind] += resumed == Resumed.ANSWER
        return resumed

    def from_end(self, prompt_tokens: int) -> float:
        """The share of prompts of this length that are continued from their very end, or their answer's, 0 to 1."""
        kind = self._class(prompt_tokens)
        return self._from_end[kind] / (self._settled[kind] + _DOUBT)

    def from_answer(self, prompt_tokens: int) -> float:
        """The share that is continued from the end of the answer, 0 to 1."""
        kind = self._class(prompt_tokens)
        return self._from_answer[kind] / (self._settled[kind] + _DOUBT)

    def from_checkpoint(self, prompt_tokens: int) -> float:
        """The share that is continued from the last checkpoint and no further, 0 to 1."""
        kind = self._class(prompt_tokens)
        return self._from_checkpoint[kind] / (self._settled[kind] + _DOUBT)

    def answer_pays(self, prompt_tokens: int, state: int, tokens: int) -> bool:
        """Whether a state in the answer saves later prompts more than the prompt's own one.

        Args:
            prompt_tokens: the prompt.
            state: where its own one is.
            tokens: where the other one would be.
        """
        kind = self._class(prompt_tokens)
        return self._from_answer[kind] * (tokens - state) > (self._from_elsewhere(kind) + _DOUBT) * state

    def answer_may_pay(self, prompt_tokens: int) -> bool:
        """Whether it isn't known that prompts are continued from elsewhere than the ends of their answers."""
        kind = self._class(prompt_tokens)
        return self._from_answer[kind] + _DOUBT > self._from_elsewhere(kind)

    def _from_elsewhere(self, kind: int) -> float:
        """Prompts that were continued from elsewhere than the ends of their answers."""
        return self._from_end[kind] - self._from_answer[kind] + self._from_checkpoint[kind]

    def _class(self, prompt_tokens: int) -> int:
        return min((prompt_tokens // self._spacing).bit_length(), _CLASSES - 1)

    def _settle(self, prompt: _Prompt) -> None:
        prompt.settled = True
        kind = prompt.kind
        self._settled[kind] += 1
        if self._settled[kind] >= _HALVE_AFTER:
            for counts in (self._settled, self._from_end, self._from_checkpoint, self._from_answer):
                counts[kind] /= 2

    def _forget(self, prompt: _Prompt) -> None:
        if not prompt.settled:
            self._settle(prompt)
        for key in prompt.keys:
            if self._known.get(key) is prompt:
                del self._known[key]

"""Why prompts hit or miss: counted once for each request, when it is admitted.

A hit needs the attention of a whole prefix and a state at its end. So a prompt's tokens divide, from the start on, into
those that hit; those whose attention was found, without a state behind it; those that an earlier prompt is remembered
to have left, and that aren't there any more; and those that nobody is remembered to have left.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from enum import StrEnum

_REMEMBERED = 4096
"""First blocks that are remembered at most."""


class LookupResult(StrEnum):
    """What became of a request's lookup."""

    HIT = "hit"
    """Some of its prompt hit."""
    SHORT = "short"
    """It is shorter than what a hit takes at least."""
    NO_STATE = "no_state"
    """Attention was found, and no state at the end of any of it: none was kept there, or it went first."""
    EVICTED = "evicted"
    """An earlier prompt left this beginning, and it was evicted before the return."""
    OTHER_KEY = "other_key"
    """A prompt began with the same tokens under another cache salt, adapter or image."""
    NEW = "new"
    """Nobody is remembered to have left this beginning: no attention was found."""


class TokenResult(StrEnum):
    """What became of a prompt's tokens."""

    DEVICE = "hit_device"
    HOST = "hit_host"
    """They hit, having been loaded from the host for this request."""
    NO_STATE = "no_state"
    EVICTED = "evicted"
    NEW = "new"


@dataclass(frozen=True, slots=True)
class Lookup:
    """What was found of one prompt. All but keys are tokens."""

    prompt: int
    found: int
    """That hit."""
    attention: int
    """Up to where attention was found; 0 where that is no more than what hit."""
    left: int
    """Up to where an earlier prompt is remembered to have left it."""
    loaded: int = 0
    """Of those that hit, loaded from the host for it."""


class LookupStatistics:
    """The record of lookups.

    Args:
        unit: tokens; a hit ends at a multiple of it.
    """

    def __init__(self, unit: int) -> None:
        self._unit = unit
        self.requests = dict.fromkeys(LookupResult, 0)
        self.tokens = dict.fromkeys(TokenResult, 0)
        self._first_blocks: OrderedDict[int, Hashable] = OrderedDict()
        """By hash of a first block's tokens, its last key."""

    def count(self, lookup: Lookup, first_block: Sequence[int], first_key: Hashable | None) -> None:
        """A request was admitted.

        Args:
            lookup: what was found of its prompt.
            first_block: the tokens that its first key stands for.
            first_key: that key; None if the prompt is shorter than that.
        """
        other = first_key is not None and self._under_another_key(first_block, first_key)
        self.requests[self._result(lookup, other)] += 1
        reached = 0
        ends = {
            TokenResult.DEVICE: lookup.found - lookup.loaded,
            TokenResult.HOST: lookup.found,
            TokenResult.NO_STATE: lookup.attention,
            TokenResult.EVICTED: lookup.left,
            TokenResult.NEW: lookup.prompt,
        }
        for result, end in ends.items():
            if end > reached:
                self.tokens[result] += end - reached
                reached = end

    def _result(self, lookup: Lookup, other: bool) -> LookupResult:
        if lookup.found:
            return LookupResult.HIT
        if lookup.prompt <= self._unit:
            # The last token is always computed anew.
            return LookupResult.SHORT
        if lookup.attention:
            return LookupResult.NO_STATE
        if lookup.left:
            return LookupResult.EVICTED
        return LookupResult.OTHER_KEY if other else LookupResult.NEW

    def _under_another_key(self, tokens: Sequence[int], key: Hashable) -> bool:
        """Whether a prompt that began with these tokens had another key; remembers this one's."""
        name = hash(tuple(tokens))
        last = self._first_blocks.pop(name, key)
        self._first_blocks[name] = key
        if len(self._first_blocks) > _REMEMBERED:
            self._first_blocks.popitem(last=False)
        return last != key

"""Where a prompt leaves checkpoints, and where its steps end for them.

A hit needs a state at its end, and a state can be kept only where a step ends. Some layers save one more inside the
step that reads a prompt's end. Any other checkpoint takes a *cut*: the prompt's step ends there, and the rest waits for
the next one, so it costs a step. What share of prompts is continued is learned (`PromptEnds`), and a prompt is cut
where that saves later ones more tokens than a step is worth. Where stock vLLM cuts too, it costs nothing.

All positions are tokens from the start of the prompt.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tidepool.cache.prompt_ends import PromptEnds, Resumed

LONG_PROMPT = 2048
"""Tokens from which on a prompt leaves a state at its last checkpoint alone: not at its very end, which would save less
than a quarter more, and not behind the answer that it continues. Chosen by replay, see docs/prefix-caching.md."""
LARGE_STEP = 8
"""Spacings from which on a step is large: what it leaves to the next checkpoint matters little."""
ANSWER_SPACING = 32
"""Tokens of an answer after which its state moves on, if it has one; each time a state is copied."""
CUT_TOKENS = 32
"""Tokens that a cut must save later prompts, on average, to be worth its step. Chosen by replay, likewise."""
LIKELY = 0.5
"""How likely it is, at least, that a prompt is continued if it continues an earlier one itself: one that contains
another has the form of a conversation, and so has its next turn."""
STATE_TOKENS = 16
"""Tokens that a further state of a prompt must save later ones, on average, to be worth its memory."""


@dataclass(frozen=True)
class CheckpointRules:
    """What decides where checkpoints can be. Sizes are tokens."""

    unit: int
    """A hit ends at a multiple of it."""
    spacing: int
    """From one checkpoint that different prompts may share to the next; a multiple of ``unit``."""
    ahead: int = 0
    """How much more than it gives a lookup has to find: an attention block, with a drafter."""
    within: int = 0
    """Layers that can save a state inside a step do so at multiples of it from the step's start; 0 if they can't."""
    column: int = 1
    """What one column of the states' block table stands for. A state saved inside a step takes one that the step adds
    before its last."""
    stock_block: int = 0
    """Tokens of stock vLLM's block: its steps inside prompts end at multiples of it, once they reach one; and where
    layers can't save states inside steps, one cut of longer prompts is free."""
    interval: int = 0
    """The user wants states at multiples of it, wherever a step of a prompt ends anyway; 0 for none."""
    answers: bool = True
    """Whether states are kept in answers, too."""
    stored: bool = False
    """Whether there is host memory, to which a prompt's states go while its answer is still under way."""

    @property
    def answer_spacing(self) -> int:
        """From one place to the next at which a state in an answer moves on."""
        return max(ANSWER_SPACING // self.unit, 1) * self.unit

    def last_places(self, prompt_tokens: int) -> tuple[int, int]:
        """The last place from where a later prompt can continue this one, and the last checkpoint."""
        # The last token is always computed anew, so no hit ends behind it. With a drafter a lookup finds whole
        # attention blocks, and gives one less.
        last = prompt_tokens // self.ahead * self.ahead - self.ahead if self.ahead else prompt_tokens - 1
        last = max(last, 0)
        return last // self.unit * self.unit, last // self.spacing * self.spacing

    def whole(self, start: int, end: int, prompt_end: int) -> int:
        """Where a step that could go from ``start`` to ``end`` inside a prompt ends.

        At a multiple of the user's interval. Else at one of the spacing, where the step is large or stock vLLM's would
        end early as well and no later; or else where stock's ends. Not where that leaves more than a quarter unused:
        then where the prompt's last step can start so that a state is saved inside it, or at ``end``. Steps that aren't
        filled to the last token let answers under way wait less for the next one, see docs/prefix-caching.md.
        """
        if self.interval and end // self.interval * self.interval > start:
            return end // self.interval * self.interval
        stock = end // self.stock_block * self.stock_block if self.stock_block else start
        whole = end // self.spacing * self.spacing
        if end - start < LARGE_STEP * self.spacing:
            whole = max(whole, stock // self.unit * self.unit) if stock > start else 0
        if whole > start and (end - whole) * 4 <= end - start:
            return whole
        aligned = end // self.unit * self.unit
        last = self.within and aligned > start and prompt_end - aligned <= end - start
        return aligned if last else end

    def place_within(self, start: int, end: int) -> int:
        """Where a state is saved inside the step from ``start`` to ``end``, which reads a prompt's end; 0 for nowhere.

        The last checkpoint of long prompts, the very end of others. Scheduler and workers must agree on it, so it is a
        function of the step alone.
        """
        if not self.within or start % self.unit:
            return 0
        place = self.last_places(end)[end >= LONG_PROMPT]
        fits = -(-end // self.column) - 2 > (start - 1) // self.column
        return place if fits and place >= start + self.unit and (place - start) % self.within == 0 else 0


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """Where one prompt leaves states."""

    cuts: tuple[int, ...] = ()
    """Places where its steps end, in order."""
    within: int = 0
    """A place that takes no cut where the step that reads it reads the prompt's end as well; 0 for none."""
    low: frozenset[int] = frozenset()
    """Those of low priority, which save little beside another one."""
    found: int = 0
    """Where the prompt's cached part ends; 0 if it has none."""

    def __contains__(self, place: int) -> bool:
        """Whether a state is left at ``place``, or was found there."""
        return place > 0 and (place in (self.within, self.found) or place in self.cuts)

    @property
    def last(self) -> int:
        """The last of them that isn't of low priority; 0 for none."""
        return max((place for place in (*self.cuts, self.within) if place not in self.low), default=0)

    def step_end(self, rules: CheckpointRules, start: int, end: int, prompt_end: int) -> int:
        """Where a step ends that starts at ``start`` and for which there are tokens up to ``end``.

        Never at ``start``: a prompt makes progress in every step that has tokens left. A step that doesn't reach the
        prompt's end ends at a round place, see `CheckpointRules.whole`.

        Args:
            rules: what decides where checkpoints can be.
            start: tokens computed so far.
            end: as far as the step's tokens go.
            prompt_end: where the prompt has been read.
        """
        stop = min((place for place in self.cuts if start < place < end), default=end)
        saved = stop >= prompt_end and rules.place_within(start, stop) == self.within
        if start < self.within < stop and not saved:
            stop = self.within
        if stop == end < prompt_end:
            stop = rules.whole(start, end, prompt_end)
        return stop


NO_CHECKPOINTS = Checkpoints()


def plan_checkpoints(
    rules: CheckpointRules,
    ends: PromptEnds,
    prompt_tokens: int,
    computed: int,
    branches: Iterable[int] = (),
    resumed: Resumed = Resumed.NOWHERE,
    *,
    moves: bool = False,
) -> Checkpoints:
    """Where a prompt leaves states, of which ``computed`` tokens are cached.

    Args:
        rules: what decides where checkpoints can be.
        ends: what is known of prompts of this length.
        prompt_tokens: the prompt.
        computed: tokens that needn't be read.
        branches: where this prompt branches from others, or others are expected to branch from it: always cut.
        resumed: from where it continues an earlier one.
        moves: whether the state that it continues from can move on into its answer.
    """
    end, checkpoint = rules.last_places(prompt_tokens)
    from_end, from_checkpoint = ends.from_end(prompt_tokens), ends.from_checkpoint(prompt_tokens)
    if moves and ends.answer_pays(prompt_tokens, computed, end):
        # Later prompts will continue from the answer.
        from_end -= ends.from_answer(prompt_tokens)
    elif resumed >= Resumed.END:
        from_end = max(from_end, LIKELY)
    elif resumed == Resumed.CHECKPOINT:
        from_checkpoint = max(from_checkpoint, LIKELY)
    saved_by_end, saved_by_checkpoint = from_end * end, (from_end + from_checkpoint) * checkpoint
    long = prompt_tokens >= LONG_PROMPT
    best = checkpoint if long or saved_by_checkpoint >= saved_by_end else end
    cuts, low = set(branches), set()
    within = rules.place_within(computed, prompt_tokens)
    if within:
        best = within
    else:
        free = not rules.within and 0 < rules.stock_block < prompt_tokens
        if free or max(saved_by_end, saved_by_checkpoint) >= CUT_TOKENS:
            cuts.add(best)
    if best == end and from_checkpoint * checkpoint >= CUT_TOKENS:
        cuts.add(checkpoint)
        if within and from_end * (end - checkpoint) < STATE_TOKENS:
            within = 0
    if best == checkpoint and not long and from_end * (end - checkpoint) >= CUT_TOKENS:
        cuts.add(end)
    if checkpoint in cuts and 2 * (end - checkpoint) < end:
        low.add(end)
    return Checkpoints(
        tuple(sorted(place for place in cuts if computed < place < prompt_tokens)), within, frozenset(low), computed
    )


class FarPlaces:
    """Which ends of a long prompt's steps keep a state, in case a later prompt branches far back.

    They take no cut, and are left while there is memory that nothing else needs. One is kept for each doubling of the
    distance from the prompt's last checkpoint, the one farthest from it.

    Args:
        checkpoint: the prompt's last checkpoint.
        nearest: tokens before that from which on a place is far.
    """

    def __init__(self, checkpoint: int, nearest: int) -> None:
        self._checkpoint = checkpoint
        self._nearest = nearest
        self._octave = 0
        self._asked: tuple[int, bool] = (0, False)

    def keeps(self, place: int) -> bool:
        """Whether the state at the end of a step is kept.

        Asked for each step of the prompt in order, by each group of states: all get the same answer.
        """
        if self._asked[0] != place:
            octave = (max(self._checkpoint - place, 0) // self._nearest).bit_length()
            kept = octave not in (0, self._octave)
            self._octave = octave if kept else self._octave
            self._asked = place, kept
        return self._asked[1]


def spacing_within(interval: int, block: int, wished: int) -> int:
    """The checkpoint spacing that divides an interval and is nearest to the one wished for, as a ratio.

    Args:
        interval: tokens, a multiple of ``block``.
        block: tokens in an attention block, which the spacing is a multiple of.
        wished: tokens.
    """
    blocks = interval // block
    spacings = [blocks // parts * block for parts in range(1, blocks + 1) if blocks % parts == 0]
    return min(spacings, key=lambda spacing: max(spacing / wished, wished / spacing))

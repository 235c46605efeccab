"""What requests leave in the cache, and what of it is kept.

The policy follows each request by name: what its prompt shares with earlier ones (`begin`), where it leaves checkpoints
(`plan`), which states it has found or left (`state_at`), and what became of it (`end`). From that it answers whether a
state is kept where a step ends (`at_step_end`), and what becomes of a block without references (`of_state`,
`attention_end`). When memory is short, `tidepool.cache.eviction` chooses among what was kept.

Prompts are named by their keys: ``keys[n]`` stands for the first ``(n + 1) x key_tokens`` tokens, as a hash of them
does. All places are tokens from the start of the prompt.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import NamedTuple

from tidepool.cache.arena import Arena, Retention
from tidepool.cache.branches import BranchCheckpoints, BranchStatistics
from tidepool.cache.checkpoints import (
    LONG_PROMPT,
    NO_CHECKPOINTS,
    CheckpointRules,
    Checkpoints,
    FarPlaces,
    plan_checkpoints,
)
from tidepool.cache.lookups import Lookup, LookupStatistics
from tidepool.cache.prompt_ends import PromptEnds, Resumed
from tidepool.cache.reuse import PrefixMatch, ResumePoint, ReuseModel, TurnClass

BRANCH_POINTS = 4096
"""Branch points that are remembered at most."""
LEFT = 16_384
"""Places at which prompts left states that are remembered at most, evicted or not."""
LIFETIME = 16
"""Times that the memory is allocated, after which a prompt counts as never continued; see `PromptEnds`."""
BRANCH_DISTANCES = (1, 2, 4, 8)
"""How far before its last checkpoint a prompt may leave another, in spacings; see `BranchStatistics`."""
UNOWNED_SHARE = 16
"""States at far places are left while at least this part of the memory belongs to no group."""


class AnswerState(NamedTuple):
    """What becomes of the state that a request has in its answer."""

    in_place_of: int = 0
    """Up to the state of its that is given up for it; 0 for none."""
    added: bool = False
    """Whether it may have a block of its own, if it doesn't get that one's."""


NO_ANSWER_STATE = AnswerState()


@dataclass(slots=True)
class RequestRecord:
    """What is known of a request under way."""

    match: PrefixMatch
    """What its prompt shares with earlier ones."""
    resumed: Resumed
    """From where it continues one of them."""
    checkpoints: Checkpoints = NO_CHECKPOINTS
    """Where it leaves states."""
    far: FarPlaces | None = None
    """Which other ends of its steps may keep one."""
    branch: tuple[int, Hashable] | None = None
    """The one of them that is left because prompts branch there, and its key."""
    last_checkpoint: int | None = None
    """Up to the last state that it has found or left in the cache, if any."""
    answer_state: int = 0
    """Up to the state that it keeps of its answer; 0 for none."""

    @property
    def continues(self) -> bool:
        """Whether it continues an earlier prompt. What another one finds in the cache is a shared prefix."""
        return self.match.turn != TurnClass.FIRST


class RetentionPolicy:
    """The records of requests under way, and what was learned from those that ended.

    Args:
        rules: what decides where checkpoints can be.
        reuse: the model of returns, which the eviction policy may share.
        arena: the memory. Its clock is the policy's, and it learns here which requests are under way.
        key_tokens: tokens that one more key stands for.
        state_tokens: tokens whose attention takes as many bytes as a state.
    """

    def __init__(
        self,
        rules: CheckpointRules,
        reuse: ReuseModel,
        arena: Arena,
        *,
        key_tokens: int,
        state_tokens: float,
    ) -> None:
        self.rules = rules
        self.reuse = reuse
        self.prompt_ends = PromptEnds(rules.spacing, arena.total_bytes * LIFETIME)
        self.branches = BranchStatistics([rules.spacing * steps for steps in BRANCH_DISTANCES])
        self.lookups = LookupStatistics(rules.unit)
        self.branch_checkpoints = BranchCheckpoints()
        self.given_up = 0
        """Times so far that a request went on without a checkpoint for want of memory."""
        self.requests: dict[Hashable, RequestRecord] = {}
        """By name, those that were offered memory and haven't ended."""
        self._arena = arena
        self._key_tokens = key_tokens
        self._state_tokens = state_tokens
        self._answer_spacing = rules.answer_spacing
        self._left: OrderedDict[Hashable | None, int] = OrderedDict()
        """By keys of places that prompts share, the last state that one left up to there; the last one last."""
        self._branch_points: OrderedDict[Hashable, None] = OrderedDict()
        """Keys of places where prompts branched, the last one last."""

    # Requests.

    def begin(self, name: Hashable, keys: Sequence[Hashable]) -> RequestRecord:
        """The record of a request; its prompt is looked up the first time."""
        record = self.requests.get(name)
        if record is None:
            match = self.reuse.began(keys[::-1], self._arena.bytes_allocated)
            if match.distance is not None:
                self.branches.saw(match.distance)
            resumed = Resumed.NOWHERE if match.place is None else self.prompt_ends.began(match.place)
            record = self.requests[name] = RequestRecord(match, resumed)
            self._arena.start(name, match.turn)
        return record

    def plan(
        self,
        name: Hashable,
        keys: Sequence[Hashable],
        prompt_tokens: int,
        computed: int,
        branch: int,
        answer_tokens: int = 0,
    ) -> int:
        """Decide where a request leaves checkpoints; asked for whenever it is looked up in the cache.

        A branch point gets a checkpoint, but not where a long prompt continues an earlier one: both share the earlier
        one's answer as well, which looks like a branch point. The answer was given once, and a checkpoint behind it
        costs each turn a step and a block. A prompt without a branch point gets a branch checkpoint where later ones
        are expected to branch.

        Args:
            name: the request.
            keys: its prompt's.
            prompt_tokens: the prompt.
            computed: tokens of it that are cached.
            branch: up to where its attention, but no state, is cached; 0 if that is nowhere.
            answer_tokens: that its answer usually gets; 0 if that isn't known.

        Returns:
            The branch point that gets a checkpoint; 0 for none.
        """
        record = self.begin(name, keys)
        branch = 0 if branch >= LONG_PROMPT and record.continues else branch // self.rules.unit * self.rules.unit
        if branch:
            self.remember_branch_point(self._key(keys, branch))
        _, checkpoint = self.rules.last_places(prompt_tokens)
        place = branch or self._branch_checkpoint(checkpoint, computed)
        record.branch = (place, self._key(keys, place)) if place else None
        moves = self.rules.answers and not self.rules.stored and record.resumed == Resumed.ANSWER and computed > 0
        # A shorter answer may end before there is a place to keep a state at.
        moves &= answer_tokens >= 2 * self._answer_spacing
        record.checkpoints = plan_checkpoints(
            self.rules,
            self.prompt_ends,
            prompt_tokens,
            computed,
            (place,) if place else (),
            record.resumed,
            # At a branch point it stays for others, too.
            moves=moves and self._key(keys, computed) not in self._branch_points,
        )
        record.far = FarPlaces(checkpoint, self.branches.distances[-1])
        return branch

    def _branch_checkpoint(self, checkpoint: int, computed: int) -> int:
        """Where a prompt should leave a checkpoint for those expected to branch from it; 0 for nowhere."""
        distance = self.branches.branch_checkpoint(checkpoint, self._state_tokens)
        place = checkpoint - distance
        return place if distance and place > computed and place >= LONG_PROMPT else 0

    def step_end(self, name: Hashable, start: int, end: int, prompt_end: int) -> int:
        """Where a step of a request's prompt ends; see `Checkpoints.step_end`."""
        return self.checkpoints(name).step_end(self.rules, start, end, prompt_end)

    def checkpoints(self, name: Hashable) -> Checkpoints:
        """Where a request leaves states; none if nothing is known of it."""
        record = self.requests.get(name)
        return record.checkpoints if record else NO_CHECKPOINTS

    def state_at(self, name: Hashable, tokens: int) -> None:
        """A request has found a state there, or left one."""
        record = self.requests.get(name)
        if record is not None:
            record.last_checkpoint = max(tokens, record.last_checkpoint or 0)

    def give_up(self, name: Hashable, place: int) -> None:
        """Memory is short: a request keeps no state at this place, nor behind it."""
        record = self.requests.get(name)
        if record is None:
            return
        self.given_up += 1
        left = record.checkpoints
        cuts = tuple(cut for cut in left.cuts if cut < place)
        record.checkpoints = replace(left, cuts=cuts, within=left.within if left.within < place else 0)
        if record.last_checkpoint and record.last_checkpoint >= place:
            record.last_checkpoint = max((*cuts, left.found)) or None

    def admitted(
        self, name: Hashable, keys: Sequence[Hashable], prompt: Sequence[int], found: int, attention: int, loaded: int
    ) -> None:
        """Count what a request found in the cache, once, when it gets memory.

        Args:
            name: the request.
            keys: its prompt's.
            prompt: its tokens.
            found: tokens that hit.
            attention: up to where attention was found without a state; 0 if that is nowhere.
            loaded: tokens of those found that were loaded from the host for it.
        """
        left = self._left.get(self.begin(name, keys).match.place, 0)
        if found:
            self.branch_checkpoints.hit(self._key(keys, found))
        lookup = Lookup(len(prompt), found, attention, left, loaded)
        self.lookups.count(lookup, prompt[: self._key_tokens], keys[0] if keys else None)

    def release(self, name: Hashable) -> int | None:
        """A request gives up its blocks. Returns where its last state in the cache is; None if it has none."""
        record = self.requests.get(name)
        if record is None:
            return None
        last, record.last_checkpoint = record.last_checkpoint, None
        record.answer_state = 0
        return last

    def end(
        self, name: Hashable, keys: Sequence[Hashable], prompt_tokens: int, computed: int, last_checkpoint: int | None
    ) -> None:
        """A request has ended, its blocks having been released.

        Args:
            name: the request.
            keys: its prompt's.
            prompt_tokens: the prompt.
            computed: tokens that it has computed.
            last_checkpoint: what `release` said.
        """
        record = self.requests.pop(name, None)
        if record is None:
            return
        self._arena.finish(name)
        read = computed >= prompt_tokens
        if last_checkpoint is None and not read:
            return
        end, checkpoint = self.rules.last_places(prompt_tokens)
        now = self._arena.bytes_allocated

        def left(place: int) -> bool:
            return last_checkpoint is not None and place <= last_checkpoint and place in record.checkpoints

        places = {place: self._key(keys, place) for place in (end, checkpoint) if place}
        # A return to one of these is taken for one to the others: eviction asks whether a prompt comes back at all.
        at_either = any(left(place) for place in places) or (last_checkpoint or 0) > prompt_tokens
        # The last place from where a prompt can continue that has the answer in it.
        answer = min(computed // self.rules.unit * self.rules.unit, len(keys) * self._key_tokens)
        if answer > prompt_tokens and self.rules.answers:
            places[answer] = self._key(keys, answer)
        points = [ResumePoint(key, 0, at_either) for key in places.values()]
        far = {checkpoint - each: each for each in self.branches.distances if each < checkpoint}
        points += [ResumePoint(self._key(keys, place), distance, left(place)) for place, distance in far.items()]
        self.reuse.ended(points, now, record.match, last_checkpoint or 0)
        states = [place for place in (*far, *places) if left(place)]
        if last_checkpoint is not None and last_checkpoint > prompt_tokens:
            states.append(last_checkpoint)
        for place in (*far, *places):
            if before := max((state for state in states if state <= place), default=0):
                self._remember_left(self._key(keys, place), before)
        if end and read:
            self.prompt_ends.ended(prompt_tokens, places[end], places.get(checkpoint), now, places.get(answer))

    def _remember_left(self, key: Hashable, tokens: int) -> None:
        """A prompt that shares this place with an earlier one could hit so many tokens."""
        self._left[key] = tokens
        self._left.move_to_end(key)
        if len(self._left) > LEFT:
            self._left.popitem(last=False)

    def _key(self, keys: Sequence[Hashable], place: int) -> Hashable:
        return keys[place // self._key_tokens - 1]

    # What is kept.

    def at_step_end(self, name: Hashable, tokens: int, prompt_tokens: int) -> Retention:
        """Whether the state that a step leaves is kept, and how. The step ends inside the prompt, or at its end."""
        record = self.requests.get(name)
        if record is None or tokens >= prompt_tokens or tokens % self.rules.unit:
            return Retention.DROP
        interval = self.rules.interval
        if record.branch and record.branch[0] == tokens:
            self.branch_checkpoints.leave(record.branch[1])
        if tokens in record.checkpoints or (interval and tokens % interval == 0):
            return Retention.LOW if tokens in record.checkpoints.low else Retention.KEEP
        if record.far is not None and self._has_unowned_memory() and record.far.keeps(tokens):
            return Retention.LOW
        return Retention.DROP

    def _has_unowned_memory(self) -> bool:
        """Whether there is memory without use: a state that hardly anybody asks for evicts nothing."""
        return self._arena.unowned_bytes * UNOWNED_SHARE >= self._arena.total_bytes

    def answer_state(self, name: Hashable, keys: Sequence[Hashable], prompt_tokens: int, tokens: int) -> AnswerState:
        """Whether a request keeps the state that it has now, in its answer, and in which block.

        In the block of its last one, where later prompts are expected to save more by this one, and then again and
        again as the answer grows: that takes no step and no block beside the one that is given up. As long as nothing
        is known of such prompts, in a block of its own, if there is memory that nothing else needs.

        Args:
            name: the request.
            keys: its prompt's and its answer's.
            prompt_tokens: the prompt.
            tokens: computed so far.
        """
        if tokens % self._answer_spacing or not prompt_tokens < tokens <= len(keys) * self._key_tokens:
            return NO_ANSWER_STATE
        record = self.requests.get(name)
        if record is None or not self.rules.answers:
            return NO_ANSWER_STATE
        last = record.last_checkpoint or 0
        if last and last == record.answer_state:
            return AnswerState(in_place_of=last)
        kept = not last or self._key(keys, last) in self._branch_points
        pays = not kept and self.prompt_ends.answer_pays(prompt_tokens, last, tokens)
        added = self.prompt_ends.answer_may_pay(prompt_tokens) and self._has_unowned_memory()
        return AnswerState(last if pays else 0, added)

    def keeps_answer_state(self, name: Hashable, tokens: int) -> None:
        """A request keeps the state that it has after so many tokens, as `answer_state` said."""
        self.requests[name].answer_state = tokens

    def of_state(self, key: Hashable, *, superseded: bool, shared: bool, low: bool) -> Retention:
        """What becomes of a cached state without references.

        Args:
            key: of the place where it is.
            superseded: whether its last request found it and left a later one. The next turn of a conversation hits
                that one.
            shared: whether it is at the end of a shared prefix.
            low: whether it was left at low priority.
        """
        if key in self._branch_points or (superseded and shared):
            return Retention.KEEP
        return Retention.LOW if superseded or low else Retention.KEEP

    def attention_end(self, last_checkpoint: int | None) -> float:
        """Up to how many tokens cached attention without references is kept.

        Behind the last state that its request leaves, none can be hit. With a drafter a lookup has to find a block more
        than it gives.

        Args:
            last_checkpoint: of the request that releases it; None if that isn't known, and everything is kept.
        """
        return inf if last_checkpoint is None else last_checkpoint + self.rules.ahead

    def remember_branch_point(self, key: Hashable) -> None:
        """Prompts continue differently from here: the state at this place is kept."""
        self._branch_points[key] = None
        self._branch_points.move_to_end(key)
        if len(self._branch_points) > BRANCH_POINTS:
            self._branch_points.popitem(last=False)

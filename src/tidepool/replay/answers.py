"""What requests generate: a trace records only how much.

The next prompt of a conversation holds the last prompt, its answer and something new. So a prompt *goes on* from an
earlier one if it begins with all of its full blocks, shares no more with any, and is longer. If it is long enough for
the answer as well, the earlier request generates the tokens that follow in it.

A hash id stands for a whole block. The block in which a prompt ends has another id in the prompt that goes on, and both
get the same tokens as far as the shorter one goes. Where prompts are recorded as tokens these are compared instead.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

from tidepool.replay.trace import Recorded, Run, TraceRequest


class _Block:
    """A block of some prompt, behind those that lead to it."""

    __slots__ = ("ended", "next", "runs", "tokens")

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = runs
        """Its tokens, as far as a prompt has reached."""
        self.tokens = _length(runs)
        self.next: dict[object, _Block] = {}
        """By name, the blocks that have come behind it."""
        self.ended: list[_Prompt] | None = None
        """Prompts whose last full block it is, and from which none has gone on. None where these aren't of one
        conversation, as behind a system prompt: the first of them had more blocks."""


@dataclass(slots=True)
class _Prompt:
    """A prompt that has come."""

    recorded: Recorded
    runs: list[Run] = field(default_factory=list)
    tail: Sequence[Run] = ()
    """Its tokens behind its last full block."""
    answer: Sequence[Run] = ()


def with_answers(recorded: Sequence[Recorded]) -> list[TraceRequest]:
    """Requests with those answers that later prompts hold. O(blocks of all prompts).

    An answer is found whole or not at all. Of prompts that end in the same block the last one is gone on from first.

    Args:
        recorded: in the order of their arrival.
    """
    roots: defaultdict[str | None, _Block] = defaultdict(lambda: _Block(()))
    prompts = [_enter(roots[each.salt], each) for each in recorded]
    return [
        TraceRequest(
            each.arrival, prompt.runs, each.input_tokens, each.output_tokens, prompt.answer, each.salt, each.line
        )
        for each, prompt in zip(recorded, prompts, strict=True)
    ]


def without_reasoning(requests: Sequence[TraceRequest], share: float, seed: int) -> list[TraceRequest]:
    """The same prompts, a share of whose answers comes back in none.

    Args:
        requests: the workload.
        share: how likely it is of each answer, 0 to 1.
        seed: the same one chooses the same answers, and those of a smaller share are among those of a larger one.
    """
    rng = random.Random(f"reasoning {seed}")
    return [replace(request, answer=()) if rng.random() < share else request for request in requests]


def with_own_tokens(requests: Sequence[TraceRequest]) -> list[TraceRequest]:
    """The same requests, where each answer that comes back in no prompt is of tokens of its own."""
    unused = 1 + max(run[-1] if isinstance(run, range) else max(run) for each in requests for run in each.runs)
    made = []
    for request in requests:
        if not request.answer:
            request = replace(request, answer=(range(unused, unused + request.output_tokens),))
            unused += request.output_tokens
        made.append(request)
    return made


def _enter(root: _Block, recorded: Recorded) -> _Prompt:
    """A prompt comes: find what it shares with earlier ones, and the one from which it goes on."""
    prompt, node, size = _Prompt(recorded), root, recorded.block_tokens
    earlier: _Prompt | None = None
    shared: int | None = None
    ends_in_new = False
    for block in recorded.blocks:
        # Blocks of other sizes have other names.
        name = (block.start, size) if isinstance(block, range) else block
        known = node.next.get(name)
        if known is None or known.tokens < len(block):
            begun: Sequence[Run] = known.runs if known else ()
            if shared is None:
                shared = len(prompt.runs)
                earlier = _gone_on_from(node, prompt, block)
                begun = begun or (earlier.tail if earlier else ())
            known = node.next[name] = _Block((*begun, block[_length(begun) :]))
        runs = known.runs if known.tokens == len(block) else tuple(_part(known.runs, 0, len(block)))
        prompt.runs += runs
        if len(block) < size:
            prompt.tail = runs
        else:
            node, ends_in_new = known, shared is not None
    if earlier:
        _give_answer(earlier, prompt, shared or 0)
    if ends_in_new:
        node.ended = []
    if node.ended is not None:
        node.ended.append(prompt)
    return prompt


def _gone_on_from(node: _Block, prompt: _Prompt, block: Run) -> _Prompt | None:
    """The earlier prompt from which one goes on whose first new block is this, behind ``node``; None for none."""
    if not node.ended or node.ended[-1].recorded.input_tokens >= prompt.recorded.input_tokens:
        return None
    tail = tuple(chain.from_iterable(node.ended[-1].tail))
    if isinstance(block, tuple) and block[: len(tail)] != tail:
        return None
    return node.ended.pop()


def _give_answer(earlier: _Prompt, prompt: _Prompt, shared: int) -> None:
    """The answer to ``earlier`` is in ``prompt``, which goes on from it, if there is room.

    Args:
        earlier: the prompt that was answered.
        prompt: the later one.
        shared: runs that both begin with; ``earlier`` has its tail behind them.
    """
    length = earlier.recorded.output_tokens
    if prompt.recorded.input_tokens - earlier.recorded.input_tokens >= length:
        earlier.answer = tuple(_part(prompt.runs[shared:], _length(earlier.tail), length))


def _part(runs: Sequence[Run], start: int, count: int) -> Iterator[Run]:
    """``count`` tokens of runs from ``start`` on."""
    for run in runs:
        part = run[start : start + count]
        if part:
            yield part
        start = max(start - len(run), 0)
        count -= len(part)
        if not count:
            return


def _length(runs: Sequence[Run]) -> int:
    return sum(map(len, runs))

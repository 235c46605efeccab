"""Workloads made up by rule, for what one trace doesn't show. The same seed makes the same requests.

Tokens of different origin never meet: every piece of text is a run of numbers that no other piece has. The next turn of
a conversation contains what the last one generated; of other workloads nothing comes back.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from tidepool.replay.trace import FIRST_TOKEN, Run, TraceError, TraceRequest

REQUESTS = 1_000
"""How many requests are made where none are asked for."""
MOST_REQUESTS = 1_000_000
"""More take longer to make than anyone waits."""


@dataclass
class Writer:
    """Makes text and requests."""

    rng: random.Random
    next_token: int = FIRST_TOKEN
    requests: list[TraceRequest] = field(default_factory=list)

    def text(self, shortest: int, longest: int) -> range:
        """A run of new tokens, its length between the two."""
        return self.new(self.rng.randint(shortest, longest))

    def new(self, length: int) -> range:
        """A run of new tokens."""
        self.next_token += length
        return range(self.next_token - length, self.next_token)

    def request(self, arrival: float, runs: list[Run], output_tokens: int, answer: Sequence[Run] = ()) -> None:
        """A request that arrives at ``arrival`` seconds."""
        made = TraceRequest(arrival, tuple(runs), sum(map(len, runs)), output_tokens, answer)
        self.requests.append(made)

    def arrivals(self, rate: float) -> Iterator[float]:
        """Times at which independent users come, ``rate`` of them a second."""
        now = 0.0
        while True:
            now += self.rng.expovariate(rate)
            yield now


def random_prompts(writer: Writer, count: int) -> None:
    """Prompts that share nothing: a cache can only cost here. 2 a second, 500 to 16,000 tokens."""
    for arrival in _first(writer.arrivals(2.0), count):
        writer.request(arrival, [writer.text(500, 16_000)], writer.rng.randint(50, 600))


def hot_prefix(writer: Writer, count: int) -> None:
    """One long prefix before every prompt: 6,000 tokens, then 50 to 2,000 of its own. 8 a second."""
    prefix = writer.text(6_000, 6_000)
    for arrival in _first(writer.arrivals(8.0), count):
        writer.request(arrival, [prefix, writer.text(50, 2_000)], writer.rng.randint(50, 400))


def agent_sessions(writer: Writer, count: int) -> None:
    """Agents that send their whole past with every call: one system prompt of 4,000 tokens for all, then 20 to 60
    calls each, every one longer than the last by its answer and by 100 to 3,000 tokens of tool output."""
    system = writer.text(4_000, 4_000)
    sessions = writer.arrivals(0.05)
    while len(writer.requests) < count:
        conversation(writer, next(sessions), [system, writer.text(200, 2_000)], (20, 60), (100, 3_000), (50, 400), 6.0)


def sharing_tree(writer: Writer, count: int) -> None:
    """Prompts along the branches of a tree: a trunk of 1,000 tokens, 4 branches of 2,000, 4 twigs each of 1,000,
    5 leaves each of 500; a request takes one path and adds 100 to 800 tokens of its own. 5 a second, leaves not
    equally often."""
    trunk = writer.text(1_000, 1_000)
    paths: list[list[Run]] = []
    for _ in range(4):
        branch = writer.text(2_000, 2_000)
        for _ in range(4):
            twig = writer.text(1_000, 1_000)
            paths += [[trunk, branch, twig, writer.text(500, 500)] for _ in range(5)]
    weights = [1 / (rank + 1) for rank in range(len(paths))]
    for arrival in _first(writer.arrivals(5.0), count):
        path = writer.rng.choices(paths, weights)[0]
        writer.request(arrival, [*path, writer.text(100, 800)], writer.rng.randint(50, 400))


def documents(writer: Writer, count: int) -> None:
    """Documents of 4,000 to 40,000 tokens, one every 4 seconds; each gets 2 to 4 questions of 100 to 1,500 tokens, a
    minute apart. No prompt continues another from its end: they branch where the document ends."""
    for began in writer.arrivals(0.25):
        if len(writer.requests) >= count:
            return
        document, now = writer.text(4_000, 40_000), began
        for _ in range(writer.rng.randint(2, 4)):
            writer.request(now, [document, writer.text(100, 1_500)], writer.rng.randint(50, 400))
            now += writer.rng.expovariate(1 / 60)


def short_chats(writer: Writer, count: int) -> None:
    """Conversations of 1 to 8 short turns, 200 of them started at once and then 2 a second; one system prompt of 200
    tokens for all."""
    system = writer.text(200, 200)
    starts = writer.arrivals(2.0)
    started = 0
    while len(writer.requests) < count:
        began = 0.0 if started < 200 else next(starts)
        started += 1
        conversation(writer, began, [system, writer.text(20, 300)], (1, 8), (20, 300), (30, 400), 15.0)


WORKLOADS: dict[str, Callable[[Writer, int], None]] = {
    "random": random_prompts,
    "hot-prefix": hot_prefix,
    "agent": agent_sessions,
    "tree": sharing_tree,
    "documents": documents,
    "chat": short_chats,
}
"""Generators by name."""


def generate(workload: str, count: int | None, seed: int) -> list[TraceRequest]:
    """The first ``count`` requests of a workload, in the order of their arrival.

    Raises:
        TraceError: there is no such workload.
    """
    make = WORKLOADS.get(workload)
    if make is None:
        raise TraceError(f"There is no workload {workload!r} to generate: choose from {', '.join(WORKLOADS)}.")
    writer = Writer(random.Random(f"{workload} {seed}"))
    make(writer, REQUESTS if count is None else count)
    return sorted(writer.requests, key=lambda request: request.arrival)[:count]


def conversation(
    writer: Writer,
    began: float,
    opening: list[Run],
    turns: tuple[int, int],
    added: tuple[int, int],
    output: tuple[int, int],
    pause: float,
) -> None:
    """Turns of one conversation; ranges are tokens. A turn comes ``pause`` seconds after the last one on average, and
    20 ms later for each token that the last one generated."""
    now, past = began, opening
    for _ in range(writer.rng.randint(*turns)):
        answer = writer.new(writer.rng.randint(*output))
        writer.request(now, past, len(answer), (answer,))
        now += writer.rng.expovariate(1 / pause) + 0.02 * len(answer)
        past = [*past, answer, writer.text(*added)]


def _first(times: Iterator[float], count: int) -> Iterator[float]:
    return (next(times) for _ in range(count))

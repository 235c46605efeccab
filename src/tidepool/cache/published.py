"""Eviction policies that others have published, for comparison with `tidepool.cache.eviction`.

Each is written from its paper or description. All evict whole cached prefixes here, for half of one is of no use. An
order by the last use of each state, as in SGLang and Jenga (SOSP 2025), is `LeastRecentlyUsed` with
``low_together=False``.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

from tidepool.cache.eviction import CachedPrefix, FinishedFirst, PriorityClass, value_class, value_of_class
from tidepool.cache.reuse import PrefixMatch, ResumePoint, ReuseModel

SEGLEN_WEIGHT = 0.85 / 0.15
"""Of length beside recency in SegLen, its default."""
MARCONI_WEIGHTS = (0.0, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Of tokens saved for each byte beside recency, among which Marconi chooses."""
_WINDOW = 10
"""Prompts served from one choice to the next, for each one served before the first eviction; the paper has 5 to 15."""
_LONGEST_WINDOW = 1_000
"""Prompts in a window at most."""
_EVENTS = 4 * _LONGEST_WINDOW
"""Prompts that came and that ended, which are remembered at most."""
_SOON = 8_192
"""Tokens that are read soon enough: some 0.2 s, the paper's target, for a model of 4 billion parameters on an H100."""


class Size(NamedTuple):
    """Of a cached prefix."""

    tokens: int
    """Read again if it is gone."""
    bytes: int


class PrefixSizes(NamedTuple):
    """What cached prefixes are made of."""

    token_bytes: float
    """Of the attention of one token."""
    state_bytes: int
    """Of one cached state in each group of states."""

    def of(self, prefix: CachedPrefix) -> Size:
        """What is cached of a prefix."""
        return Size(round((prefix.bytes - prefix.state_bytes) / self.token_bytes), prefix.bytes)

    def of_tokens(self, tokens: int) -> Size:
        """The attention of so many tokens and a state in each group."""
        return Size(tokens, round(tokens * self.token_bytes) + self.state_bytes)


def saved_for_each_byte(size: Size) -> float:
    """What Marconi calls efficiency, in tokens for each MiB. Computation counts as tokens: it grows with them."""
    return size.tokens * 2**20 / max(size.bytes, 1)


class Weighed(FinishedFirst):
    """The lowest sum of recency and a weight times a value.

    Recency goes from 0 for the oldest cached prefix to 1 for a new one, the value from 0 for the lowest to 1 for the
    highest of those that are cached. Values of one class count as equal.

    Args:
        value: of a cached prefix whose request has just finished.
        weight: of that beside recency; 0 is LRU.
    """

    def __init__(self, value: Callable[[CachedPrefix], float], weight: float) -> None:
        super().__init__()
        self.weight = weight
        self._value = value
        self._classes: dict[int, OrderedDict[CachedPrefix, None]] = {}

    def queue_of(self, prefix: CachedPrefix) -> OrderedDict[CachedPrefix, None]:
        """See `FinishedFirst`."""
        return self._classes.setdefault(value_class(self._value(prefix), 1.0), OrderedDict())

    def next_finished(self, now: int) -> CachedPrefix | None:
        """See `FinishedFirst`. Costs O(classes): only the oldest of a class can have the lowest sum."""
        heads = [(number, next(iter(queue))) for number, queue in self._classes.items() if queue]
        if not heads:
            return None
        values = [value_of_class(number) for number, _ in heads]
        least, spread = min(values), max(values) - min(values) or 1.0
        oldest = max(now - min(prefix.since for _, prefix in heads), 1)
        scores = [
            1 - (now - prefix.since) / oldest + self.weight * (value - least) / spread
            for value, (_, prefix) in zip(values, heads, strict=True)
        ]
        return heads[scores.index(min(scores))][1]


def seglen(sizes: PrefixSizes) -> Weighed:
    """SegLen (SGLang, pull request 22172): the tokens to read again, with a fixed weight."""
    return Weighed(lambda prefix: sizes.of(prefix).tokens, SEGLEN_WEIGHT)


def tail_optimized(sizes: PrefixSizes) -> Weighed:
    """T-LRU (Zhang et al., Tail-Optimized Caching for LLM Inference, 2025).

    What is read again soon enough goes first, then what was used the longest ago. The tokens that a new turn is
    expected to bring are the same for all, and part of the limit.
    """
    return Weighed(lambda prefix: 1.0 + (sizes.of(prefix).tokens > _SOON), 2.0)


class Marconi(Weighed):
    """Marconi (Pan et al., MLSys 2025): computation saved for each byte, beside recency.

    The weight is 0 at first. Once something is evicted, the prompts of a window are served again in a simulation with
    each of some weights, and the one that would have hit the most tokens is taken for the next window. Which states are
    kept at all is left to `tidepool.cache.retention`, as for every policy.
    """

    def __init__(self, sizes: PrefixSizes, reuse: ReuseModel) -> None:
        super().__init__(lambda prefix: saved_for_each_byte(sizes.of(prefix)), 0.0)
        self._sizes = sizes
        self._past: deque[Served | Came] = deque(maxlen=_EVENTS)
        self._served = 0
        """Prompts in the window."""
        self._window: int | None = None
        """Prompts after which it ends; None before the first eviction."""
        self._cached_bytes = 0
        """Of all that was served before the first eviction: what the memory holds."""
        reuse.observers.append(self)

    def next_finished(self, now: int) -> CachedPrefix | None:
        """See `FinishedFirst`."""
        if self._window is None:
            self._window = min(_WINDOW * max(self._served, 1), _LONGEST_WINDOW)
        return super().next_finished(now)

    def came(self, match: PrefixMatch) -> None:
        """See `tidepool.cache.reuse.Observer`."""
        if match.place is not None:
            self._past.append(Came(match.place, shared=match.shared is not None))

    def ended(self, places: Sequence[ResumePoint], tokens: int, now: int) -> None:
        """See `tidepool.cache.reuse.Observer`."""
        keys = tuple(place.key for place in places if place.kept and not place.distance)
        if keys:
            size = self._sizes.of_tokens(tokens)
            self._past.append(Served(keys, size, now))
            self._served += 1
            if self._window is None:
                self._cached_bytes += size.bytes
        if self._window is not None and self._served >= self._window:
            self.weight = max(MARCONI_WEIGHTS, key=lambda weight: hits(self._past, self._cached_bytes, weight))
            self._past.clear()
            self._served = 0


class Came(NamedTuple):
    """A prompt came that continues an earlier one."""

    place: Hashable
    shared: bool
    """From a shared prefix, which stays."""


class Served(NamedTuple):
    """A prompt has ended."""

    places: tuple[Hashable, ...]
    size: Size
    now: int


def hits(past: Sequence[Came | Served], capacity: int, weight: float) -> int:
    """Tokens that a cache of so many bytes would have hit with a weight; a simulation by whole cached prefixes."""
    sizes: dict[CachedPrefix, Size] = {}
    by_place: dict[Hashable, CachedPrefix] = {}
    policy = Weighed(lambda prefix: saved_for_each_byte(sizes[prefix]), weight)
    taken = gained = 0
    for event in past:
        if isinstance(event, Came):
            prefix = by_place.get(event.place)
            if prefix not in sizes:
                continue
            gained += sizes[prefix].tokens
            if not event.shared:
                policy.drop(prefix)
                taken -= sizes.pop(prefix).bytes
            continue
        prefix = CachedPrefix(PriorityClass.FIRST, running=False)
        prefix.since = event.now
        sizes[prefix] = event.size
        by_place.update(dict.fromkeys(event.places, prefix))
        taken += event.size.bytes
        policy.keep(prefix)
        while taken > capacity and (victim := policy.victim(event.now)):
            policy.drop(victim)
            taken -= sizes.pop(victim).bytes
    return gained

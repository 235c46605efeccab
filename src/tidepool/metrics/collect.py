"""Reads the core's counts, for the stats that go to the front end.

Counters go as what was added since the last time: stats of one engine may go to several front ends, each to one, and
Prometheus adds up what they have counted. All costs O(groups), whatever the number of blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tidepool.cache import Arena, LookupResult, RetentionPolicy, ReuseModel, TokenResult
from tidepool.metrics import table
from tidepool.metrics.table import Kind, Metric

Samples = dict[str, list[tuple[tuple[str, ...], Any]]]
"""By metric, pairs of label values and a number; of a histogram, the list of what was observed."""


@dataclass(frozen=True)
class HostSide:
    """Host memory behind the device's."""

    arena: Arena
    copying: Callable[[], int]
    """Bytes under way."""
    stored: Callable[[], int]
    """Bytes copied to the host so far."""
    loaded: Callable[[], int]
    """Bytes copied to the device so far."""
    waited: Callable[[], float]
    """Seconds that requests have waited for loads so far."""
    failed: Callable[[], int]
    """Copies that failed so far."""


@dataclass(frozen=True)
class Engine:
    """What is read of one engine."""

    arena: Arena
    kinds: Sequence[str]
    """Of each group: ``states``, ``attention``, ``window``, or ``packed`` for packed states."""
    block_tokens: Sequence[int]
    """Of each group; 0 for states, packed or not."""
    config: Sequence[object]
    """Label values of `table.CONFIG_INFO`."""
    reuse: ReuseModel
    refusals: Sequence[int]
    """By group, and the last one for what is kept for running requests."""
    elastic: bool
    retention: RetentionPolicy | None = None
    """With prefix caching."""
    host: HostSide | None = None


@dataclass
class Collector:
    """Takes samples of one engine."""

    engine: Engine
    _told: dict[tuple[str, tuple[str, ...]], float] = field(default_factory=dict)
    """What was told of each counter."""

    def take(self) -> Samples:
        """The gauges, what counters have grown by since the last time, and what histograms are to observe.

        The first time every counter is there; later ones that haven't grown aren't.
        """
        samples: Samples = {}
        for metric, labels, value in self._read():
            if metric.kind == Kind.COUNTER:
                key = metric.name, labels
                told = self._told.get(key)
                if told == value:
                    continue
                self._told[key] = value
                value -= told or 0
            samples.setdefault(metric.name, []).append((labels, value))
        return samples

    def _read(self) -> Iterator[tuple[Metric, tuple[str, ...], Any]]:
        engine = self.engine
        yield table.CONFIG_INFO, tuple(map(str, engine.config)), 1
        for group, label in enumerate(self._labels()):
            pool = engine.arena.pools[group]
            sizes = engine.block_tokens[group], engine.arena.block_bytes[group], pool.blocks_per_extent
            yield table.GROUP_INFO, (*label, *map(str, sizes)), 1
            yield table.MOVES, label, pool.moves
        yield from self._tier("device", engine.arena)
        yield table.ALLOCATED, (), engine.arena.bytes_allocated
        for label, refused in zip([*self._labels(), ("", "reserve")], engine.refusals, strict=True):
            yield table.REFUSED, label, refused
        yield table.EVICTION_AGE, (), _taken(engine.arena.eviction_ages, engine.arena.total_bytes)
        yield table.RETURN_AGE, (), _taken(engine.reuse.return_ages, engine.arena.total_bytes)
        if engine.retention:
            yield from self._prefixes(engine.retention)
        if engine.host:
            yield from self._tier("host", engine.host.arena)
            yield table.COPYING, (), engine.host.copying()
            yield table.HOST_BYTES, ("to_host",), engine.host.stored()
            yield table.HOST_BYTES, ("to_device",), engine.host.loaded()
            yield table.HOST_WAIT, (), engine.host.waited()
            yield table.HOST_FAILED, (), engine.host.failed()

    def _tier(self, tier: str, arena: Arena) -> Iterator[tuple[Metric, tuple[str, ...], Any]]:
        for label, pool, usage in zip(self._labels(), arena.pools, arena.usage_of_groups(), strict=True):
            uses = ("in_use", usage.in_use), ("cached", usage.cached), ("free", usage.free), ("padding", usage.padding)
            for use, count in uses:
                yield table.MEMORY, (tier, *label, use), count
            yield table.EVICTED_BLOCKS, (tier, *label), pool.evictions
            if self.engine.elastic:
                yield table.EXTENTS, (tier, *label, "in_use"), pool.pinned
                yield table.EXTENTS, (tier, *label, "cached"), len(pool.idle)
        yield table.MEMORY, (tier, "", "", "unowned"), arena.unowned_bytes
        yield table.MEMORY, (tier, "", "", "null"), arena.null_bytes
        if self.engine.elastic:
            yield table.EXTENTS, (tier, "", "", "unowned"), arena.unowned
            yield table.EXTENTS, (tier, "", "", "null"), 1
        for priority, evicted in arena.evictions.items():
            yield table.EVICTED_PREFIXES, (tier, priority.name.lower() if priority is not None else "running"), evicted

    def _prefixes(self, retention: RetentionPolicy) -> Iterator[tuple[Metric, tuple[str, ...], Any]]:
        for result in LookupResult:
            yield table.LOOKUPS, (result.value,), retention.lookups.requests[result]
        for part in TokenResult:
            yield table.LOOKUP_TOKENS, (part.value,), retention.lookups.tokens[part]
        yield table.BRANCH_CHECKPOINTS, ("left",), retention.branch_checkpoints.left
        yield table.BRANCH_CHECKPOINTS, ("used",), retention.branch_checkpoints.used
        yield table.GIVEN_UP, (), retention.given_up

    def _labels(self) -> list[tuple[str, str]]:
        """Number and kind of each group."""
        return [(str(group), kind) for group, kind in enumerate(self.engine.kinds)]


def _taken(ages: Any, total: int) -> list[float]:
    """Take all ages out of a record, as shares of the memory."""
    taken = [age / total for age in ages]
    ages.clear()
    return taken

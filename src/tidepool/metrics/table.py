"""Every metric: the one place that names them. docs/metrics.md shows this table, and the dashboard is made from it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """Prometheus' types."""

    GAUGE = "gauge"
    COUNTER = "counter"
    HISTOGRAM = "histogram"


ENGINE_LABELS = ("model_name", "engine")
"""Labels that every metric has before its own; vLLM's have the same."""
AGE_BUCKETS = tuple(2.0**power for power in range(-6, 8))
"""Ages, in memories allocated."""


@dataclass(frozen=True)
class Metric:
    """One metric."""

    name: str
    kind: Kind
    labels: tuple[str, ...]
    help: str
    buckets: tuple[float, ...] = ()


def _gauge(name: str, labels: str, text: str) -> Metric:
    return Metric(name, Kind.GAUGE, tuple(labels.split()), text)


def _counter(name: str, labels: str, text: str) -> Metric:
    return Metric(name, Kind.COUNTER, tuple(labels.split()), text)


def _ages(name: str, text: str) -> Metric:
    return Metric(name, Kind.HISTOGRAM, (), text, AGE_BUCKETS)


MEMORY = _gauge(
    "tidepool_memory_bytes",
    "tier group kind use",
    "Bytes of KV memory by use: in_use, cached, free and padding of each group's extents or share; unowned extents; "
    "null blocks. They add up to all of a tier's memory.",
)
EXTENTS = _gauge(
    "tidepool_extents",
    "tier group kind use",
    "Extents of an elastic partition: in_use (pinned by a block in use), cached (idle, may move), unowned, null.",
)
COPYING = _gauge("tidepool_host_copying_bytes", "", "Bytes that are being copied to or from host memory.")
GROUP_INFO = _gauge(
    "tidepool_group_info",
    "group kind block_tokens block_bytes blocks_per_extent",
    "Always 1: what a group's blocks are. block_tokens is 0 for states.",
)
CONFIG_INFO = _gauge(
    "tidepool_config_info",
    "version partition eviction extent_bytes checkpoint_tokens max_num_seqs",
    "Always 1: how the memory is divided.",
)
ALLOCATED = _counter("tidepool_allocated_bytes_total", "", "Bytes handed out; the clock by which cached memory ages.")
MOVES = _counter("tidepool_extent_moves_total", "group kind", "Extents that a group got and another had before.")
EVICTED_PREFIXES = _counter(
    "tidepool_evicted_prefixes_total",
    "tier priority",
    "Cached prefixes that lost their first block, by class: first, second, later (turns of a conversation), shared, "
    "running (left so far by running requests); low: single blocks of low priority.",
)
EVICTED_BLOCKS = _counter("tidepool_evicted_blocks_total", "tier group kind", "Cached blocks that were evicted.")
LOOKUPS = _counter(
    "tidepool_prefix_lookups_total",
    "result",
    "Requests admitted, by what became of the lookup of their prompts: hit, short, no_state, evicted, other_key, new.",
)
LOOKUP_TOKENS = _counter(
    "tidepool_prefix_tokens_total",
    "result",
    "Their prompts' tokens: hit_device, hit_host, no_state, evicted, new. They add up to all of them.",
)
REFUSED = _counter(
    "tidepool_refused_requests_total",
    "group kind",
    "Waiting requests that were refused memory, by the group that lacked the most extents; kind reserve: there was "
    "memory, and running requests will need it.",
)
BRANCH_CHECKPOINTS = _counter(
    "tidepool_branch_checkpoints_total",
    "event",
    "Checkpoints at branch points: left, and those of them that a prompt has hit (used).",
)
GIVEN_UP = _counter(
    "tidepool_given_up_checkpoints_total", "", "Times that a request went on without a checkpoint for want of memory."
)
HOST_BYTES = _counter("tidepool_host_copied_bytes_total", "direction", "Bytes copied: to_host, to_device.")
HOST_WAIT = _counter("tidepool_host_wait_seconds_total", "", "Seconds that requests waited for loads from the host.")
HOST_FAILED = _counter("tidepool_host_failed_copies_total", "", "Copies between host and device that failed.")
EVICTION_AGE = _ages(
    "tidepool_eviction_age_ratio",
    "Age of cached prefixes when they were evicted from the device: bytes allocated since, over the memory's size.",
)
RETURN_AGE = _ages(
    "tidepool_return_age_ratio",
    "Age of what a prompt left when the next one came for it, still cached or not: bytes allocated since, over the "
    "memory's size.",
)

METRICS: tuple[Metric, ...] = (
    MEMORY,
    EXTENTS,
    COPYING,
    GROUP_INFO,
    CONFIG_INFO,
    ALLOCATED,
    MOVES,
    EVICTED_PREFIXES,
    EVICTED_BLOCKS,
    LOOKUPS,
    LOOKUP_TOKENS,
    REFUSED,
    BRANCH_CHECKPOINTS,
    GIVEN_UP,
    HOST_BYTES,
    HOST_WAIT,
    HOST_FAILED,
    EVICTION_AGE,
    RETURN_AGE,
)

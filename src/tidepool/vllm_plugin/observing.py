"""What an engine tells of its memory, on its way to `/metrics` of a server. See docs/metrics.md.

The engine core may be another process than the one that answers `/metrics`, and there may be several of those. vLLM
sends the scheduler's stats from the one to the other; samples travel with them, as if they were a KV connector's, and
are taken off before anybody in the front end takes them for that.
"""

from __future__ import annotations

import time
from functools import cache
from typing import TYPE_CHECKING, Any

from vllm.v1.kv_cache_interface import MambaSpec, SlidingWindowSpec

from tidepool import __version__
from tidepool.metrics import Collector, Engine, HostSide
from tidepool.metrics.export import Exporter

if TYPE_CHECKING:
    from tidepool.vllm_plugin.capacity import MeteredKVCacheManager

SECONDS = 0.25
"""From one look at the memory to the next, while the engine has requests; one more comes when it has none left."""
_KEY = "tidepool"


class Reporter:
    """Sends samples with the scheduler's stats.

    Args:
        scheduler: vLLM's, with a manager of tidepool's.
    """

    def __init__(self, scheduler: Any) -> None:
        self._model_name = scheduler.vllm_config.model_config.served_model_name
        self._collector = Collector(engine_of(scheduler))
        self._next = 0.0

    def attach(self, stats: Any) -> None:
        """Add samples to the stats of a step, if it is time."""
        now = time.monotonic()
        busy = stats.num_running_reqs or stats.num_waiting_reqs or stats.num_skipped_waiting_reqs
        if busy and now < self._next:
            return
        self._next = now + SECONDS
        told = {"model_name": self._model_name, "samples": self._collector.take()}
        stats.kv_connector_stats = (stats.kv_connector_stats or {}) | {_KEY: told}


def engine_of(scheduler: Any) -> Engine:
    """What is read of an engine."""
    manager: MeteredKVCacheManager = scheduler.kv_cache_manager
    config, memory = manager.kv_cache_config, manager.block_pool
    specs = [group.kv_cache_spec for group in config.kv_cache_groups]
    host = None
    if (behind := memory.host) is not None:
        traffic = behind.traffic
        host = HostSide(
            arena=behind.tier.arena,
            copying=lambda: behind.tier.bytes_under_way,
            stored=lambda: traffic.stored_bytes,
            loaded=lambda: traffic.loaded_bytes,
            waited=lambda: traffic.wait_seconds,
            failed=lambda: traffic.failed,
        )
    return Engine(
        arena=memory.arena,
        kinds=[_kind(spec) for spec in specs] + ["packed"] * len(config.packed),
        block_tokens=[0 if isinstance(spec, MambaSpec) else spec.block_size for spec in specs]
        + [0] * len(config.packed),
        config=(
            __version__,
            config.partition,
            config.eviction,
            config.geometry.extent_bytes if config.geometry else 0,
            config.checkpoint_tokens,
            scheduler.max_num_running_reqs,
        ),
        reuse=memory.reuse,
        refusals=manager.refusals,
        elastic=config.geometry is not None,
        retention=memory.retention,
        host=host,
    )


def _kind(spec: Any) -> str:
    if isinstance(spec, MambaSpec):
        return "states"
    return "window" if isinstance(spec, SlidingWindowSpec) else "attention"


def take_samples(stats: Any, engine: int) -> None:
    """In the front end: take an engine's samples off its stats, and give them to Prometheus."""
    if stats is None or not stats.kv_connector_stats or _KEY not in stats.kv_connector_stats:
        return
    told = stats.kv_connector_stats.pop(_KEY)
    # Whoever looks at it next takes an empty table for a connector's.
    stats.kv_connector_stats = stats.kv_connector_stats or None
    exporter().export(told["samples"], told["model_name"], engine)


@cache
def exporter() -> Exporter:
    """The one of this process."""
    return Exporter()

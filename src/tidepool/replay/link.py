"""Host memory of an engine without a model: what its workers would do, on a link of a given bandwidth.

The scheduler's side is real, tidepool's or stock vLLM's own offloading; its orders are carried out on the replay's
clock. Each direction of the link carries one copy after the other, at full speed in both at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import (
    OffloadingConnectorMetadata,
    OffloadingWorkerMetadata,
)
from vllm.v1.outputs import KVConnectorOutput

from tidepool.vllm_plugin.host_connector import Ended, HostOrders, HostReport


@dataclass
class Carried:
    """What the link has carried so far, in bytes."""

    to_host: int = 0
    from_host: int = 0
    stalled: float = 0.0
    """Seconds that steps waited for copies to the host: stock vLLM's, where it reuses blocks that are being copied."""
    waited: float = 0.0
    """Seconds that requests of stock vLLM's waited for loads, all together."""


class _UnderWay(NamedTuple):
    number: int
    end: float
    seconds: float
    request: str | None
    """That waits for it, with stock vLLM."""


class Link:
    """The link between host and device.

    Args:
        bandwidth: bytes a second in each direction.
        block_bytes: bytes of a block of stock vLLM's.
        clock: the replay's, in seconds.
    """

    def __init__(self, bandwidth: float, block_bytes: int, clock: Callable[[], float]) -> None:
        self.carried = Carried()
        self._bandwidth = bandwidth
        self._block_bytes = block_bytes
        self._clock = clock
        self._free_at = {True: 0.0, False: 0.0}
        """By whether it is to the host, when a direction has carried all that it was given."""
        self._under_way: list[_UnderWay] = []
        self._is_stock = False

    @property
    def next_end(self) -> float | None:
        """When the next copy ends; None if none is under way."""
        return min((each.end for each in self._under_way), default=None)

    def step(self, orders: Any) -> float:
        """Begin what a step orders. Returns for how many seconds the step waits first."""
        if isinstance(orders, HostOrders):
            for copy in orders.copies:
                self._begin(copy.number, copy.bytes, to_host=copy.to_host)
        elif isinstance(orders, OffloadingConnectorMetadata):
            self._is_stock = True
            return self._stock_step(orders)
        return 0.0

    def _stock_step(self, orders: OffloadingConnectorMetadata) -> float:
        for number, job in orders.store_jobs.items():
            self._begin(number, self._bytes_of(job.src_spec), to_host=True)
        for number, job in orders.load_jobs.items():
            self._begin(number, self._bytes_of(job.dst_spec), to_host=False, request=job.req_id)
        began = {job.req_id for job in orders.load_jobs.values()}
        ends = {each.request: each.end for each in self._under_way if each.request in began}
        self.carried.waited += sum(ends.values()) - len(ends) * self._clock()
        flushed = orders.jobs_to_flush or ()
        waits = max((each.end for each in self._under_way if each.number in flushed), default=0.0) - self._clock()
        self.carried.stalled += max(waits, 0.0)
        return max(waits, 0.0)

    def _bytes_of(self, spec: Any) -> int:
        """Of the blocks on the device that a job of stock vLLM's names."""
        return len(spec.block_ids) * self._block_bytes

    def _begin(self, number: int, size: int, *, to_host: bool, request: str | None = None) -> None:
        seconds = size / self._bandwidth
        self._free_at[to_host] = max(self._free_at[to_host], self._clock()) + seconds
        self._under_way.append(_UnderWay(number, self._free_at[to_host], seconds, request))
        if to_host:
            self.carried.to_host += size
        else:
            self.carried.from_host += size

    def report(self) -> KVConnectorOutput | None:
        """What the workers say of copies that have ended since the last step."""
        now = self._clock()
        ended = [each for each in self._under_way if each.end <= now]
        self._under_way = [each for each in self._under_way if each.end > now]
        if not ended:
            return None
        if not self._is_stock:
            report = HostReport({each.number: Ended(1, each.seconds) for each in ended})
            return KVConnectorOutput(kv_connector_worker_meta=report)
        meta = OffloadingWorkerMetadata()
        for each in ended:
            meta.mark_completed(each.number)
        loaded = {each.request for each in ended if each.request is not None}
        return KVConnectorOutput(finished_recving=loaded or None, kv_connector_worker_meta=meta)

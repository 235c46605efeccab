"""Host memory in a worker: its bytes, and copies between them and the device's.

A block is one piece of memory on both sides, so a copy is a few runs of neighbouring blocks. On the CPU a thread makes
them; on a GPU a stream of its own, behind what the compute stream had been given when the copy was ordered.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import psutil  # type: ignore[import-untyped]
import torch
from vllm.logger import init_logger

from tidepool.cache import BlockCopy, CacheConfigError, Copy
from tidepool.vllm_plugin.worker import ArenaBytes

if TYPE_CHECKING:
    from tidepool.vllm_plugin.planning import TidepoolKVCacheConfig

logger = init_logger("vllm.tidepool")


class EndedCopy(NamedTuple):
    """A copy that has ended here."""

    number: int
    seconds: float
    failed: bool


class HostBytes:
    """The host memory of one rank, and the device's that it is behind.

    Args:
        config: the rank's KV cache configuration.
        any_view: the KV cache of any layer; None on a pipeline stage without any.

    Raises:
        CacheConfigError: the machine doesn't give so much memory.
    """

    def __init__(self, config: TidepoolKVCacheConfig, any_view: torch.Tensor | None) -> None:
        assert config.host_geometry
        self.device = ArenaBytes(config, any_view)
        self.strides = tuple(layout.stride for layout in config.host_geometry.layouts)
        size = config.host_extents * config.host_geometry.extent_bytes
        self.pinned = self.device.arena.is_cuda
        size = size if any_view is not None else 0
        what = f"{size:,} bytes of {'pinned ' if self.pinned else ''}host memory"
        advice = "Lower --kv-offloading-size (or the setting host_memory)."
        # The machine gives addresses for more than it has, and ends a process that uses them.
        if size > (available := psutil.virtual_memory().available):
            raise CacheConfigError(f"tidepool is to take {what}, and {available:,} are available here. {advice}")
        try:
            self.bytes = torch.empty(size, dtype=torch.uint8)
            if self.pinned:
                _pin(self.bytes)
        except RuntimeError as error:
            raise CacheConfigError(
                f"This machine doesn't give tidepool {what}. {advice} {str(error).splitlines()[0]}"
            ) from error

    def pieces(self, copy: Copy) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(target, source) of each run of blocks that are neighbours on both sides, as bytes without gaps.

        Where a block is padded, each is a run of its own: with gaps torch would gather them first, and wait for that.
        """
        for group, device, host, blocks in runs(copy.blocks):
            length = self.device.block_bytes[group]
            if not length:
                continue  # a pipeline stage without the group's layers
            strides = self.device.strides[group], self.strides[group]
            together = blocks if strides == (length, length) else 1
            for first in range(0, blocks, together):
                starts = (device + first) * strides[0], (host + first) * strides[1]
                on_device = self.device.arena[starts[0] : starts[0] + together * length]
                on_host = self.bytes[starts[1] : starts[1] + together * length]
                yield (on_host, on_device) if copy.to_host else (on_device, on_host)

    def close(self) -> None:
        """Give the memory back; no copy is under way any more."""
        if self.pinned and self.bytes.numel():
            torch.cuda.cudart().cudaHostUnregister(self.bytes.data_ptr())
        self.bytes = torch.empty(0, dtype=torch.uint8)

    def poison(self, blocks: Iterable[tuple[int, int]]) -> None:
        """Fill (group, block) on the host, which no copy reads or writes any more: whoever does shows it."""
        for group, block in blocks:
            start = block * self.strides[group]
            self.bytes[start : start + self.device.block_bytes[group]].fill_(self.device.poison[group])


def _pin(memory: torch.Tensor) -> None:
    """Have the driver pin memory. torch's own pinned memory is rounded up to a power of two.

    Raises:
        RuntimeError: the machine doesn't allow so much.
    """
    if memory.numel() and (code := int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0))):
        raise RuntimeError(f"cudaHostRegister gave error {code}.")


def runs(blocks: Iterable[BlockCopy]) -> Iterator[tuple[int, int, int, int]]:
    """(group, first block on the device, first on the host, blocks) of runs that are neighbours on both sides."""
    group = device = host = -1
    count = 0
    for each in sorted(blocks):
        if count and each == (group, device + count, host + count):
            count += 1
            continue
        if count:
            yield group, device, host, count
        (group, device, host), count = each, 1
    if count:
        yield group, device, host, count


class Copier(Protocol):
    """Makes copies in the background."""

    def begin(self, copies: Iterable[Copy]) -> None:
        """Make these copies behind all that this thread has begun before."""

    def ended(self) -> list[EndedCopy]:
        """Those that have ended since the last call."""

    def close(self) -> None:
        """Wait for what is under way, and end."""


def make_copier(memory: HostBytes) -> Copier:
    """What makes copies on this device."""
    return CudaCopier(memory) if memory.device.arena.is_cuda else ThreadCopier(memory)


class ThreadCopier:
    """Copies on the CPU: a thread makes one after the other."""

    def __init__(self, memory: HostBytes) -> None:
        self._memory = memory
        self._orders: SimpleQueue[Copy | None] = SimpleQueue()
        self._ended: SimpleQueue[EndedCopy] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="tidepool-host", daemon=True)
        self._thread.start()

    def begin(self, copies: Iterable[Copy]) -> None:
        """See `Copier`."""
        for copy in copies:
            self._orders.put(copy)

    def ended(self) -> list[EndedCopy]:
        """See `Copier`."""
        ended = []
        while not self._ended.empty():
            ended.append(self._ended.get())
        return ended

    def close(self) -> None:
        """See `Copier`."""
        self._orders.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (copy := self._orders.get()) is not None:
            began, failed = time.monotonic(), False
            try:
                for target, source in self._memory.pieces(copy):
                    target.copy_(source)
            except RuntimeError:
                logger.exception("tidepool: a copy %s host memory failed.", "to" if copy.to_host else "from")
                failed = True
            self._ended.put(EndedCopy(copy.number, time.monotonic() - began, failed))


class CudaCopier:
    """Copies on a GPU: a stream for each direction, and an event at the end of each copy."""

    def __init__(self, memory: HostBytes) -> None:
        self._memory = memory
        device = memory.device.arena.device
        self._streams = {True: torch.cuda.Stream(device), False: torch.cuda.Stream(device)}
        """By `Copy.to_host`."""
        self._under_way: list[tuple[Copy, Any, Any]] = []
        """With the events at its beginning and end."""

    def begin(self, copies: Iterable[Copy]) -> None:
        """See `Copier`."""
        copies = list(copies)
        if not copies:
            return
        before = torch.cuda.current_stream().record_event()
        for stream in self._streams.values():
            stream.wait_event(before)
        for copy in copies:
            stream = self._streams[copy.to_host]
            with torch.cuda.stream(stream):
                began = torch.cuda.Event(enable_timing=True)
                ended = torch.cuda.Event(enable_timing=True)
                began.record(stream)
                for target, source in self._memory.pieces(copy):
                    target.copy_(source, non_blocking=True)
                ended.record(stream)
            self._under_way.append((copy, began, ended))

    def ended(self) -> list[EndedCopy]:
        """See `Copier`."""
        done: list[EndedCopy] = []
        under_way = []
        for copy, began, ended in self._under_way:
            if ended.query():
                done.append(EndedCopy(copy.number, began.elapsed_time(ended) / 1000, False))
            else:
                under_way.append((copy, began, ended))
        self._under_way = under_way
        return done

    def close(self) -> None:
        """See `Copier`."""
        for stream in self._streams.values():
            stream.synchronize()

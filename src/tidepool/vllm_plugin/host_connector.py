"""Host memory behind the pools, as a KV connector: how copies get to the workers, and word of their end back.

vLLM asks a connector whether a waiting request has to wait for something, hands its orders to all workers with each
step, and their reports back. Nothing else of a connector is used: what is loaded goes into the device's cache, see
`tidepool.vllm_plugin.host`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.logger import init_logger

from tidepool.cache import Copy
from tidepool.vllm_plugin.host_copies import Copier, HostBytes, make_copier

if TYPE_CHECKING:
    from tidepool.vllm_plugin.coordinator import TidepoolKVCacheManager
    from tidepool.vllm_plugin.host import HostMemory

logger = init_logger("vllm.tidepool")

FULL_STEP = 2
"""A step that takes at least so many parts of the tokens that one may is full of prompts: it tells how fast they are
read."""


@dataclass
class HostOrders(KVConnectorMetadata):
    """Copies to make from this step on."""

    copies: list[Copy] = field(default_factory=list)
    poison: list[tuple[int, int]] = field(default_factory=list)
    """(group, block on the host), before the copies."""


@dataclass
class Ended:
    """What ranks say of a copy that has ended."""

    ranks: int
    seconds: float
    """The longest that it took on any of them."""
    failed: bool = False


@dataclass
class HostReport(KVConnectorWorkerMetadata):
    """By number, the copies that have ended on some ranks since their last reports."""

    ended: dict[int, Ended]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> HostReport:
        """Of several ranks."""
        assert isinstance(other, HostReport)
        return HostReport(added(self.ended, other.ended))


def added(first: Mapping[int, Ended], second: Mapping[int, Ended]) -> dict[int, Ended]:
    """What two lots of ranks say together."""
    ended = dict(first)
    for number, more in second.items():
        known = ended.get(number)
        ended[number] = (
            more
            if known is None
            else Ended(known.ranks + more.ranks, max(known.seconds, more.seconds), known.failed or more.failed)
        )
    return ended


class HostConnector(KVConnectorBase_V1, SupportsHMA):
    """The connector of an engine with host memory behind its pools."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._ranks: int = vllm_config.parallel_config.world_size
        self._step_tokens: int = vllm_config.scheduler_config.max_num_batched_tokens
        # In the scheduler.
        self._manager: TidepoolKVCacheManager | None = None
        self._reported: dict[int, Ended] = {}
        """Copies that have ended on some ranks and not on all."""
        self._full_since: tuple[float, int] | None = None
        """When the last step began, and its tokens, if it was full of prompts."""
        # In a worker.
        self._memory: HostBytes | None = None
        self._copier: Copier | None = None

    @property
    def requires_kv_delivery(self) -> bool:
        """A copy that isn't made is a hit less."""
        return False

    # The scheduler.

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        """The cache that this is behind."""
        super().bind_kv_cache_manager(kv_cache_manager)
        self._manager = kv_cache_manager

    @property
    def host(self) -> HostMemory:
        """What the host holds."""
        assert self._manager
        assert self._manager.host
        return self._manager.host

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """None while a request waits for a load. What is loaded counts as computed by the device's cache."""
        assert self._manager
        computed = self._manager.computed_tokens(request)
        return (None if self.host.delays(self._manager, request, computed) else 0), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Nothing comes from outside."""

    def build_connector_meta(self, scheduler_output: Any) -> HostOrders:
        """The copies to make; and notes how long full steps take."""
        now, tokens = self.host.clock(), scheduler_output.total_num_scheduled_tokens
        if self._full_since is not None:
            began, before = self._full_since
            self.host.speeds.read(before, now - began)
        self._full_since = (now, tokens) if tokens * FULL_STEP >= self._step_tokens else None
        copies = self.host.copies()
        return HostOrders(copies, self.host.poisoned())

    def update_connector_output(self, connector_output: Any) -> None:
        """Copies have ended on some ranks."""
        report = connector_output.kv_connector_worker_meta
        if report is None:
            return
        self._reported = added(self._reported, report.ended)
        for number in report.ended:
            if (ended := self._reported[number]).ranks == self._ranks:
                del self._reported[number]
                self.host.ended(number, failed=ended.failed, seconds=ended.seconds)

    def has_pending_push_work(self) -> bool:
        """Whether steps have to go on without requests, for the sake of copies."""
        return self._manager is not None and self.host.busy

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        """Blocks needn't stay: those that are copied are referenced."""
        return False, None

    def reset_cache(self) -> bool:
        """Forget what the host holds."""
        self.host.reset()
        return True

    # A worker.

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Take the host memory of this rank."""
        view = next(iter(kv_caches.values()), None)
        self._memory = HostBytes(self._kv_cache_config, view)
        self._copier = make_copier(self._memory)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Begin the copies of this step, behind everything that was begun before."""
        assert self._copier
        assert self._memory
        orders = self._get_connector_metadata()
        assert isinstance(orders, HostOrders)
        self._memory.poison(orders.poison)
        self._copier.begin(orders.copies)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nobody waits for a layer."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is saved by layers."""

    def wait_for_save(self) -> None:
        """Copies end when they end."""

    def build_connector_worker_meta(self) -> HostReport | None:
        """The copies that have ended since the last step."""
        ended = self._copier.ended() if self._copier else []
        return HostReport({each.number: Ended(1, each.seconds, each.failed) for each in ended}) if ended else None

    def shutdown(self) -> None:
        """End."""
        if self._copier and self._memory:
            self._copier.close()
            self._memory.close()
            self._copier = self._memory = None

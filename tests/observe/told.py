"""What a server tells, made of samples as an engine sends them, without any server."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest

from tidepool.cache import (
    Arena,
    CheckpointRules,
    ExpectedReturn,
    ExtentLayout,
    Geometry,
    RetentionPolicy,
    ReuseModel,
)
from tidepool.metrics import Collector, Engine, HostSide
from tidepool.metrics.export import Exporter

UNIT = 16
GEOMETRY = Geometry(1_000, (ExtentLayout(490, 500, 2), ExtentLayout(160, 200, 5)))


def engine(*, host: bool = False) -> Engine:
    """Of 9 extents of 1,000 bytes: blocks of states are 490 bytes, of attention 16 tokens in 160."""
    reuse = ReuseModel(1_000)
    arena = Arena.elastic(GEOMETRY, 9, policy=ExpectedReturn(reuse))
    rules = CheckpointRules(unit=UNIT, spacing=512, stock_block=528)
    behind = HostSide(
        Arena.elastic(GEOMETRY, 21), copying=lambda: 7, stored=lambda: 70, loaded=lambda: 30, waited=lambda: 0.5,
        failed=lambda: 1,
    )  # fmt: skip
    return Engine(
        arena=arena,
        kinds=("states", "attention"),
        block_tokens=(0, UNIT),
        config=("1.0", "elastic", "returns", 1_000, 512, 4),
        reuse=reuse,
        refusals=[0, 0, 0],
        elastic=True,
        retention=RetentionPolicy(rules, reuse, arena, key_tokens=UNIT, state_tokens=40.0),
        host=behind if host else None,
    )


def serve(watched: Engine, name: str, states: int, attention: int) -> tuple[list[int], list[int]]:
    """A request takes blocks of both groups."""
    assert watched.retention
    watched.retention.begin(name, [f"{name} {end}" for end in range(4)])
    return tuple(watched.arena.allocate(g, n, request=name) for g, n in enumerate((states, attention)))  # type: ignore[return-value]


class Told:
    """The front end of some engines."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._exporter = Exporter(self.registry)
        self.requests = {"running": 0.0, "waiting": 0.0}
        self.usage = 0.5

    def hear(self, collector: Collector, engine: int = 0) -> None:
        self._exporter.export(collector.take(), 'a "model"', engine)

    @property
    def text(self) -> str:
        """At ``/metrics``."""
        labels = '{model_name="a \\"model\\"",engine="0"}'
        vllm = [f"vllm:num_requests_{kind}{labels} {count}" for kind, count in self.requests.items()]
        vllm += [f"vllm:kv_cache_usage_perc{labels} {self.usage}", f"vllm:num_preemptions_total{labels} 0.0"]
        return "\n".join([generate_latest(self.registry).decode(), *vllm, ""])

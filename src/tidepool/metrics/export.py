"""In the front end: hands samples to Prometheus' own classes, in the registry that vLLM's metrics are in.

These classes are what works with several front ends, too, where each writes to files and every scrape adds them up.
"""

from __future__ import annotations

from typing import Any

from tidepool.metrics.collect import Samples
from tidepool.metrics.table import ENGINE_LABELS, METRICS, Kind, Metric


class Exporter:
    """The metrics of one process. Make it once: a registry refuses a second metric of the same name.

    Args:
        registry: Prometheus'; None for the one that vLLM's metrics are in.
    """

    def __init__(self, registry: Any = None) -> None:
        self._metrics = {metric.name: (metric, _make(metric, registry)) for metric in METRICS}

    def export(self, samples: Samples, model_name: str, engine: int) -> None:
        """Tell Prometheus what an engine has sent."""
        for name, values in samples.items():
            metric, exported = self._metrics[name]
            for labels, value in values:
                child = exported.labels(model_name, str(engine), *labels)
                if metric.kind == Kind.GAUGE:
                    child.set(value)
                elif metric.kind == Kind.COUNTER:
                    child.inc(value)
                else:
                    for each in value:
                        child.observe(each)


def _make(metric: Metric, registry: Any) -> Any:
    from prometheus_client import REGISTRY, Counter, Gauge, Histogram

    labels, registry = (*ENGINE_LABELS, *metric.labels), registry or REGISTRY
    if metric.kind == Kind.GAUGE:
        return Gauge(metric.name, metric.help, labels, registry=registry, multiprocess_mode="mostrecent")
    if metric.kind == Kind.COUNTER:
        return Counter(metric.name, metric.help, labels, registry=registry)
    return Histogram(metric.name, metric.help, labels, registry=registry, buckets=metric.buckets)

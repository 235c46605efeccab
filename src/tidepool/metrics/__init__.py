"""What a server tells of its memory: the table of metrics, what is read of the core, and how Prometheus gets it.

The engine core counts (`collect`), and vLLM's stats carry the counts to the front end, which exports them (`export`).
Neither vLLM nor torch is imported here.
"""

from tidepool.metrics.collect import Collector, Engine, HostSide, Samples
from tidepool.metrics.table import METRICS, Kind, Metric

__all__ = ["METRICS", "Collector", "Engine", "HostSide", "Kind", "Metric", "Samples"]

"""A Grafana dashboard, made from the table of metrics, so that it can't name one that isn't there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tidepool.metrics import Kind, Metric, table
from tidepool.observe.scrape import FIRST_TOKEN, PREEMPTIONS, RUNNING, USAGE, WAITING

_ROW, _HEIGHT, _COLUMNS = 24, 8, 2
_SELECTED = 'model_name=~"$model",engine=~"$engine"'
_UID = "tidepool"


@dataclass(frozen=True)
class Panel:
    """One graph: queries, each with the name of its curves."""

    title: str
    queries: Sequence[tuple[str, str]]
    unit: str = "short"
    stacked: bool = False
    description: str = ""


def gauge(metric: Metric, *by: str, where: str = "") -> str:
    """The query of a gauge, summed over all labels but these."""
    return f"sum by ({', '.join(by)}) ({metric.name}{{{_SELECTED}{where}}})"


def rate(metric: Metric, *by: str, where: str = "") -> str:
    """The query of a counter's growth a second."""
    return f"sum by ({', '.join(by)}) (rate({metric.name}{{{_SELECTED}{where}}}[$__rate_interval]))"


def quantile(name: str, share: float) -> str:
    """The query of a histogram's quantile."""
    return f"histogram_quantile({share}, sum by (le) (rate({name}_bucket{{{_SELECTED}}}[$__rate_interval])))"


def _of_vllm(name: str) -> str:
    return f"sum({name}{{{_SELECTED}}})"


_DEVICE, _HOST = ',tier="device"', ',tier="host"'
_TOKENS = f"sum(rate({table.LOOKUP_TOKENS.name}{{{_SELECTED}}}[$__rate_interval]))"
_AGES = ((0.5, "half of the evictions"), (0.9, "nine of ten evictions"))
_RETURNS = ((0.5, "half of the returns"), (0.9, "nine of ten returns"))

PANELS: tuple[Panel, ...] = (
    Panel(
        "KV memory",
        [(gauge(table.MEMORY, "kind", "use", where=_DEVICE), "{{kind}} {{use}}")],
        "bytes",
        stacked=True,
        description=table.MEMORY.help,
    ),
    Panel(
        "Requests",
        [(_of_vllm(RUNNING), "running"), (_of_vllm(WAITING), "waiting")],
        description="A request waits for memory while the usage is 1.",
    ),
    Panel("Usage", [(f"max({USAGE}{{{_SELECTED}}})", "usage")], "percentunit"),
    Panel(
        "Refused and preempted a second",
        [
            (rate(table.REFUSED, "kind"), "refused: {{kind}}"),
            (f"sum(rate({PREEMPTIONS}{{{_SELECTED}}}[$__rate_interval]))", "preempted"),
        ],
        description=table.REFUSED.help,
    ),
    Panel(
        "Prompt tokens by what became of them",
        [(f"{rate(table.LOOKUP_TOKENS, 'result')} / ignoring(result) group_left {_TOKENS}", "{{result}}")],
        "percentunit",
        stacked=True,
        description=table.LOOKUP_TOKENS.help,
    ),
    Panel(
        "Lookups a second",
        [(rate(table.LOOKUPS, "result"), "{{result}}")],
        stacked=True,
        description=table.LOOKUPS.help,
    ),
    Panel(
        "Evicted prefixes a second",
        [(rate(table.EVICTED_PREFIXES, "tier", "priority"), "{{tier}} {{priority}}")],
        description=table.EVICTED_PREFIXES.help,
    ),
    Panel(
        "Evicted blocks a second",
        [(rate(table.EVICTED_BLOCKS, "tier", "kind"), "{{tier}} {{kind}}")],
        description=table.EVICTED_BLOCKS.help,
    ),
    Panel(
        "Ages at eviction and at return, in memories allocated",
        [
            *((quantile(table.EVICTION_AGE.name, share), words) for share, words in _AGES),
            *((quantile(table.RETURN_AGE.name, share), words) for share, words in _RETURNS),
        ],
        description="Returns that come later than evictions are misses: more memory, or host memory, would hold them.",
    ),
    Panel("Extents", [(gauge(table.EXTENTS, "tier", "kind", "use"), "{{tier}} {{kind}} {{use}}")], stacked=True),
    Panel("Extents that move a second", [(rate(table.MOVES, "kind"), "to {{kind}}")], description=table.MOVES.help),
    Panel("Allocated a second", [(rate(table.ALLOCATED), "device")], "Bps", description=table.ALLOCATED.help),
    Panel(
        "Checkpoints at branch points a second",
        [(rate(table.BRANCH_CHECKPOINTS, "event"), "{{event}}")],
        description=table.BRANCH_CHECKPOINTS.help,
    ),
    Panel("Checkpoints given up a second", [(rate(table.GIVEN_UP), "all")], description=table.GIVEN_UP.help),
    Panel(
        "Host memory",
        [(gauge(table.MEMORY, "kind", "use", where=_HOST), "{{kind}} {{use}}")],
        "bytes",
        stacked=True,
    ),
    Panel(
        "Copies between host and device",
        [
            (rate(table.HOST_BYTES, "direction"), "{{direction}} a second"),
            (gauge(table.COPYING), "under way"),
            (rate(table.HOST_FAILED), "failed copies a second"),
        ],
        "bytes",
    ),
    Panel(
        "Seconds waited for loads, a second",
        [(rate(table.HOST_WAIT), "all requests together")],
        "s",
        description=table.HOST_WAIT.help,
    ),
    Panel("Time to first token", [(quantile(FIRST_TOKEN, 0.5), "half"), (quantile(FIRST_TOKEN, 0.95), "95%")], "s"),
    Panel(
        "Groups and configuration",
        [
            (
                gauge(table.GROUP_INFO, *table.GROUP_INFO.labels),
                "group {{group}}: {{kind}}, blocks of {{block_bytes}} B",
            ),
            (gauge(table.CONFIG_INFO, *table.CONFIG_INFO.labels), "{{partition}}, tidepool {{version}}"),
        ],
    ),
)


def names_in(expression: str) -> set[str]:
    """The metrics that a query names, as Prometheus has them: those with a selector."""
    return {part.split("(")[-1].split(" ")[-1] for part in expression.split("{")[:-1]} - {""}


def series_of(metric: Metric) -> set[str]:
    """The names under which Prometheus keeps a metric."""
    if metric.kind == Kind.HISTOGRAM:
        return {f"{metric.name}_{part}" for part in ("bucket", "sum", "count")}
    return {metric.name}


def dashboard() -> dict[str, Any]:
    """Grafana's model of a dashboard, for its import page."""
    width = _ROW // _COLUMNS
    source = {"type": "prometheus", "uid": "${source}"}
    panels = [
        {
            "id": number + 1,
            "type": "timeseries",
            "title": panel.title,
            "description": panel.description,
            "datasource": source,
            "gridPos": {
                "x": number % _COLUMNS * width,
                "y": number // _COLUMNS * _HEIGHT,
                "w": width,
                "h": _HEIGHT,
            },
            "fieldConfig": {
                "defaults": {
                    "unit": panel.unit,
                    "min": 0,
                    "custom": {
                        "fillOpacity": 60 if panel.stacked else 0,
                        "stacking": {"mode": "normal" if panel.stacked else "none"},
                    },
                },
                "overrides": [],
            },
            "options": {"legend": {"displayMode": "table", "placement": "right", "calcs": ["lastNotNull"]}},
            "targets": [
                {"refId": chr(ord("A") + index), "expr": query, "legendFormat": legend, "datasource": source}
                for index, (query, legend) in enumerate(panel.queries)
            ],
        }
        for number, panel in enumerate(PANELS)
    ]
    named = table.CONFIG_INFO.name
    return {
        "uid": _UID,
        "title": "tidepool",
        "description": "The KV memory of hybrid models on vLLM: what it holds, and why prompts hit or miss.",
        "tags": ["vllm", "tidepool"],
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {
            "list": [
                {"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus"},
                _variable("model", f"label_values({named}, model_name)"),
                _variable("engine", f'label_values({named}{{model_name=~"$model"}}, engine)'),
            ]
        },
        "panels": panels,
    }


def _variable(name: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${source}"},
        "query": {"query": query, "refId": name},
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
        "refresh": 2,
    }

"""Reads what a server answers at `/metrics`."""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Mapping
from http.client import HTTPException
from urllib.parse import urlsplit

from tidepool.command_line import UsageError
from tidepool.metrics.table import MEMORY

SECONDS = 10.0
"""Within which a server must answer."""
RUNNING = "vllm:num_requests_running"
WAITING = "vllm:num_requests_waiting"
USAGE = "vllm:kv_cache_usage_perc"
PREEMPTIONS = "vllm:num_preemptions_total"
FIRST_TOKEN = "vllm:time_to_first_token_seconds"
VLLM_METRICS = (RUNNING, WAITING, USAGE, PREEMPTIONS, FIRST_TOKEN)
"""vLLM's own metrics that are looked at here."""

_SAMPLE = re.compile(r"^([A-Za-z_:][A-Za-z0-9_:]*)(?:\{(.*)\})? (\S+)(?: \d+)?$", re.MULTILINE)
_LABEL = re.compile(r'([A-Za-z_][A-Za-z0-9_]*)="((?:[^"\\]|\\.)*)"')
_ESCAPED = re.compile(r"\\(.)")


class Scrape:
    """The numbers of one answer.

    Args:
        text: in Prometheus' text format.
    """

    def __init__(self, text: str) -> None:
        self._samples: defaultdict[str, list[tuple[Mapping[str, str], float]]] = defaultdict(list)
        for name, labels, value in _SAMPLE.findall(text):
            found = {label: _ESCAPED.sub(_unescaped, content) for label, content in _LABEL.findall(labels)}
            self._samples[name].append((found, float(value)))

    def __contains__(self, name: str) -> bool:
        return name in self._samples

    def rows(self, name: str) -> list[tuple[Mapping[str, str], float]]:
        """(labels, value) of a metric; none if there is no such metric."""
        return self._samples.get(name, [])

    def total(self, name: str, **labels: str) -> float:
        """The sum over all label values but those given."""
        return sum(value for found, value in self.rows(name) if labels.items() <= found.items())

    def by(self, name: str, *labels: str) -> dict[tuple[str, ...], float]:
        """Sums by the values of these labels."""
        sums: defaultdict[tuple[str, ...], float] = defaultdict(float)
        for found, value in self.rows(name):
            sums[tuple(found.get(label, "") for label in labels)] += value
        return dict(sums)

    def quantile(self, name: str, share: float) -> float | None:
        """The upper bound of the histogram's bucket that this share of its observations doesn't exceed; None if there
        are no observations."""
        buckets = sorted((float(bound), count) for (bound,), count in self.by(f"{name}_bucket", "le").items())
        count = buckets[-1][1] if buckets else 0
        return next((bound for bound, below in buckets if below >= share * count), None) if count else None


def scrape(url: str) -> Scrape:
    """What a server with tidepool answers.

    Args:
        url: of the server, like http://localhost:8000; with or without the scheme, and with or without /metrics.

    Raises:
        UsageError: there is no server, it isn't vLLM's, or its memory isn't tidepool's; one sentence.
    """
    found = Scrape(_fetch(url))
    if RUNNING not in found:
        raise UsageError(f"{url} answers, but not as a server of vLLM's does: it has no metric {RUNNING}.")
    if MEMORY.name not in found:
        raise UsageError(
            f"{url} is a server of vLLM's that tells nothing of tidepool: vLLM's own memory serves it (its log says "
            "why), or it has had no request yet, or --disable-log-stats."
        )
    return found


def _fetch(url: str) -> str:
    """What is at ``/metrics``, without any proxy for the machine itself."""
    full = url if "://" in url else f"http://{url}"
    full = full.rstrip("/").removesuffix("/metrics") + "/metrics"
    try:
        local = (urlsplit(full).hostname or "") in ("localhost", "127.0.0.1", "::1", "0.0.0.0")
        handlers = [urllib.request.ProxyHandler({})] if local else []
        with urllib.request.build_opener(*handlers).open(full, timeout=SECONDS) as answer:
            text: str = answer.read().decode(errors="replace")
            return text
    except urllib.error.HTTPError as error:
        raise UsageError(f"{full} answers with {error.code} {error.reason}, not with metrics.") from None
    except (OSError, ValueError, HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise UsageError(f"There is no server at {url}: {getattr(reason, 'strerror', None) or reason}.") from None


def _unescaped(match: re.Match[str]) -> str:
    return "\n" if match[1] == "n" else match[1]

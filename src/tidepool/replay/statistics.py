"""Small statistics."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tidepool.replay.job import Spread


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` (0 to 1) of ``ordered`` don't exceed."""
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


def spread(values: Iterable[float]) -> Spread:
    """Mean and percentiles of at least one value."""
    ordered = sorted(values)
    return Spread(
        mean=sum(ordered) / len(ordered),
        p50=percentile(ordered, 0.5),
        p95=percentile(ordered, 0.95),
        p99=percentile(ordered, 0.99),
    )


def median(values: Iterable[float]) -> float:
    """The lower median of at least one value."""
    return percentile(sorted(values), 0.5)

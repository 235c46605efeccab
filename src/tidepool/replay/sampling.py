"""Looks at a replay, evenly over virtual time, however long it turns out to be."""

from __future__ import annotations

from collections.abc import Callable

from tidepool.replay.job import Sample

FEWEST = 200
"""Samples that are kept at least, of a replay with so many steps."""
_SHORTEST = 0.05
"""Seconds between the first samples where all requests arrive at once."""


class Sampler:
    """Keeps `FEWEST` to twice as many samples: when there are more, every second goes and the interval doubles.

    Args:
        seconds: how long the requests arrive; the first interval is a share of it.
        look: takes a sample.
    """

    def __init__(self, seconds: float, look: Callable[[], Sample]) -> None:
        self._interval = max(_SHORTEST, seconds / FEWEST)
        self._look = look
        self._next = 0.0
        self.samples: list[Sample] = []

    def offer(self, now: float) -> bool:
        """Take a sample if it is time. Returns whether it was."""
        if now < self._next:
            return False
        self.samples.append(self._look())
        if len(self.samples) >= 2 * FEWEST:
            del self.samples[1::2]
            self._interval *= 2
        self._next = now + self._interval
        return True

    def close(self) -> None:
        """Take the last sample."""
        self.samples.append(self._look())

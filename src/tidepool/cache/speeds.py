"""Whether a prefix is loaded from host memory or read anew: from what both were measured to take."""

from __future__ import annotations

READING = 10_000.0
"""Tokens a second that are taken to be read before any were."""
LOADING = 10e9
"""Bytes a second that are taken to be copied before any were: what a slow link reaches."""
_PRIOR_SECONDS = 0.05
"""How long either is taken to have been measured to begin with."""
_HALVE_AFTER = 10.0
"""Seconds measured after which older ones weigh half."""


class _Speed:
    """Units a second, recent ones weighing most."""

    def __init__(self, prior: float) -> None:
        self._units = prior * _PRIOR_SECONDS
        self._seconds = _PRIOR_SECONDS

    def saw(self, units: float, seconds: float) -> None:
        self._units += units
        self._seconds += seconds
        if self._seconds >= _HALVE_AFTER:
            self._units, self._seconds = self._units / 2, self._seconds / 2

    def seconds(self, units: float) -> float:
        return units * self._seconds / self._units


class Speeds:
    """The record of both."""

    def __init__(self) -> None:
        self._reading = _Speed(READING)
        self._loading = _Speed(LOADING)

    def read(self, tokens: int, seconds: float) -> None:
        """A step that was full of prompts took so long."""
        self._reading.saw(tokens, seconds)

    def loaded(self, size: int, seconds: float) -> None:
        """A copy of so many bytes from the host took so long."""
        self._loading.saw(size, seconds)

    def worth_loading(self, tokens: int, size: int, ahead: int) -> bool:
        """Whether loading is quicker than reading.

        Args:
            tokens: that needn't be read then.
            size: bytes to load.
            ahead: bytes that are being loaded for others.
        """
        return self._loading.seconds(size + ahead) < self._reading.seconds(tokens)

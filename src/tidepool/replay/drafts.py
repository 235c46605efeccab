"""Speculative decoding without a drafter: drafts of no content, accepted as often as the user says."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Drafts:
    """How a step drafts."""

    tokens: int
    """Drafted for each request in a step."""
    acceptance: float
    """How likely it is of a draft to be accepted where those before it were, 0 to 1."""
    seed: int

    def accepted(self, request: str, position: int, drafted: int) -> int:
        """How many of the first ``drafted`` are accepted; the same for a request's token in every run.

        Args:
            request: its id.
            position: its tokens so far.
            drafted: how many were scheduled.
        """
        rng = random.Random(f"{self.seed} {request} {position}")
        return next((count for count in range(drafted) if rng.random() >= self.acceptance), drafted)

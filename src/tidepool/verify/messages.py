"""What a worker process tells the command: the content of `tidepool.running`'s lines."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """What a worker runs on; its first line."""

    vllm: str
    torch: str
    device: str
    gated: bool
    """Whether tidepool falls back to vLLM on this device unless a user opens the gate, as the worker does."""


@dataclass(frozen=True)
class Counts:
    """What happened in one run; the names are those of `tidepool.verify.scenarios.Count`."""

    cut: int = 0
    """Prompts that took more than one step."""
    preemptions: int = 0
    moves: int = 0
    """Extents that changed hands; 0 without extents."""
    hit_tokens: int = 0
    """Prompt tokens taken from the prefix cache."""
    evictions: int = 0
    """Cached blocks that were evicted."""
    aborted: int = 0
    """Requests that were aborted while they held memory."""


@dataclass(frozen=True)
class Outcome:
    """One scenario on one side."""

    answers: dict[str, list[int]]
    """Token ids of every request that wasn't aborted, by its place in the order of sending."""
    counts: Counts
    usage_at_end: float
    """Share of the memory in use when all requests had ended; 0 unless something leaked."""
    seconds: float

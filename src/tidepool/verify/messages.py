"""What a worker process tells the command: the content of `tidepool.running`'s lines."""

from __future__ import annotations

from dataclasses import dataclass

from tidepool.certificates import Setup


@dataclass(frozen=True)
class Machine:
    """What a worker runs on; its first line."""

    vllm: str
    torch: str
    device: str
    certifies: bool
    """Whether tidepool serves here only with a certificate."""
    memory: int = 0
    """Bytes of the device's memory; 0 on a CPU."""


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
    far: int = 0
    """Byte of the lowest block handed out, null blocks aside, where a scenario wants all far from the start and they
    were."""
    accepted: int = 0
    """Tokens that were drafted and accepted."""
    loads: int = 0
    """Prefixes that were loaded from host memory."""
    unpacked: int = 0
    """Packed states that requests went on from."""


@dataclass(frozen=True)
class Outcome:
    """One scenario on one side."""

    answers: dict[str, list[int]]
    """Token ids of every request that wasn't aborted, by its place in the order of sending."""
    counts: Counts
    logprobs: dict[str, list[dict[str, float]]]
    """Where answers are neither right nor wrong, as `tidepool.running.agreement` wants them."""
    setup: Setup | None
    """What the engine was in a certificate's terms; None for stock vLLM's."""
    usage_at_end: float
    """Share of the memory in use when all requests had ended; 0 unless something leaked."""
    seconds: float

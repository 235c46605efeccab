"""What the command and its workers tell each other: the content of `tidepool.running`'s lines."""

from __future__ import annotations

from dataclasses import dataclass

from tidepool.sides import Side


@dataclass(frozen=True)
class Job:
    """A worker's first message."""

    side: Side
    model: str
    """A model directory."""
    kv_bytes: int


@dataclass(frozen=True)
class Facts:
    """An engine's memory, as it stands after start."""

    served: bool
    """Whether tidepool serves the engine; where it should and doesn't, nothing is measured."""
    attention_block_tokens: int
    groups: int
    capacity_tokens: int
    """The longest request that would fit, whatever length the model itself allows."""
    state_bytes: int
    """Natural bytes that one request's states take, copies for prefix caching included."""
    max_num_seqs: int


@dataclass(frozen=True)
class Run:
    """One workload, run once."""

    seconds: float
    cpu_seconds: float
    """Computing time of the worker's process: like ``seconds`` on an idle machine, and steady on a busy one."""
    steps: int
    peak_requests: int
    """The most requests that held memory in one engine step."""
    mean_requests: float
    """Requests that held memory, averaged over the steps."""
    preemptions: int
    prompt_tokens: int
    hit_tokens: int
    """Prompt tokens taken from the prefix cache."""
    output_tokens: int
    outputs: dict[str, list[int]]
    """Token ids, by request."""
    logprobs: dict[str, list[dict[str, float]]]
    """`tidepool.running.agreement.Logprobs` of each request."""

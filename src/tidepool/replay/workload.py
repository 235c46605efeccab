"""The requests of a job: read from a trace, or generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tidepool.replay.answers import with_answers, with_own_tokens, without_reasoning
from tidepool.replay.formats import read_trace
from tidepool.replay.generate import generate
from tidepool.replay.job import Job
from tidepool.replay.trace import Skipped, TraceError, TraceRequest


@dataclass(frozen=True)
class Workload:
    """What a replay serves."""

    requests: Sequence[TraceRequest]
    """With their answers, in the order of their arrival; at least one."""
    skipped: Sequence[Skipped] = field(default_factory=list)
    """What was left out of the trace."""
    notes: Sequence[str] = ()
    """Sentences on what the trace's format doesn't record."""

    @property
    def longest(self) -> int:
        """Tokens of the longest request and its answer."""
        return max(request.input_tokens + request.output_tokens for request in self.requests)


def load_workload(job: Job, *, strict: bool = False) -> Workload:
    """Read or generate it.

    Args:
        job: what to read.
        strict: whether a line that is no request is an error.

    Raises:
        TraceError: the trace can't be read, or there is no such workload.
    """
    skipped: Sequence[Skipped] = ()
    notes: Sequence[str] = ()
    if job.workload is not None:
        requests = generate(job.workload, job.requests, job.seed)
    else:
        tokenizer = None if job.tokenizer is None else Path(job.tokenizer)
        trace = read_trace(Path(job.trace or ""), job.requests, strict=strict, tokenizer=tokenizer)
        requests, skipped, notes = with_answers(trace.requests), trace.skipped, trace.notes
    return Workload(with_own_tokens(without_reasoning(requests, job.drop_reasoning, job.seed)), skipped, notes)


def leave_out_long(workload: Workload, tokens: int, why: str, *, strict: bool = False) -> Workload:
    """The same without requests whose prompt and answer have more than ``tokens`` tokens together.

    Args:
        workload: what there is.
        tokens: the limit.
        why: what they are too long for, in words.
        strict: whether such a request is an error.

    Raises:
        TraceError: there is one and ``strict``, or nothing is left.
    """
    kept = [request for request in workload.requests if request.input_tokens + request.output_tokens <= tokens]
    if len(kept) == len(workload.requests):
        return workload
    long = [request for request in workload.requests if request.input_tokens + request.output_tokens > tokens]
    reason = f"longer than the {tokens:,} tokens {why}"
    if strict or not kept:
        first = long[0]
        length = f"{first.input_tokens:,} + {first.output_tokens:,} tokens"
        where = f"The request of line {first.line}" if first.line else "A request"
        raise TraceError(f"{where} ({length}) is {reason}{'' if kept else ', and so are all others'}.")
    return replace(
        workload, requests=kept, skipped=[*workload.skipped, *(Skipped(request.line, reason) for request in long)]
    )

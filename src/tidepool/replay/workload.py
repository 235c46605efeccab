"""The requests of a job: read from a trace, or generated."""

from __future__ import annotations

from pathlib import Path

from tidepool.replay.answers import with_answers, with_own_tokens, without_reasoning
from tidepool.replay.generate import generate
from tidepool.replay.job import Job
from tidepool.replay.trace import TraceRequest, read_trace


def load_workload(job: Job) -> list[TraceRequest]:
    """The requests with their answers, in the order of their arrival.

    Raises:
        TraceError: the trace can't be read, or there is no such workload.
    """
    if job.workload is not None:
        requests = generate(job.workload, job.requests, job.seed)
    else:
        requests = with_answers(read_trace(Path(job.trace or ""), job.requests))
    return with_own_tokens(without_reasoning(requests, job.drop_reasoning, job.seed))

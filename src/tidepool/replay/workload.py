"""The requests of a job: read from a trace, or generated."""

from __future__ import annotations

from pathlib import Path

from tidepool.replay.generate import generate
from tidepool.replay.job import Job
from tidepool.replay.trace import TraceRequest, read_trace


def load_workload(job: Job) -> list[TraceRequest]:
    """The requests, in the order of their arrival.

    Raises:
        TraceError: the trace can't be read, or there is no such workload.
    """
    if job.workload is not None:
        return generate(job.workload, job.requests, job.seed)
    return read_trace(Path(job.trace or ""), job.requests)

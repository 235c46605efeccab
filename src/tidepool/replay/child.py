"""A replay's child process, which runs one mode: an engine can't be taken down, and the plugin is set once a process.

It is told a `Job`, and answers with the number of requests that have ended, now and then, and at last with the result
or with the sentence that says why there is none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tidepool.replay.job import Job
from tidepool.replay.workload import load_workload
from tidepool.running.child import Answer, run
from tidepool.vllm_plugin.served import NotServedError


def main() -> None:
    """Run the mode that the command names."""
    run(_replay)


def _replay(messages: Iterator[dict[str, Any]], answer: Answer) -> None:
    job = Job.from_dict(next(messages))
    requests = load_workload(job)
    from tidepool.replay.run import ReplayError, run_job

    try:
        answer(run_job(job, requests, lambda done: answer({"progress": done})).to_dict())
    except (ValueError, ReplayError, NotServedError) as error:
        # vLLM says with a ValueError that the memory doesn't hold the longest request, and so does tidepool.
        answer({"refused": str(error)})


if __name__ == "__main__":
    main()

"""A replay's child process: ``python -m tidepool.replay.child JOB RESULT``.

It runs one mode, since an engine can't be taken down and the plugin is set once a process. Progress goes to stdout, a
line ``progress N`` at a time; a result, or the sentence that says why there is none, goes to the file RESULT.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tidepool.replay.job import Job
from tidepool.replay.workload import load_workload


def main(job_file: str, result_file: str) -> int:
    """Run the job. Returns the exit code."""
    job = Job.read(Path(job_file))
    requests = load_workload(job)
    from tidepool.replay.run import ReplayError, run_job
    from tidepool.vllm_plugin.served import NotServedError

    try:
        result = run_job(job, requests, lambda done: print(f"progress {done}", flush=True))
        content = result.to_dict()
    except (ValueError, ReplayError, NotServedError) as error:
        # vLLM says with a ValueError that the memory doesn't hold the longest request, and so does tidepool.
        content = {"error": str(error)}
    Path(result_file).write_text(json.dumps(content), encoding="utf-8")
    return 1 if "error" in content else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))

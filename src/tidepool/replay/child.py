"""A replay's child process, which runs one mode: an engine can't be taken down, and the plugin is set once a process.

It is told a `Job` and where its requests are. It answers with the number of requests that have ended, now and then, and
at last with the result or with the sentence that says why there is none.
"""

from __future__ import annotations

import os
import pickle
import select
import shutil
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

from tidepool.replay.job import Job
from tidepool.running.child import Answer, run
from tidepool.vllm_plugin.served import NotServedError

FOLDER = "TIDEPOOL_REPLAY_FOLDER"
"""Names the environment variable with the folder that goes if the parent ends before it has removed it."""


def main() -> None:
    """Run the mode that the command names."""
    if folder := os.environ.get(FOLDER):
        Thread(target=_end_with_parent, args=(folder,), daemon=True).start()
    run(_replay)


def _replay(messages: Iterator[dict[str, Any]], answer: Answer) -> None:
    asked = next(messages)
    job = Job.from_dict(asked["job"])
    requests = pickle.loads(Path(asked["requests"]).read_bytes())
    from tidepool.replay.run import ReplayError, run_job

    try:
        answer(run_job(job, requests, lambda done: answer({"progress": done})).to_dict())
    except (ValueError, ReplayError, NotServedError) as error:
        # vLLM says with a ValueError that the memory doesn't hold the longest request, and so does tidepool.
        answer({"refused": str(error)})


def _end_with_parent(folder: str) -> None:
    """Wait until the parent is gone, whose end of the pipe closes then however it ended, and leave nothing behind."""
    pipe = select.poll()
    pipe.register(0, 0)
    pipe.poll()
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


if __name__ == "__main__":
    main()

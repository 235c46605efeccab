"""A replay's child process, which runs one mode: an engine can't be taken down, and the plugin is set once a process.

It is told a `Job`, where its requests are, and which folder goes if its parent ends before it. It answers with the
number of requests that have ended, now and then, and at last with the result or with the sentence that says why there
is none.
"""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

from tidepool.replay.job import Job
from tidepool.running.child import Answer, run
from tidepool.vllm_plugin.served import NotServedError


def main() -> None:
    """Run the mode that the command names."""
    run(_replay)


def _replay(messages: Iterator[dict[str, Any]], answer: Answer) -> None:
    asked = next(messages)
    job, folder = Job.from_dict(asked["job"]), Path(asked["folder"])
    Thread(target=_end_with_parent, args=(folder,), daemon=True).start()
    requests = pickle.loads(Path(asked["requests"]).read_bytes())
    from tidepool.replay.run import ReplayError, run_job

    try:
        answer(run_job(job, requests, lambda done: answer({"progress": done})).to_dict())
    except (ValueError, ReplayError, NotServedError) as error:
        # vLLM says with a ValueError that the memory doesn't hold the longest request, and so does tidepool.
        answer({"refused": str(error)})


def _end_with_parent(folder: Path) -> None:
    """Wait until the parent is gone, whose end of the pipe closes then however it ended, and leave nothing behind."""
    while os.read(0, 1 << 16):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


if __name__ == "__main__":
    main()

"""Runs modes, each in a process of its own, and shows how far they are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from tidepool.replay.job import TITLES, Job, Mode, Result

_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}
"""For the children, where the user hasn't set them: no threads for a model that isn't there, and a quiet log."""
_LOG_LINES = 15


class ModeError(RuntimeError):
    """A mode that gave no result; the message says why."""


def run_jobs(jobs: Sequence[Job], requests: int, console: Console) -> tuple[list[Result], dict[Mode, str]]:
    """Run every job, one after the other, so that their processor times compare.

    Args:
        jobs: what to run.
        requests: how many requests each of them serves.
        console: where the progress is shown.

    Returns:
        (results of the modes that ran, and for the others what they or the end of their logs say).
    """
    columns = (
        TextColumn("{task.description:<22}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    results: list[Result] = []
    failures: dict[Mode, str] = {}
    with Progress(*columns, console=console) as progress:
        tasks = [progress.add_task(TITLES[job.mode], total=requests, start=False) for job in jobs]
        for job, task in zip(jobs, tasks, strict=True):
            progress.start_task(task)
            try:
                results.append(_run_job(job, partial(_show, progress, task)))
                progress.update(task, completed=requests)
            except ModeError as error:
                failures[job.mode] = str(error)
            progress.stop_task(task)
    return results, failures


def _show(progress: Progress, task: TaskID, done: int) -> None:
    progress.update(task, completed=done)


def _run_job(job: Job, on_progress: Callable[[int], None]) -> Result:
    with tempfile.TemporaryDirectory(prefix="tidepool-replay-") as folder:
        job_file, result_file, log_file = (Path(folder, name) for name in ("job.json", "result.json", "log.txt"))
        job.write(job_file)
        command = [sys.executable, "-m", "tidepool.replay.child", str(job_file), str(result_file)]
        with (
            log_file.open("w", encoding="utf-8") as log,
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, env=_ENVIRONMENT | os.environ
            ) as process,
        ):
            assert process.stdout is not None
            for line in process.stdout:
                word, _, number = line.partition(" ")
                if word == "progress":
                    on_progress(int(number))
        if not result_file.exists():
            tail = log_file.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
            raise ModeError("It failed. The end of its log:\n" + "\n".join(tail))
        content = json.loads(result_file.read_text(encoding="utf-8"))
        if "error" in content:
            raise ModeError(content["error"])
        return Result.from_dict(content)

"""Runs modes, each in a process of its own, and shows how far they are."""

from __future__ import annotations

import os
import pickle
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from tidepool.replay.child import FOLDER
from tidepool.replay.job import TITLES, Job, Mode, Result
from tidepool.replay.trace import TraceRequest
from tidepool.running.environment import environment_of
from tidepool.running.process import Child, ChildError

_LOG_LINES = 15


class ModeError(RuntimeError):
    """A mode that gave no result; the message says why."""


def run_jobs(
    jobs: Sequence[Job], requests: Sequence[TraceRequest], console: Console, environ: Mapping[str, str] = os.environ
) -> tuple[list[Result], dict[Mode, str]]:
    """Run every job, one after the other, so that their processor times compare.

    Args:
        jobs: what to run.
        requests: what each of them serves.
        console: where the progress is shown.
        environ: of their processes, without what each mode needs.

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
    with _folder() as folder, Progress(*columns, console=console) as progress:
        pickled = folder / "requests"
        pickled.write_bytes(pickle.dumps(requests))
        tasks = [progress.add_task(TITLES[job.mode], total=len(requests), start=False) for job in jobs]
        for job, task in zip(jobs, tasks, strict=True):
            progress.start_task(task)
            try:
                results.append(_run_job(job, pickled, partial(_show, progress, task), environ))
                progress.update(task, completed=len(requests))
            except ModeError as error:
                failures[job.mode] = str(error)
            progress.stop_task(task)
    return results, failures


def _show(progress: Progress, task: TaskID, done: int) -> None:
    progress.update(task, completed=done)


@contextmanager
def _folder() -> Iterator[Path]:
    """A folder for everything that a replay and its processes write, which goes also when this process is ended."""

    def end(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    in_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP) if in_main}
    try:
        with tempfile.TemporaryDirectory(prefix="tidepool-replay-", ignore_cleanup_errors=True) as folder:
            yield Path(folder)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run_job(job: Job, requests: Path, on_progress: Callable[[int], None], environ: Mapping[str, str]) -> Result:
    folder = requests.parent
    # A quiet log, where the user hasn't asked for another: only its end is ever shown.
    environ = (
        {"VLLM_LOGGING_LEVEL": "WARNING"}
        | environment_of(job.side, environ)
        | {"TMPDIR": str(folder), FOLDER: str(folder)}
    )
    log = folder / "log.txt"
    with Child("tidepool.replay.child", log, environ) as child:
        child.send({"job": asdict(job), "requests": str(requests)})
        try:
            while "progress" in (answer := child.receive()):
                on_progress(answer["progress"])
        except ChildError as error:
            tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
            raise ModeError(f"It failed: {error.reason}. The end of its log:\n" + "\n".join(tail)) from error
    if "refused" in answer:
        raise ModeError(answer["refused"])
    return Result.from_dict(answer)

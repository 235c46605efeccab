"""Runs the sides, each in a worker process of its own, side by side if there are cores for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Timer
from typing import IO, Any

from tidepool.compare.drive import worker_environment
from tidepool.compare.messages import Side
from tidepool.verify.messages import ALIVE, Counts, Machine, Outcome
from tidepool.verify.scenarios import Part

ANSWER_SECONDS = 600.0
"""A worker that writes nothing for so long is ended: to start, or for one step of up to 16,384 tokens."""


@dataclass
class Results:
    """What the workers told."""

    machine: Machine | None = None
    outcomes: dict[Part, Outcome] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    """Why a side ended early, a sentence each; the other sides were then ended too."""


def run(parts: Sequence[Part], directory: Path, progress: Callable[[str], None]) -> Results:
    """Run all parts.

    Args:
        parts: those of one side are run one after the other.
        directory: for the workers' logs.
        progress: told what ended, after each part.
    """
    directory.mkdir(parents=True, exist_ok=True)
    sides = list(dict.fromkeys(part.side for part in parts))
    results, stop = Results(), Event()
    workers: list[subprocess.Popen[str]] = []
    with ThreadPoolExecutor(min(len(sides), os.cpu_count() or 1)) as pool:
        try:
            sides_done = [
                pool.submit(
                    _run_side,
                    side,
                    [part for part in parts if part.side == side],
                    directory,
                    results,
                    stop,
                    progress,
                    workers,
                )
                for side in sides
            ]
            for done in sides_done:
                done.result()
        except BaseException:
            # Ctrl-C, above all: nobody waits for the sides to end by themselves.
            stop.set()
            for worker in workers:
                worker.kill()
            raise
    return results


def _run_side(
    side: Side,
    parts: Sequence[Part],
    directory: Path,
    results: Results,
    stop: Event,
    progress: Callable[[str], None],
    workers: list[subprocess.Popen[str]],
) -> None:
    if stop.is_set():
        return
    path = directory / f"{side}.log"
    with (
        path.open("w", encoding="utf-8") as log,
        subprocess.Popen(
            [sys.executable, "-m", "tidepool.verify.worker", side, *(part.key for part in parts)],
            stdout=subprocess.PIPE,
            stderr=log,
            env=worker_environment(os.environ) | {"TIDEPOOL": "off" if side == "stock" else side},
            text=True,
        ) as worker,
    ):
        assert worker.stdout is not None
        workers.append(worker)
        try:
            if stop.is_set():
                return
            results.machine = Machine(**_receive(worker, worker.stdout))
            for part in parts:
                content = _receive(worker, worker.stdout)
                results.outcomes[part] = Outcome(**content | {"counts": Counts(**content["counts"])})
                progress(f"{part.scenario.title}, {part.memory}")
                if stop.is_set():
                    return
        except WorkerError as error:
            results.errors.append(f"{side}: {error}; its log is {path}.")
            stop.set()
        finally:
            worker.kill()


class WorkerError(Exception):
    """A worker ended before its time; the message says why."""


def _receive(worker: subprocess.Popen[str], lines: IO[str]) -> dict[str, Any]:
    """The next answer; raises `WorkerError` in place of one."""
    while (content := _receive_line(worker, lines)) == ALIVE:
        pass
    return content


def _receive_line(worker: subprocess.Popen[str], lines: IO[str]) -> dict[str, Any]:
    alarm = Timer(ANSWER_SECONDS, worker.kill)
    began = time.monotonic()
    alarm.start()
    line = lines.readline()
    alarm.cancel()
    silent = time.monotonic() - began >= ANSWER_SECONDS
    ended = f"no answer in {ANSWER_SECONDS:.0f} s" if silent else "the process ended"
    content: dict[str, Any] = json.loads(line) if line.endswith("\n") else {"error": ended}
    if "error" in content:
        raise WorkerError(content["error"])
    return content

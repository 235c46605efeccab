"""Runs the sides, each in a worker process of its own, side by side if there are cores for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

from tidepool.running.environment import environment_of
from tidepool.running.process import Child, ChildError
from tidepool.sides import Side
from tidepool.verify.messages import Counts, Machine, Outcome
from tidepool.verify.scenarios import Part


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
    sides = list(dict.fromkeys(part.side for part in parts))
    results, stop = Results(), Event()
    children: list[Child] = []
    with ThreadPoolExecutor(min(len(sides), os.cpu_count() or 1)) as pool:
        try:
            sides_done = [
                pool.submit(
                    _run_side,
                    side,
                    [part for part in parts if part.side == side],
                    directory / f"{side}.log",
                    results,
                    stop,
                    progress,
                    children,
                )
                for side in sides
            ]
            for done in sides_done:
                done.result()
        except BaseException:
            # Ctrl-C, above all: nobody waits for the sides to end by themselves.
            stop.set()
            for child in children:
                child.kill()
            raise
    return results


def _run_side(
    side: Side,
    parts: Sequence[Part],
    log: Path,
    results: Results,
    stop: Event,
    progress: Callable[[str], None],
    children: list[Child],
) -> None:
    if stop.is_set():
        return
    with Child("tidepool.verify.worker", log, environment_of(side, os.environ)) as child:
        children.append(child)
        child.send({"side": side, "parts": [part.key for part in parts]})
        try:
            if stop.is_set():
                return
            results.machine = Machine(**child.receive())
            for part in parts:
                content = child.receive()
                results.outcomes[part] = Outcome(**content | {"counts": Counts(**content["counts"])})
                progress(f"{part.scenario.title}, {part.memory}")
                if stop.is_set():
                    return
        except ChildError as error:
            results.errors.append(f"{side}: {error}")
            stop.set()

"""Runs the parts in worker processes: a process for each side, and side by side if there are cores for it.

On a GPU a scenario that takes all memory has a process of its own, while no other runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

from tidepool.certificates import Setup
from tidepool.running.environment import environment_of
from tidepool.running.process import Child, ChildError
from tidepool.sides import Side
from tidepool.verify.messages import Counts, Machine, Outcome
from tidepool.verify.scenarios import Part


@dataclass(frozen=True)
class _Lane:
    """What one process runs."""

    side: Side
    runner: int
    alone: str
    """The scenario that has the whole device, if it is one."""

    @property
    def name(self) -> str:
        """Of its log, and in errors."""
        return self.side + f"-runner{self.runner}" * bool(self.runner) + f"-{self.alone}" * bool(self.alone)

    @property
    def environ(self) -> dict[str, str]:
        """The environment of its process."""
        chosen = {"VLLM_USE_V2_MODEL_RUNNER": str(self.runner - 1)} if self.runner else {}
        return environment_of(self.side, os.environ) | chosen


@dataclass
class Results:
    """What the workers told."""

    machine: Machine | None = None
    outcomes: dict[Part, Outcome] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    """Why a side ended early, a sentence each; the other sides were then ended too."""


def run(
    parts: Sequence[Part], directory: Path, progress: Callable[[str], None], options: Sequence[str] = ()
) -> Results:
    """Run all parts.

    Args:
        parts: those of one process are run one after the other.
        directory: for the workers' logs, and for models that they write.
        progress: told what ended, after each part.
        options: of vLLM's, for every engine.
    """
    lanes: dict[_Lane, list[Part]] = {}
    for part in parts:
        alone = part.scenario.name if part.scenario.far and part.runner else ""
        lanes.setdefault(_Lane(part.side, part.runner, alone), []).append(part)
    results, stop = Results(), Event()
    children: list[Child] = []

    def run_lane(lane: _Lane) -> None:
        if not stop.is_set():
            _run_lane(lane, lanes[lane], directory, options, results, stop, progress, children)

    beside = [lane for lane in lanes if not lane.alone]
    with ThreadPoolExecutor(max(1, min(len(beside), os.cpu_count() or 1))) as pool:
        try:
            for done in [pool.submit(run_lane, lane) for lane in beside]:
                done.result()
            for lane in lanes:
                if lane.alone:
                    run_lane(lane)
        except BaseException:
            # Ctrl-C, above all: nobody waits for the workers to end by themselves.
            stop.set()
            for child in children:
                child.kill()
            raise
    return results


def _run_lane(
    lane: _Lane,
    parts: Sequence[Part],
    directory: Path,
    options: Sequence[str],
    results: Results,
    stop: Event,
    progress: Callable[[str], None],
    children: list[Child],
) -> None:
    with Child("tidepool.verify.worker", directory / f"{lane.name}.log", lane.environ) as child:
        children.append(child)
        told = [{"scenario": part.scenario.name, "poison": part.poison, "fault": part.fault} for part in parts]
        models = str(directory / "models" / lane.name)
        child.send({"side": lane.side, "parts": told, "options": list(options), "models": models})
        try:
            if stop.is_set():
                return
            results.machine = Machine(**child.receive())
            for part in parts:
                results.outcomes[part] = _outcome(child.receive())
                progress(f"{part.scenario.title}, {part.memory}")
                if stop.is_set():
                    return
        except ChildError as error:
            results.errors.append(f"{lane.name}: {error}")
            stop.set()


def _outcome(content: dict[str, Any]) -> Outcome:
    setup = content["setup"]
    return Outcome(**content | {"counts": Counts(**content["counts"]), "setup": setup and Setup(*setup)})

"""Runs the parts in worker processes: a process for each side, and side by side if there are cores for it.

On a GPU each side has several processes, for an engine takes long to start there. A scenario that takes all memory has
a process of its own, while no other runs; where half of it is plenty, while one other like it runs.
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

ENGINES_OF_A_LANE = 3
"""On a GPU."""
SHARE, HALF_SHARE = 0.92, 0.46
"""Of the device's memory, for scenarios that want all of it: what vLLM takes by default, or half of that."""
HALF_IS_PLENTY = 76 << 30
"""Bytes of a device whose half is more than 32 GiB: 2^31 loads of 16 bytes, the widest there are."""


@dataclass
class _Lane:
    """What one process runs, on engines one after the other."""

    side: Side
    runner: int
    alone: str
    """The scenario that has the whole device, or half of it, if it is one."""
    number: int = 0
    """Of several for the same side."""
    parts: list[Part] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Of its log, and in errors."""
        words = (self.side, self.runner and f"runner{self.runner}", self.alone, self.number and str(self.number))
        return "-".join(str(word) for word in words if word)

    @property
    def engines(self) -> int:
        """How many it starts."""
        return len({part.engine for part in self.parts})

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
    """Why a process ended early, a sentence each."""


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
    lanes, results, children, stop = lanes_of(parts), Results(), list[Child](), Event()

    def run_lanes(lanes: Sequence[_Lane], at_once: int, share: float = 0.0) -> None:
        with ThreadPoolExecutor(at_once) as pool:
            try:
                for done in [
                    pool.submit(_run_lane, lane, share, directory, options, results, progress, children, stop)
                    for lane in lanes
                ]:
                    done.result()
            except BaseException:
                # Ctrl-C, above all: nobody waits for the workers to end by themselves.
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                for child in children:
                    child.kill()
                raise

    run_lanes([lane for lane in lanes if not lane.alone], os.cpu_count() or 1)
    halves = results.machine is not None and results.machine.memory >= HALF_IS_PLENTY
    run_lanes([lane for lane in lanes if lane.alone], 2 if halves else 1, HALF_SHARE if halves else SHARE)
    return results


def lanes_of(parts: Sequence[Part]) -> list[_Lane]:
    """The processes that run these parts, in the order in which they begin."""
    lanes: list[_Lane] = []
    for part in parts:
        alone = part.scenario.name if part.scenario.far and part.runner and part.side != "stock" else ""
        same = [lane for lane in lanes if (lane.side, lane.runner, lane.alone) == (part.side, part.runner, alone)]
        full = part.runner and same and same[-1].engines >= ENGINES_OF_A_LANE
        if not same or (full and part.engine not in {each.engine for each in same[-1].parts}):
            same.append(_Lane(part.side, part.runner, alone, len(same)))
            lanes.append(same[-1])
        same[-1].parts.append(part)
    return lanes


def _run_lane(
    lane: _Lane,
    share: float,
    directory: Path,
    options: Sequence[str],
    results: Results,
    progress: Callable[[str], None],
    children: list[Child],
    stop: Event,
) -> None:
    with Child("tidepool.verify.worker", directory / f"{lane.name}.log", lane.environ) as child:
        children.append(child)
        told = [
            {
                "engine": part.engine,
                "scenario": part.scenario.name,
                "checkpoint_states": part.scenario.checkpoint_states,
                "kv_bytes": part.scenario.kv_bytes,
                "must": part.scenario.must,
                "poison": part.poison,
                "fault": part.fault,
            }
            for part in lane.parts
        ]
        models = str(directory / "models" / lane.name)
        job = {"side": lane.side, "parts": told, "options": list(options), "models": models, "share": share}
        child.send(job)
        if stop.is_set():
            return
        try:
            results.machine = Machine(**child.receive())
            for part in lane.parts:
                results.outcomes[part] = _outcome(child.receive())
                progress(f"{part.scenario.title}, {part.memory}")
        except ChildError as error:
            results.errors.append(f"{lane.name}: {error}")


def _outcome(content: dict[str, Any]) -> Outcome:
    setup = content["setup"]
    return Outcome(**content | {"counts": Counts(**content["counts"]), "setup": setup and Setup(*setup)})

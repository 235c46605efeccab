"""Lets the sides of a comparison take turns, each a worker process that stays alive.

For every model and workload the sides run one after the other, several times over: stock, elastic, stock, elastic.
Speed is compared run by run, so that a machine that is busier for a while slows both. Models are measured beside
each other if there are cores for it; a worker computes on one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tidepool.compare.messages import Facts, Job, Run
from tidepool.compare.workloads import Workload
from tidepool.running.environment import environment_of
from tidepool.running.process import Child, ChildError
from tidepool.sides import Side

MAX_NUM_SEQS = 256
"""Requests that may run at once, more than fit in memory."""
FIXED_STATE_SHARE = 0.6
"""Share of the memory whose worth of states the fixed partition sets aside; its max_num_seqs follows from that."""
Progress = Callable[[str, str], None]
"""Told (model, what runs now) before each step."""


class CompareError(Exception):
    """A comparison that couldn't be made; the message is one sentence for the user."""


@dataclass(frozen=True)
class Subject:
    """A model to compare the sides on."""

    name: str
    path: Path
    kv_bytes: int
    workloads: tuple[Workload, ...]

    def steps(self, sides: int, repeats: int) -> int:
        """How often `measure` reports progress."""
        engines = len({workload.caching for workload in self.workloads})
        return sides * (engines + repeats * len(self.workloads))


@dataclass(frozen=True)
class Measured:
    """Everything measured on one model."""

    subject: Subject
    facts: dict[bool, dict[Side, Facts]]
    """Without and with prefix caching."""
    runs: dict[str, dict[Side, list[Run]]]
    """By workload."""


class Worker(Child):
    """A running worker process."""

    def __init__(self, job: Job, directory: Path) -> None:
        """Start the process; its log goes to ``directory``."""
        self.side = job.side
        self.name = f"{Path(job.model).name}, {job.side}"
        environ = environment_of(job.side, os.environ)
        super().__init__("tidepool.compare.worker", directory / f"{job.side}.log", environ)
        self.send(asdict(job))

    def start(self, caching: bool, max_num_seqs: int) -> Facts:
        """Start an engine in place of the one before."""
        return Facts(**self._ask({"do": "start", "caching": caching, "max_num_seqs": max_num_seqs}))

    def run(self, workload: Workload) -> Run:
        """Run a workload on the engine started last."""
        return Run(**self._ask({"do": "run", "workload": asdict(workload)}))

    def _ask(self, command: dict[str, Any]) -> dict[str, Any]:
        self.send(command)
        try:
            return self.receive()
        except ChildError as error:
            raise CompareError(f"vLLM failed ({self.name}): {error}") from error


def measure(
    subjects: Sequence[Subject],
    sides: Sequence[Side],
    *,
    repeats: int,
    directory: Path,
    progress: Progress = lambda model, step: None,
) -> list[Measured]:
    """Measure all sides on all models.

    Args:
        subjects: the models.
        sides: stock and what to compare with it.
        repeats: how often each side runs each workload.
        directory: for the workers' logs.
        progress: called before each step.

    Raises:
        CompareError: a worker failed; all others have been ended.
    """
    with ExitStack() as stack, ThreadPoolExecutor(min(len(subjects), os.cpu_count() or 1)) as pool:
        workers = [
            [
                stack.enter_context(Worker(Job(side, str(each.path), each.kv_bytes), directory / each.name))
                for side in sides
            ]
            for each in subjects
        ]
        lanes = [
            pool.submit(_measure_one, subject, lane, repeats, progress)
            for subject, lane in zip(subjects, workers, strict=True)
        ]
        try:
            done, _ = wait(lanes, return_when=FIRST_EXCEPTION)
            for lane in done:
                lane.result()
        except BaseException:
            # Lanes that wait for an answer get an end of file.
            for worker in (worker for lane in workers for worker in lane):
                worker.kill()
            raise
        return [lane.result() for lane in lanes]


def _measure_one(subject: Subject, workers: Sequence[Worker], repeats: int, progress: Progress) -> Measured:
    measured = Measured(subject, facts={}, runs={})
    for caching in sorted({workload.caching for workload in subject.workloads}):
        facts = measured.facts[caching] = {}
        for worker in workers:
            progress(subject.name, f"start {worker.side}")
            limit = MAX_NUM_SEQS
            if worker.side == "fixed":
                limit = fixed_max_num_seqs(subject.kv_bytes, facts["stock"].state_bytes)
            facts[worker.side] = worker.start(caching, limit)
        for workload in (each for each in subject.workloads if each.caching == caching):
            runs: dict[Side, list[Run]] = {worker.side: [] for worker in workers}
            measured.runs[workload.name] = runs
            for _ in range(repeats):
                for worker in workers:
                    progress(subject.name, f"{workload.title}, {worker.side}")
                    runs[worker.side].append(worker.run(workload))
    return measured


def fixed_max_num_seqs(kv_bytes: int, state_bytes: int) -> int:
    """Requests that the fixed partition sets states aside for.

    With `MAX_NUM_SEQS` of them nothing would be left for attention: the limit has to be chosen for the memory.

    Args:
        kv_bytes: KV memory.
        state_bytes: states of one request; 0 for a model without.
    """
    return max(1, min(MAX_NUM_SEQS, int(kv_bytes * FIXED_STATE_SHARE) // max(state_bytes, 1)))

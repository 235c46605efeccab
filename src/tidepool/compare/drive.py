"""Lets the sides of a comparison take turns, each a worker process that stays alive.

For every model and workload the sides run one after the other, several times over: stock, elastic, stock, elastic.
Speed is compared run by run, so that a machine that is busier for a while slows both. Models are measured beside
each other if there are cores for it; a worker computes on one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Timer
from typing import IO, Any, Self

from tidepool.compare.messages import Facts, Job, Run, Side
from tidepool.compare.workloads import Workload

MAX_NUM_SEQS = 256
"""Requests that may run at once, more than fit in memory."""
FIXED_STATE_SHARE = 0.6
"""Share of the memory whose worth of states the fixed partition sets aside; its max_num_seqs follows from that."""
ANSWER_SECONDS = 600.0
"""A worker that doesn't answer for so long is ended."""

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


class Worker:
    """A running worker process."""

    def __init__(self, job: Job, side: Side, directory: Path, environ: dict[str, str]) -> None:
        """Start the process; its log and its job file go to ``directory``."""
        self.side = side
        self.name = f"{Path(job.model).name}, {side}"
        directory.mkdir(parents=True, exist_ok=True)
        self.log = directory / f"{side}.log"
        job_file = directory / f"{side}.json"
        job_file.write_text(json.dumps(asdict(job)), encoding="utf-8")
        with self.log.open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tidepool.compare.worker", str(job_file), side],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environ | {"TIDEPOOL": "off" if side == "stock" else side},
                text=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()
        self._process.communicate()

    def kill(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()

    def start(self, caching: bool, max_num_seqs: int) -> Facts:
        """Start an engine in place of the one before."""
        return Facts(**self._ask({"do": "start", "caching": caching, "max_num_seqs": max_num_seqs}))

    def run(self, workload: Workload) -> Run:
        """Run a workload on the engine started last."""
        return Run(**self._ask({"do": "run", "workload": asdict(workload)}))

    def _ask(self, command: dict[str, Any]) -> dict[str, Any]:
        commands, answers = _pipe(self._process.stdin), _pipe(self._process.stdout)
        alarm = Timer(ANSWER_SECONDS, self.kill)
        alarm.start()
        try:
            commands.write(json.dumps(command) + "\n")
            commands.flush()
            line = answers.readline()
        except BrokenPipeError:
            line = ""
        finally:
            alarm.cancel()
        answer: dict[str, Any] = json.loads(line) if line.endswith("\n") else {"error": "the process ended"}
        if "error" in answer:
            raise CompareError(f"vLLM failed ({self.name}): {answer['error'].rstrip('.')}; its log is {self.log}.")
        return answer


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
    environ = worker_environment(os.environ)
    with ExitStack() as stack, ThreadPoolExecutor(min(len(subjects), os.cpu_count() or 1)) as pool:
        workers = [
            [
                stack.enter_context(Worker(Job(str(each.path), each.kv_bytes), side, directory / each.name, environ))
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


def worker_environment(environ: dict[str, str] | os._Environ[str]) -> dict[str, str]:
    """The workers' environment: one core each, unless the user has said otherwise."""
    defaults = {
        "OMP_NUM_THREADS": "1",
        # Long prompts make large tensors. By default glibc gives each back to the system, up to a third of the time.
        "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
        "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    plugins = environ.get("VLLM_PLUGINS")
    # Without the plugin there is nothing to compare, and vllm-cpu may not even import.
    named = {} if plugins is None else {"VLLM_PLUGINS": ",".join(filter(None, (plugins, "tidepool", "tidepool_early")))}
    return defaults | dict(environ) | named


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


def _pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream

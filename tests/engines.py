"""Starts real engines in processes of their own, each once for the same job: shared by tests in several folders."""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock, Timer
from typing import Any

WARM_PYTHON = Path(__file__).with_name("warm_python.py")
CHILD = Path(__file__).with_name("engine_child.py")
JOB: dict[str, Any] = {
    "poison": False,
    "fault": None,
    "rounds": 1,
    "prefix_caching": False,
    "watch": False,
    "engine": {},
}
"""What a job says unless told otherwise. It also needs ``model``, ``side`` (stock, elastic or fixed), ``kv_bytes``,
``max_num_seqs``, ``prompts`` and ``output_tokens``. ``engine`` are further arguments of vLLM's."""
ENVIRON = {
    "PYTHONPATH": os.pathsep.join([str(CHILD.parent), *filter(None, [os.environ.get("PYTHONPATH")])]),
    "HF_HUB_OFFLINE": "1",
    # One thread: rounding must not depend on how many cores a machine has.
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # Memory is tight for the sake of preemption, which hardly happens to requests that are left room.
    "TIDEPOOL_OVERCOMMIT": "1",
    # vLLM compiles a helper for log-probabilities, which takes longer than everything else here.
    "TORCHDYNAMO_DISABLE": "1",
}


def run_child(child: Path, job: dict[str, Any], *, timeout: float) -> Any:
    """Run a script that reads a job and writes its result to the file that the job names as ``answer``."""
    with TemporaryDirectory() as folder:
        answer, output = Path(folder) / "answer.json", Path(folder) / "output"
        told = {
            "script": str(child),
            "job": json.dumps(job | {"answer": str(answer)}),
            "environ": dict(os.environ) | ENVIRON,
            "output": str(output),
        }
        code = _warm_python().run(told, timeout)
        assert code == 0, output.read_text(encoding="utf-8", errors="replace")[-6000:]
        return json.loads(answer.read_text(encoding="utf-8"))


class _WarmPython:
    """The process of warm_python.py that runs this process's scripts, one after the other."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(WARM_PYTHON)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | ENVIRON,
        )
        atexit.register(self._process.kill)
        self._lock = Lock()

    def run(self, told: dict[str, Any], timeout: float) -> int:
        """Run a script. Returns its exit code; a negative one is the signal that ended it."""
        assert self._process.stdin
        assert self._process.stdout
        with self._lock:
            print(json.dumps(told), file=self._process.stdin, flush=True)
            child = int(self._process.stdout.readline())
            late = Timer(timeout, os.kill, (child, signal.SIGKILL))
            late.start()
            try:
                return int(self._process.stdout.readline())
            finally:
                late.cancel()


@cache
def _warm_python() -> _WarmPython:
    return _WarmPython()


def serve(job: dict[str, Any], child: Path = CHILD) -> dict[str, Any]:
    """The result of a job, see engine_child.py."""
    result = _serve(child, json.dumps(JOB | job, sort_keys=True))
    assert result["served"] == (job["side"] != "stock")
    return result


@cache
def _serve(child: Path, job: str) -> dict[str, Any]:
    result: dict[str, Any] = run_child(child, json.loads(job), timeout=900)
    assert result["in_use_at_end"] == 0, "blocks leaked"
    return result

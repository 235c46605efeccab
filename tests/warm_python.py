"""A Python that has imported vLLM, and forks for each script that it is told to run: the import takes ten seconds.

It reads a line of JSON for each script from standard input: ``script``, ``job`` (what the script finds on its standard
input), ``environ`` and ``output`` (the file that gets what it prints). It answers with two lines, the process's id and,
once that has ended, its exit code. Importing vLLM starts no thread and no engine, so that a fork is as good as new.
"""

from __future__ import annotations

import io
import json
import os
import runpy
import sys
import traceback
from pathlib import Path
from typing import Any


def main() -> None:
    for module in ("vllm", "vllm.v1.engine.core", "vllm.v1.worker.cpu_worker", "vllm.v1.core.sched.scheduler"):
        __import__(module)
    from vllm import LLM  # noqa: F401  (vLLM imports on demand)

    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads can't be forked"
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        told = json.loads(line)
        child = os.fork()
        if not child:
            os._exit(run(told))
        print(child, file=answers, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)


def run(told: dict[str, Any]) -> int:
    """Run a script as if it had been started by itself. Returns its exit code."""
    output = os.open(told["output"], os.O_WRONLY | os.O_CREAT, 0o600)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    sys.stdin, sys.stdout = io.StringIO(told["job"]), os.fdopen(1, "w", buffering=1)
    os.environ.clear()
    os.environ.update(told["environ"])
    sys.argv = [told["script"]]
    sys.path.insert(0, str(Path(told["script"]).parent))
    code = 0
    try:
        runpy.run_path(told["script"], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    main()

"""A process that runs vLLM, as its command sees it: JSON lines both ways, a log, and a limit to its silence."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from threading import Timer
from typing import IO, Any, Self

from tidepool.running.child import ALIVE

ANSWER_SECONDS = 600.0
"""A child that writes nothing for so long is ended."""


class ChildError(Exception):
    """A child failed; the message says why and where its log is, in one sentence."""

    def __init__(self, reason: str, log: Path) -> None:
        super().__init__(f"{reason}; its log is {log}.")
        self.reason = reason
        """Without a full stop."""


class Child:
    """A running child process; leaving its context ends it."""

    def __init__(self, module: str, log: Path, environ: Mapping[str, str]) -> None:
        """Start ``python -m MODULE``; what it and its libraries print goes to the file ``log``."""
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w", encoding="utf-8") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env=environ,
                text=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()
        self._process.communicate()

    def kill(self) -> None:
        """End the process, whatever it is doing; who waits for an answer gets a `ChildError`."""
        self._process.kill()

    def send(self, message: Mapping[str, Any]) -> None:
        """Tell it something; where it has ended, `receive` says so."""
        commands = _pipe(self._process.stdin)
        try:
            commands.write(json.dumps(message) + "\n")
            commands.flush()
        except BrokenPipeError:
            pass

    def receive(self) -> dict[str, Any]:
        """Its next answer.

        Raises:
            ChildError: it has failed, has ended or was silent for too long.
        """
        while (answer := self._receive_line()) == ALIVE:
            pass
        if "error" in answer:
            raise ChildError(answer["error"], self.log)
        return answer

    def _receive_line(self) -> dict[str, Any]:
        alarm, began = Timer(ANSWER_SECONDS, self.kill), time.monotonic()
        alarm.start()
        try:
            line = _pipe(self._process.stdout).readline()
        finally:
            # Also where a signal ends the wait: the interpreter waits for threads before it exits.
            alarm.cancel()
        if not line.endswith("\n"):
            silent = time.monotonic() - began >= ANSWER_SECONDS
            return {"error": f"no answer in {ANSWER_SECONDS:.0f} s" if silent else "the process ended"}
        answer: dict[str, Any] = json.loads(line)
        return answer


def _pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream

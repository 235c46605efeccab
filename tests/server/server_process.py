"""`tidepool serve` in a process of its own, with a bound on every wait.

A server that hangs is what these tests look for, so nothing here waits without a deadline, and `stop` leaves no process
behind: the server leads a process group of its own, which is killed as a whole.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from tidepool.verify.task import MODEL

HOST = "127.0.0.1"
NAME = "stories"
"""What the server calls the model."""
START_SECONDS = 600
"""Within which a server must answer, or have given up, on a busy machine too."""
STOP_SECONDS = 20
"""Within which it must end when asked to."""
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Server:
    """A server that is starting, running or has ended.

    Args:
        log: where it writes what it prints.
        options: of ``tidepool serve``, beside the model, its name and the address.
        environ: variables beside those of this process.
    """

    def __init__(self, log: Path, options: Sequence[str], environ: Mapping[str, str] | None = None) -> None:
        self.log = log
        self.port = _free_port()
        command = [sys.executable, "-c", "from tidepool.cli import app; app()", "serve", str(MODEL)]
        command += ["--served-model-name", NAME, "--host", HOST, "--port", str(self.port), "--enforce-eager", *options]
        # One thread: answers and times must not depend on how many cores a machine has.
        quiet = {
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | quiet | dict(environ or {}),
                start_new_session=True,
            )

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://{HOST}:{self.port}"

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def is_healthy(self) -> bool:
        """Whether it says that it can serve."""
        try:
            with _OPENER.open(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def wait_until_healthy(self) -> None:
        """Wait for the start.

        Raises:
            AssertionError: it ended instead, or didn't get ready in `START_SECONDS`.
        """
        wait_for(lambda: self.process.poll() is not None or self.is_healthy(), START_SECONDS, "the server to start")
        assert self.process.poll() is None, self.output[-4000:]

    def wait_until_ended(self, seconds: float = START_SECONDS) -> int:
        """Wait for its end and return the exit code."""
        wait_for(lambda: self.process.poll() is not None, seconds, "the server to end")
        code = self.process.returncode
        assert code is not None
        return code

    def engine_processes(self) -> list[psutil.Process]:
        """The processes of the engine core and its workers: all below the server that aren't Python's own helpers."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [
            child for child in children if "EngineCore" in child.name() or "EngineCore" in " ".join(child.cmdline())
        ]

    def post(self, path: str, body: bytes = b"", seconds: float = 300) -> tuple[int, str]:
        """Send a request as it is. Returns the status and the answer, also of requests that are refused."""
        request = urllib.request.Request(f"{self.url}{path}", body, {"Content-Type": "application/json"})
        try:
            with _OPENER.open(request, timeout=seconds) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def get(self, path: str) -> str:
        """What it answers."""
        with _OPENER.open(f"{self.url}{path}", timeout=10) as answer:
            text: str = answer.read().decode()
            return text

    def stop(self) -> None:
        """End it and everything it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(STOP_SECONDS)


def wait_for(done: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait until ``done()``.

    Raises:
        AssertionError: that took more than ``seconds``.
    """
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.1)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        port = sock.getsockname()[1]
        assert isinstance(port, int)
        return port

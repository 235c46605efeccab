"""A conversation goes on where it ended: what its turns take from the prefix cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tidepool.tiny import make_checkpoint

pytestmark = pytest.mark.vllm
BLOCK = 32
"""Tokens; the smallest block of the CPU's attention kernel, so nothing can be reused in smaller pieces."""


@pytest.mark.parametrize("family", ["qwen3.5", "nemotron-h"])
def test_turns_reuse_what_they_can(family: str, tmp_path: Path) -> None:
    model = make_checkpoint(family, tmp_path / family)  # type: ignore[arg-type]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    child = Path(__file__).with_name("chat.py")
    run = subprocess.run(
        [sys.executable, str(child), str(model), "elastic"], capture_output=True, text=True, env=environ, timeout=300
    )
    assert run.returncode == 0, run.stderr[-4000:]
    turns = json.loads(run.stdout.strip().splitlines()[-1])
    later = turns[1:]
    print(turns)
    reused, shared = (sum(turn[index] for turn in later) for index in (0, 1))
    assert reused >= 0.9 * shared, turns

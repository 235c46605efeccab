"""The sustained load of bench/soak.py in short, with host memory that holds less than the requests leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engines import ENVIRON

pytestmark = pytest.mark.vllm
SOAK = Path(__file__).parents[2] / "bench" / "soak.py"


def test_nothing_is_wrong_or_left_behind_after_aborts_resets_and_sleep(tmp_path: Path) -> None:
    told = tmp_path / "told.json"
    options = {"requests": 440, "disturb-every": 70, "host-memory": 30, "json": told}
    ran = subprocess.run(
        [sys.executable, str(SOAK), *(f"--{name}={value}" for name, value in options.items())],
        capture_output=True,
        text=True,
        env=os.environ | ENVIRON,
        timeout=600,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr[-4000:]
    soak = json.loads(told.read_text(encoding="utf-8"))
    assert not soak["wrong"]
    assert soak["right"] > 100
    assert soak["aborted"] > 50
    assert all(soak["resets"].values())
    assert all(soak["sleeps"].values())
    assert soak["loads"] >= 5
    assert soak["host_evictions"] > 50

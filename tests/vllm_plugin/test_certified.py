"""Real engines that need a certificate: served with one that covers them, left to vLLM without.

On the CPU, which needs one under a switch for tests alone.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from engines import run_child
from tidepool.testing.tiny import make_checkpoint

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm")


def test_a_certificate_opens_what_it_covers_and_nothing_else(tmp_path: Path) -> None:
    model = make_checkpoint("qwen3.5", tmp_path / "tiny")
    job = {"model": str(model), "folder": str(tmp_path / "certificates")}
    found = run_child(Path(__file__).with_name("certified_child.py"), job, timeout=600)
    assert [name for name, reason in found.items() if reason is None] == ["allowed", "covered"]
    start = "tidepool falls back to vLLM's own KV cache. device: no certificate covers this engine on CPU "
    assert all(reason is None or reason.startswith(start) for name, reason in found.items() if "allowed" not in name)
    assert found["drafts allowed as a device"].split(". ")[1].startswith("drafts: no certificate covers")
    commands = {name: reason.partition(" run: ")[2] for name, reason in found.items() if reason}
    assert commands["none"] == "tidepool verify."
    assert commands["another block"] == "tidepool verify --block-size 64."
    assert commands["another dtype"] == "tidepool verify --mamba-ssm-cache-dtype bfloat16."
    assert commands["drafts"] == "tidepool verify --ngram 3."
    assert "(the nearest is for another block)" in found["another block"]
    assert "(the nearest is for another state_dtypes)" in found["another dtype"]
    assert "nearest" not in found["cut"]
    assert "(the nearest is for another " in found["others"]

"""Real engines that need a certificate: served with one that covers them, left to vLLM without.

On the CPU, which needs one under a switch for tests alone. tests/test_certificates.py has every field of a setup.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engines import run_child
from tidepool.certificates import Setup, write
from tidepool.testing.tiny import make_checkpoint

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm")
DRAFTS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4, "prompt_lookup_min": 2}


def test_a_certificate_opens_what_it_covers_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, model = tmp_path / "certificates", make_checkpoint("qwen3.5", tmp_path / "tiny")
    monkeypatch.setenv("TIDEPOOL_CERTIFICATES", str(folder))

    def start(**arguments: Any) -> tuple[str | None, Any]:
        job = {"model": str(model), "folder": str(folder), "arguments": arguments}
        reason, setup = run_child(Path(__file__).with_name("certified_child.py"), job, timeout=300)
        return reason, setup

    reason, setup = start(additional_config={"tidepool": {"allow": ["device"]}})
    assert reason is None
    reason, _ = start()
    assert str(reason).startswith(
        "tidepool falls back to vLLM's own KV cache. device: no certificate covers this engine"
    )
    assert str(reason).endswith("run: tidepool verify.")
    path = write(Setup(*setup), "tidepool verify")
    assert start()[0] is None
    reason, _ = start(block_size=64, mamba_ssm_cache_dtype="bfloat16", speculative_config=DRAFTS)
    assert "(the nearest is for another block, state_dtypes, drafts)" in str(reason)
    assert str(reason).endswith("tidepool verify --mamba-ssm-cache-dtype bfloat16 --block-size 64 --ngram 3.")
    path.write_text(path.read_text()[:-40], encoding="utf-8")
    reason, _ = start()
    assert "no certificate covers this engine" in str(reason)
    assert "nearest" not in str(reason)

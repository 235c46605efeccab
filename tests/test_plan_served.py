"""What a plan asks the plugin's gates, without vLLM."""

import subprocess
import sys
from typing import Any

from tidepool.plan import served
from tidepool.vllm_plugin.gates import GATES

PLAIN: dict[str, Any] = {
    "gpu": False,
    "latent": False,
    "kv_dtype": "auto",
    "prefix_caching": True,
    "drafter": None,
    "family": "qwen3_5_text",
    "tp": 1,
    "pp": 1,
}


def test_every_gate_can_be_asked() -> None:
    for change in ({}, {"gpu": True}, {"drafter": "mtp"}, {"drafter": "ngram", "tp": 2}, {"prefix_caching": False}):
        config = served.engine_config(**(PLAIN | change))
        for gate in GATES:
            assert isinstance(gate.in_use(config), bool), gate.name


def test_gates_are_open_for_what_is_served() -> None:
    config = served.engine_config(**PLAIN)
    assert [gate.name for gate in GATES if gate.in_use(config)] == []
    own = served.engine_config(**(PLAIN | {"drafter": "mtp"}))
    assert [gate.name for gate in GATES if gate.in_use(own)] == []


def test_asking_needs_no_vllm() -> None:
    script = (
        "import sys; sys.modules['vllm'] = None; sys.modules['torch'] = None\n"
        "from tidepool.plan import served\n"
        "print(served.reasons(gpu=True, hybrid=True, latent=True, formats=['nvfp4'], prefix_caching=True, drafts=False,"
        " own_head=False, family='x', tp=1, pp=1))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    for name in ("mla:", "kv-cache-dtype:", "device:"):
        assert name in result.stdout

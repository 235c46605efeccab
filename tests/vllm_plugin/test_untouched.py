"""Models that tidepool doesn't serve are planned by vLLM alone, to the last field."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.vllm

_DENSE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
    "max_position_embeddings": 8192,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": _DENSE | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
    "qwen2.5": _DENSE | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
    "mixtral": _DENSE
    | {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "head_dim": 32},
    "gemma3": _DENSE
    | {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "sliding_window": 64,
        "query_pre_attn_scalar": 64,
    },
    "mamba2": {
        "model_type": "mamba2",
        "architectures": ["Mamba2ForCausalLM"],
        "hidden_size": 128,
        "num_heads": 4,
        "head_dim": 64,
        "expand": 2,
        "state_size": 64,
        "n_groups": 1,
        "num_hidden_layers": 4,
        "vocab_size": 512,
        "chunk_size": 64,
    },
}


def plan(shapes: dict[str, Any], **environ: str) -> dict[str, list[str]]:
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("describe_config.py"))],
        input=json.dumps(shapes),
        text=True,
        capture_output=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | environ,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    line = next(line for line in run.stdout.splitlines() if line.startswith("CONFIGS "))
    configs: dict[str, list[str]] = json.loads(line.removeprefix("CONFIGS "))
    return configs


def test_planning_of_other_models_is_untouched() -> None:
    from tidepool.models.catalogue import entry

    caching = {name: (config, "elastic", name != "mamba2") for name, config in MODELS.items()}
    hybrid = entry("Qwen3.5-0.8B").config
    without = plan(caching | {"hybrid": (hybrid, "elastic", True)}, VLLM_PLUGINS="tidepool_early")
    having = plan(caching | {"hybrid": (hybrid, "elastic", True), "switched off": (hybrid, "stock", True)})
    for name in MODELS:
        assert having[name] == without[name], name
        assert having[name][0] == "KVCacheConfig"
        assert having[name][2] == "KVCacheManager"
    assert having["switched off"] == without["hybrid"]
    assert having["hybrid"][0] == "TidepoolKVCacheConfig", "the comparison would also pass if the plugin never acted"
    assert without["hybrid"][0] == "KVCacheConfig"

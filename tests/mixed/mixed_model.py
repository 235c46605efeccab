"""A tiny hybrid model whose attention layers differ: after its states come full attention, a window, fewer KV heads.

vLLM's Nemotron-H takes a configuration for each layer; that of transformers has none, so `differ` gives it one.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from tidepool.testing import tiny

PATTERN = "M-M*-MM-M*-M*M-"
FULL, WINDOWED, NARROW = (index for index, kind in enumerate(PATTERN) if kind == "*")
WINDOW = 128
"""Tokens."""
LAYERS: dict[int, dict[str, int]] = {WINDOWED: {"sliding_window": WINDOW}, NARROW: {"num_key_value_heads": 1}}
"""What is different in which layers."""


def make_mixed_checkpoint(path: Path) -> Path:
    """Write the model's checkpoint."""
    from safetensors.torch import load_file, save_file

    with pytest.MonkeyPatch.context() as patch:
        config, weights = tiny._FAMILIES["nemotron-h"]
        changed = config | {"hybrid_override_pattern": PATTERN}
        patch.setitem(tiny._FAMILIES, "nemotron-h", (changed, weights))
        tiny.make_checkpoint("nemotron-h", path)
    file = path / "model.safetensors"
    tensors = load_file(file)
    for name in ("k_proj", "v_proj"):
        key = f"backbone.layers.{NARROW}.mixer.{name}.weight"
        tensors[key] = tensors[key][: config["head_dim"]].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    return path


def differ() -> None:
    """Let this process's vLLM build the model with its differences."""
    from tidepool.vllm_plugin.compat import platform_plugin

    platform_plugin()  # Before transformers, as in vLLM.
    from transformers import NemotronHConfig

    def layer_config(self: Any, index: int) -> Any:
        made = copy.copy(self)
        for key, value in LAYERS.get(index, {}).items():
            setattr(made, key, value)
        return made

    NemotronHConfig.get_nemotron_h_config_for_layer = layer_config

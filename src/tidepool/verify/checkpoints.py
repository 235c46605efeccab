"""The models that scenarios run on, as directories that vLLM loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tidepool.verify.scenarios import Model
from tidepool.verify.task import MODEL

_LAST_ATTENTION = "model.layers.7."
"""Of the trained model."""


def checkpoint_of(model: Model, folder: Path, *, head: bool = False) -> Path:
    """The directory of a model.

    Args:
        model: which.
        folder: where those that don't come with tidepool are written; one folder for each process.
        head: whether the trained model is to propose drafts with a head of its own.
    """
    path = folder / (model + "-head" * head)
    if model == "trained":
        return _with_head(path) if head else MODEL
    from tidepool.testing.tiny import make_checkpoint

    return make_checkpoint(model, path)


def _with_head(path: Path) -> Path:
    """The trained model with a head for drafts: its last layer of attention once more, untrained for it."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(MODEL, path, dirs_exist_ok=True)
    config = json.loads((MODEL / "config.json").read_text(encoding="utf-8")) | {"mtp_num_hidden_layers": 1}
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    weights = load_file(MODEL / "model.safetensors")
    size = config["hidden_size"]
    layer = {
        "mtp.layers.0." + name.removeprefix(_LAST_ATTENTION): each.clone()
        for name, each in weights.items()
        if name.startswith(_LAST_ATTENTION)
    }
    # The head sees the token that comes next and the hidden state before it: it passes on both.
    layer["mtp.fc.weight"] = torch.eye(size).repeat(1, 2).to(torch.bfloat16)
    norms = dict.fromkeys(("pre_fc_norm_embedding", "pre_fc_norm_hidden"), torch.zeros(size, dtype=torch.bfloat16))
    layer |= {f"mtp.{name}.weight": each.clone() for name, each in norms.items()}
    layer["mtp.norm.weight"] = weights["model.norm.weight"].clone()
    save_file(weights | layer, path / "model.safetensors", metadata={"format": "pt"})
    return path

"""Weights for `tidepool.testing.tiny` of families that transformers can build.

transformers gives the names, the shapes and the norms' own neutral values; what carries meaning is drawn here. So a
further family is a configuration and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from tidepool.testing.tiny import Init

LOUDNESS = 1.9
"""Standard deviation of embeddings, as of Nemotron-H's; see `tidepool.testing.tiny`."""
TIED_LOUDNESS = 0.3
"""The same where the head is the embedding too: each token would be followed by itself if it were louder."""
GAINS = {"q_proj": 2.0, "k_proj": 2.0, "o_proj": 2.0, "out_proj": 2.0}
"""What makes layers outvote the embedding now and then; other projections keep the variance of their input."""


def library_weights(init: Init, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The weights of a model under the names that its checkpoints have on the Hub."""
    from tidepool.vllm_plugin.compat import platform_plugin

    platform_plugin()  # Before transformers, as in vLLM.
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    options = dict(config)
    made = AutoConfig.for_model(options.pop("model_type"), **options)
    owner = AutoModelForImageTextToText if "vision_config" in config else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = owner.from_config(made, dtype=torch.float32)
    with torch.no_grad():
        _draw(init, model, tied=bool(config["tie_word_embeddings"]))
    with TemporaryDirectory() as folder:
        model.bfloat16().save_pretrained(folder)
        return {name: tensor.clone() for name, tensor in load_file(Path(folder, "model.safetensors")).items()}


def _draw(init: Init, model: Any, *, tied: bool) -> None:
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    for module in model.modules():
        if hasattr(module, "A_log") and hasattr(module, "dt_bias"):
            module.A_log.data, module.dt_bias.data = (each.float() for each in init.decay(len(module.A_log)))
    for name, weight in sorted(model.named_parameters()):
        if weight is embedding or weight is head:
            continue
        if name.endswith(("conv1d.weight", "conv.conv.weight")):
            weight.copy_(init.normal(*weight.shape, std=0.5))
        elif name.endswith("conv1d.bias"):
            weight.copy_(init.normal(*weight.shape, std=0.1))
        elif weight.ndim >= 2:
            inputs = weight[0].numel() if weight.ndim > 3 else weight.shape[-1]
            gain = next((gain for part, gain in GAINS.items() if part in name), 1.0)
            weight.copy_(init.normal(*weight.shape, std=gain / math.sqrt(inputs)))
    embeddings, follows = init.vocabulary(TIED_LOUDNESS if tied else LOUDNESS)
    if tied:
        embeddings[[token for token in range(len(embeddings)) if token not in init.spoken]] = 0
    embedding.copy_(embeddings)
    if not tied:
        head.copy_(follows)

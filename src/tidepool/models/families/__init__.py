"""One adapter a family: from an HF configuration to a `Model`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tidepool.models.config import Config, ModelConfigError
from tidepool.models.families import delta, mamba, plain
from tidepool.models.model import Model

FAMILIES: dict[str, Callable[[Config], Model]] = {
    "qwen3_5": delta.qwen3_next,
    "qwen3_5_text": delta.qwen3_next,
    "qwen3_5_moe": delta.qwen3_next,
    "qwen3_5_moe_text": delta.qwen3_next,
    "qwen3_next": delta.qwen3_next,
    "kimi_linear": delta.kimi_linear,
    "glm5_next": delta.glm5_next,
    "glm5_next_text": delta.glm5_next,
    "nemotron_h": mamba.nemotron_h,
    "falcon_h1": mamba.falcon_h1,
    "granitemoehybrid": mamba.granite_hybrid,
    "bamba": mamba.bamba,
    "jamba": mamba.jamba,
    "mamba2": mamba.mamba2,
    "lfm2": mamba.lfm2,
    "llama": plain.llama,
    "mistral": plain.llama,
    "qwen2": plain.llama,
    "qwen3": plain.llama,
    "mixtral": plain.mixtral,
    "gemma3": plain.gemma3,
    "gemma3_text": plain.gemma3,
    "gpt_oss": plain.gpt_oss,
}
"""Adapters by ``model_type``."""


def model_from_config(content: Mapping[str, Any]) -> Model:
    """Read the content of a ``config.json``.

    Raises:
        ModelConfigError: the family is unknown, or a key is missing or makes no sense.
    """
    config = Config(content)
    adapter = FAMILIES.get(config.model_type)
    if adapter is None:
        known = ", ".join(sorted(FAMILIES))
        raise ModelConfigError(f"Models of type {config.model_type!r} are unknown; these are known: {known}.")
    model = adapter(config)
    if not any(layer.mixers for layer in model.layers):
        raise ModelConfigError("The config describes no layer that keeps anything in a cache.")
    return model

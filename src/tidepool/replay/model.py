"""The model of a replay: what vLLM builds its layers from, without weights, and its shapes for the clock."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tidepool.models import Model, ModelConfigError, find_model, read_config
from tidepool.models.catalogue import entry
from tidepool.models.config import TEXT_KEYS
from tidepool.replay.architectures import ARCHITECTURES, TEXT_TYPES

_WEIGHTS = ("quantization_config", "compression_config", "quantization")
"""How weights are stored, which are absent: layers keep the same in the cache without them."""


@dataclass(frozen=True)
class ReplayModel:
    """A model by name, and everything that a replay needs of it."""

    name: str
    config: dict[str, Any]
    """HF-style configuration of the language model, with all its keys on one level."""
    shapes: Model


def find_replay_model(name_or_path: str) -> ReplayModel:
    """A model by catalogue name, model directory or ``config.json``.

    Raises:
        ModelConfigError: it can't be read, or no engine can be built for it.
    """
    name, source, shapes = find_model(name_or_path)
    in_catalogue = source not in (name_or_path, str(Path(name_or_path).expanduser()))
    config = language_config(entry(name_or_path).config if in_catalogue else read_config(Path(source)))
    if config["model_type"] not in ARCHITECTURES:
        raise ModelConfigError(
            f"A replay builds vLLM's own class of a model, and knows it for {', '.join(ARCHITECTURES)}, "
            f"not for {config['model_type']!r}."
        )
    if shapes.quantization.unknown:
        raise ModelConfigError(
            f"The checkpoint is quantized in a way that isn't known here ({shapes.quantization.unknown}), "
            "so how long a step takes isn't known either."
        )
    config.setdefault("max_position_embeddings", shapes.max_tokens)
    return ReplayModel(name, config, shapes)


def without_weights(config: Mapping[str, Any]) -> dict[str, Any]:
    """What vLLM needs of a configuration to build a model's layers."""
    return {key: value for key, value in config.items() if key not in _WEIGHTS}


def language_config(content: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of the language model in a wrapper's, or itself: without the class and code that it names."""
    config = dict(content)
    nested = next((content[key] for key in TEXT_KEYS if isinstance(content.get(key), Mapping)), None)
    if nested is not None:
        plain = {key: value for key, value in content.items() if key in _WEIGHTS or not isinstance(value, Mapping)}
        config = {**plain, **nested}
    kind = config["model_type"]
    for key in ("architectures", "auto_map"):
        config.pop(key, None)
    return config | {"model_type": TEXT_TYPES.get(kind, kind)}

"""Reading an HF model configuration: every missing or bad key becomes one clear sentence."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class ModelConfigError(ValueError):
    """A model or configuration that can't be read; the message is one sentence for the user."""


MAX_LAYERS = 10_000
MAX_BYTES = 1 << 26
"""Of a configuration; what is larger is something else."""
TEXT_KEYS = ("text_config", "llm_config", "language_config")
"""Under which a wrapper has its language model."""


class Config:
    """A ``config.json``, seen as the language model that it describes.

    A multimodal configuration nests its language model under ``text_config`` (or ``llm_config``): keys are
    looked up there first and then outside, where some repositories leave ``tie_word_embeddings`` or
    ``dtype``.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        candidates = (content[key] for key in TEXT_KEYS if isinstance(content.get(key), Mapping))
        nested: Mapping[str, Any] = next(candidates, {})
        self._content: dict[str, Any] = {**content, **nested}
        self.model_type = self.text("model_type")
        if self.count("num_hidden_layers") > MAX_LAYERS:
            raise ModelConfigError(f'"num_hidden_layers" of the config is over {MAX_LAYERS:,}, which is no model.')

    def has(self, *keys: str) -> bool:
        """Whether any of ``keys`` is there and not null."""
        return self._find(keys) is not None

    def positive(self, *keys: str, default: int | None = None) -> int:
        """A whole number above zero, by the first of ``keys`` that is there."""
        value = self._need(keys, default)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise ModelConfigError(f'"{keys[0]}" of the config must be a positive whole number, not {value!r}.')
        return int(value)

    def count(self, *keys: str, default: int = 0) -> int:
        """A whole number, zero allowed."""
        value = self._need(keys, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ModelConfigError(f'"{keys[0]}" of the config must be a whole number from 0, not {value!r}.')
        return int(value)

    def text(self, *keys: str, default: str | None = None) -> str:
        """A string."""
        value = self._need(keys, default)
        if not isinstance(value, str):
            raise ModelConfigError(f'"{keys[0]}" of the config must be a string, not {value!r}.')
        return value

    def flag(self, *keys: str, default: bool = False) -> bool:
        """True or false."""
        return bool(self._need(keys, default))

    def texts(self, *keys: str) -> list[str]:
        """A list of strings."""
        value = self._need(keys, None)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ModelConfigError(f'"{keys[0]}" of the config must be a list of strings.')
        return value

    def indices(self, *keys: str) -> list[int]:
        """A list of layer numbers."""
        value = self._need(keys, None)
        if not isinstance(value, list) or not all(isinstance(item, int) and item >= 0 for item in value):
            raise ModelConfigError(f'"{keys[0]}" of the config must be a list of layer numbers.')
        return value

    def table(self, key: str) -> Mapping[str, Any]:
        """A nested object; empty where it is not there."""
        value = self._content.get(key) or {}
        if not isinstance(value, Mapping):
            raise ModelConfigError(f'"{key}" of the config must be an object.')
        return value

    def _find(self, keys: tuple[str, ...]) -> Any:
        return next((self._content[key] for key in keys if self._content.get(key) is not None), None)

    def _need(self, keys: tuple[str, ...], default: Any) -> Any:
        value = self._find(keys)
        if value is not None:
            return value
        if default is None:
            kind = self._content.get("model_type")
            owner = f"a {kind} model" if isinstance(kind, str) else "the model"
            raise ModelConfigError(f'The config of {owner} needs "{keys[0]}", which is missing.')
        return default


def read_config(path: Path) -> dict[str, Any]:
    """Read ``config.json`` from a file or from the model directory that holds it.

    ModelOpt's ``hf_quant_config.json`` beside it is its quantization, where it names none itself.

    Raises:
        ModelConfigError: there is no such file, or it is not a JSON object.
    """
    file = path / "config.json" if path.is_dir() else path
    content = _read_object(file)
    beside = file.with_name("hf_quant_config.json")
    if not content.get("quantization_config") and beside.is_file():
        content["quantization_config"] = {"quant_method": "modelopt", **_read_object(beside)}
    return content


def _read_object(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            read = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise ModelConfigError(f"Can't read {file}: {error.strerror}.") from error
    if len(read) > MAX_BYTES:
        raise ModelConfigError(f"{file} is too large to be a configuration.")
    try:
        content = json.loads(read.decode("utf-8-sig"))
    except ValueError as error:
        raise ModelConfigError(f"{file} isn't valid JSON: {error}.") from error
    except RecursionError as error:
        raise ModelConfigError(f"{file} is nested too deeply to be a configuration.") from error
    if not isinstance(content, dict):
        raise ModelConfigError(f"{file} must hold a JSON object.")
    return content

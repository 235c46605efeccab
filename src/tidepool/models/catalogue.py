"""Published shapes by name: one JSON file a model, with its source."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from tidepool.models.config import ModelConfigError, read_config
from tidepool.models.families import model_from_config
from tidepool.models.model import Model


@dataclass(frozen=True)
class Entry:
    """A model of the catalogue."""

    name: str
    source: str
    """Where the figures come from."""
    config: dict[str, Any]
    """An HF-style configuration of the language model, with the keys that matter here."""
    vision: dict[str, Any] = field(default_factory=dict)
    """That of its vision tower; empty where there is none."""

    def model(self) -> Model:
        """Its shapes."""
        return model_from_config({**self.config, "vision_config": self.vision})


def names() -> list[str]:
    """Names of the catalogue, sorted."""
    return sorted(file.stem for file in _DIRECTORY.glob("*.json"))


def entry(name: str) -> Entry:
    """A model by name, in any case, with or without its organization (``Qwen/Qwen3.5-4B``).

    Raises:
        ModelConfigError: there is no such model; the message names the nearest.
    """
    known = {known.lower(): known for known in names()}
    wanted = name.rsplit("/", 1)[-1].lower()
    if wanted not in known:
        near = get_close_matches(wanted, known, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(known[match] for match in near)}?" if near else "see --list for the names."
        raise ModelConfigError(
            f"There is no model {name!r} in the catalogue and no such directory or config.json: {hint}"
        )
    content = json.loads((_DIRECTORY / f"{known[wanted]}.json").read_text(encoding="utf-8"))
    return Entry(known[wanted], content["source"], content["config"], content.get("vision", {}))


def find_model(name_or_path: str) -> tuple[str, str, Model]:
    """A model by catalogue name, model directory or ``config.json``: its name, source and shapes."""
    try:
        path = Path(name_or_path).expanduser()
        exists = path.exists()
    except (OSError, RuntimeError, ValueError):  # too long for a name, or of a user who isn't there
        exists = False
    if exists:
        directory = path if path.is_dir() else path.parent
        return directory.resolve().name, str(path), model_from_config(read_config(path))
    found = entry(name_or_path)
    return found.name, found.source, found.model()


_DIRECTORY = Path(__file__).with_name("catalogue")

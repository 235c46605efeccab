"""The fields of a JSON object, checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tidepool.replay.formats.lines import LineError

MOST_TOKENS = 1 << 40
"""Of one request; more are a mistake."""
LATEST_MS = 1e15
"""Milliseconds; later times are a mistake, and too coarse for a clock."""


def json_object(text: str) -> dict[str, Any]:
    """A JSON object."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LineError("not valid JSON") from error
    if not isinstance(fields, dict):
        raise LineError("a request must be a JSON object")
    return fields


def positive(fields: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A whole number above zero."""
    value: Any = fields.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < MOST_TOKENS:
        raise LineError(f'"{key}" must be a positive whole number')
    return int(value)


def milliseconds(fields: Mapping[str, Any], key: str) -> float:
    """A time, in seconds; 0 where it is missing."""
    value = fields.get(key, 0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < LATEST_MS:
        raise LineError(f'"{key}" must be milliseconds from 0')
    return float(value) / 1000


def numbers(fields: Mapping[str, Any], key: str) -> list[int]:
    """A list of whole numbers from 0; not empty."""
    value = fields[key]
    if not isinstance(value, list) or not all(type(item) is int and item >= 0 for item in value):
        raise LineError(f'"{key}" must be a list of whole numbers from 0')
    return value


def salt(fields: Mapping[str, Any]) -> str | None:
    """What keeps a request apart from those of other tenants and LoRA adapters; None for nothing."""
    values = [fields.get(key) for key in ("lora", "cache_salt")]
    if not all(value is None or isinstance(value, str | int) for value in values):
        raise LineError('"lora" and "cache_salt" must be names')
    return None if values == [None, None] else json.dumps(values)

"""What tidepool notes about an engine in vLLM's configuration of it, for later steps and other processes.

The notes lie in ``VllmConfig.additional_config``, vLLM's table for plugins, which is pickled and copied with the
configuration. An attribute of our own would break engines: vLLM makes copies field by field, for a drafter or while it
warms kernels up, and refuses what is no field. It hashes the table as JSON, so each note is a string or a named tuple.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_KEY = "tidepool_notes"


def can_note(vllm_config: Any) -> bool:
    """Whether the configuration has a table to note things in; a platform of somebody else's may have put another
    object in its place."""
    return isinstance(vllm_config.additional_config, Mapping)


def write_note(vllm_config: Any, name: str, value: Any) -> None:
    """Note something under a name. The user's own table, and copies of the configuration, stay as they are."""
    if can_note(vllm_config):
        table = vllm_config.additional_config
        vllm_config.additional_config = {**table, _KEY: {**table.get(_KEY, {}), name: value}}


def read_note(vllm_config: Any, name: str) -> Any:
    """What was noted under a name; None if nothing was."""
    return vllm_config.additional_config.get(_KEY, {}).get(name) if can_note(vllm_config) else None

"""The plugin's switches: ``--additional-config '{"tidepool": {...}}'`` and environment variables, which win."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tidepool.cache import StateFormat
from tidepool.capacity import Partition

Eviction = Literal["returns", "lru", "marconi", "seglen", "t-lru", "lru-states"]
EVICTIONS: tuple[Eviction, ...] = get_args(Eviction)
QueueOrder = Literal["fcfs", "hits-first"]
QUEUE_ORDERS: tuple[QueueOrder, ...] = get_args(QueueOrder)
ENV_SWITCH = "TIDEPOOL"
ENV_POISON = "TIDEPOOL_POISON"
ENV_OVERCOMMIT = "TIDEPOOL_OVERCOMMIT"
ENV_CERTIFY_CPU = "TIDEPOOL_CERTIFY_CPU"
_SWITCHES = ("elastic", "fixed", "off")


class SettingsError(ValueError):
    """A switch that doesn't exist or has no such value."""


class Settings(BaseModel):
    """What a user can set. Sizes are tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    enabled: bool = True
    """False leaves all memory to vLLM."""
    partition: Partition = "elastic"
    """``fixed`` sets the states of max_num_seqs requests aside for good."""
    block_tokens: int | None = Field(default=None, gt=0)
    """Tokens in an attention block; by default the fewest that the attention kernels take."""
    checkpoint_tokens: int | None = Field(default=None, gt=0)
    """Tokens between two states kept for prefix hits; by default 512, or what --mamba-block-size says."""
    eviction: Eviction = "returns"
    """Which cached memory goes first: by learned times of return, or the least recently used."""
    queue: QueueOrder = "fcfs"
    """Who goes first of requests that wait: who came first, or who has much of its prompt in the cache; at most 64 such
    requests go before one that came earlier. With vLLM's own priority scheduling that decides."""
    checkpoint_states: StateFormat = "same"
    """In which format states are kept that are only cached: as running ones, or smaller, which rounds them."""
    kv: str | None = Field(default=None, pattern="^tqkv-k[2348]v[2348]$")
    """How attention keeps keys and values: a format of `tidepool.tqkv`, on the CPU; also without tidepool's memory."""
    host_memory: float | None = Field(default=None, gt=0)
    """GiB of host memory behind the pools, of all ranks together: as --kv-offloading-size."""
    allow: tuple[Literal["device", "drafts", "executor", "host-memory"], ...] = ()
    """What to serve unsupported, at one's own risk: ``device`` stands for a GPU without a certificate, ``drafts`` for
    speculative decoding there, ``host-memory`` for host memory there, ``executor`` for several nodes and Ray's
    workers."""


def read_settings(additional_config: Any, environ: Mapping[str, str] = os.environ) -> Settings:
    """Read the settings of one engine.

    Args:
        additional_config: vLLM's ``additional_config``; only its key ``tidepool`` is looked at.
        environ: where the environment variable ``TIDEPOOL`` is looked up; it wins over ``additional_config``.

    Raises:
        SettingsError: an unknown key or value; one sentence that names it.
    """
    given = additional_config.get("tidepool", {}) if isinstance(additional_config, Mapping) else {}
    if not isinstance(given, Mapping):
        raise SettingsError(f'additional_config["tidepool"] must be a table of settings, not {given!r}.')
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    switch = environ.get(ENV_SWITCH)
    if switch:
        if switch not in _SWITCHES:
            raise SettingsError(f"{ENV_SWITCH}={switch!r} isn't known; use one of {', '.join(_SWITCHES)}.")
        values["enabled"] = switch != "off"
        if switch != "off":
            values["partition"] = switch
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise SettingsError(
                f'additional_config["tidepool"] has no key {key!r}; it has {", ".join(Settings.model_fields)}.'
            ) from None
        raise SettingsError(
            f'additional_config["tidepool"][{key!r}] can\'t be {first["input"]!r}: {first["msg"]}.'
        ) from None
    if settings.partition == "fixed" and settings.checkpoint_states != "same":
        raise SettingsError(
            f"checkpoint_states {settings.checkpoint_states!r} needs the elastic partition: a fixed one has no "
            "share for packed states."
        )
    return settings


def check_kv(kv: str | None, device: str, cache_dtype: str, skipped: Sequence[str] = ()) -> None:
    """Refuse a format of `tidepool.tqkv` where it can't be had.

    Args:
        kv: the setting ``kv``.
        device, cache_dtype: vLLM's device type and KV cache dtype.
        skipped: vLLM's ``kv_cache_dtype_skip_layers``.

    Raises:
        SettingsError: the device isn't a CPU, vLLM has been told to keep keys and values in another way, or single
            layers are to be left out.
    """
    if kv is not None and device != "cpu":
        raise SettingsError(
            f"kv {kv!r} runs on the CPU only: on a GPU use --kv-cache-dtype turboquant_4bit_nc or its like."
        )
    if kv is not None and cache_dtype != "auto":
        raise SettingsError(f"kv {kv!r} and the KV cache dtype {cache_dtype!r} exclude each other: leave one out.")
    if kv is not None and set(skipped) - {"sliding_window"}:
        raise SettingsError(
            f"kv {kv!r} can leave out layers with windows and no others: of --kv-cache-dtype-skip-layers it takes "
            f"sliding_window alone, not {', '.join(sorted(set(skipped) - {'sliding_window'}))}."
        )


def poison_requested(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether freed memory is to be filled with values that show up wherever they are read (a test of safety)."""
    return _on(ENV_POISON, environ)


def overcommit_requested(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether requests are to be admitted without leaving room to those that run (a test of preemption)."""
    return _on(ENV_OVERCOMMIT, environ)


def certificate_requested(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the CPU needs a certificate, too (a test of certificates)."""
    return _on(ENV_CERTIFY_CPU, environ)


def _on(switch: str, environ: Mapping[str, str]) -> bool:
    return environ.get(switch, "") not in ("", "0")

"""What the user asked of vLLM, as it was asked: vLLM's configuration no longer tells defaults from decisions.

docs/settings.md lists every option that touches the KV cache, and what becomes of it.
"""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any, NamedTuple

from tidepool.vllm_plugin.notes import read_note, write_note
from tidepool.vllm_plugin.settings import Settings, SettingsError

_ASKED = "asked"

WITHOUT_EFFECT = {
    "enable_mamba_shared_prefix_checkpoint": "states are always kept where prompts part",
    "kv_cache_dtype_skip_layers": "no layer's cache is quantized",
    "kv_cache_metrics_sample": "there are no block residency metrics without kv_cache_metrics",
    "kv_offloading_backend": "nothing is offloaded without kv_offloading_size",
    "replayssm_buffer_len": "there are no rings without use_replayssm",
    "swa_bounded_replay": "it is for DeepSeek-V4.1 on vLLM's second model runner",
    "cp_kv_cache_interleave_size": "it is for context parallelism",
    "dcp_kv_cache_interleave_size": "it is for context parallelism",
}
"""Arguments of EngineArgs that change nothing about an engine that tidepool serves, and why."""


class Asked(NamedTuple):
    """Of one engine."""

    max_num_seqs: int | None = None
    """As vLLM made it out before any memory was planned."""
    mamba_block_size: int | None = None
    """Tokens between checkpoints; vLLM overwrites it with the attention block."""
    without_effect: tuple[str, ...] = ()
    """Arguments of `WITHOUT_EFFECT` that aren't what they are by default."""


def ask_for_host_memory(engine_args: Any, settings: Settings) -> None:
    """Ask vLLM for what the setting ``host_memory`` says.

    Raises:
        SettingsError: vLLM's own option says something else.
    """
    if not settings.enabled or settings.host_memory is None:
        return
    if engine_args.kv_offloading_size not in (None, settings.host_memory):
        raise SettingsError(
            f"host_memory ({settings.host_memory:g} GiB) and --kv-offloading-size "
            f"({engine_args.kv_offloading_size:g} GiB) say the same and differ: leave one out."
        )
    engine_args.kv_offloading_size = settings.host_memory


def note_asked(engine_args: Any, vllm_config: Any, settings: Settings) -> None:
    """Let the configuration of an engine that may be served remember what its user asked for, in all its processes.

    Raises:
        SettingsError: two settings say the same and differ.
    """
    if not settings.enabled:
        return
    block, spacing = engine_args.mamba_block_size, settings.checkpoint_tokens
    if block is not None and spacing is not None and block != spacing:
        raise SettingsError(
            f"checkpoint_tokens ({spacing}) and --mamba-block-size ({block}) both say how far checkpoints lie apart: "
            "leave one out."
        )
    if not vllm_config.model_config or not vllm_config.model_config.is_hybrid:
        return
    defaults = {each.name: _default(each) for each in fields(engine_args)}
    changed = [name for name in WITHOUT_EFFECT if getattr(engine_args, name) != defaults[name]]
    if settings.kv is not None or vllm_config.cache_config.cache_dtype not in ("auto", "bfloat16"):
        changed = [name for name in changed if name != "kv_cache_dtype_skip_layers"]
    write_note(vllm_config, _ASKED, Asked(vllm_config.scheduler_config.max_num_seqs, block, tuple(changed)))


def asked_of(vllm_config: Any) -> Asked:
    """What `note_asked` noted; nothing for a configuration that wasn't made from arguments."""
    return read_note(vllm_config, _ASKED) or Asked()


def _default(field: Any) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()

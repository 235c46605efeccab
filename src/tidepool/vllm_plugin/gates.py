"""What is unsupported, so that tidepool falls back to vLLM.

Everything that hasn't been proven with tidepool's memory has a gate: a name, a test on vLLM's configuration, and one
reason in words. If the feature is in use the whole engine is vLLM's; nothing is half-applied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tidepool.certificates import Setup, nearest
from tidepool.vllm_plugin.notes import can_note
from tidepool.vllm_plugin.versions import hash_lookahead_of

EIGHT_BITS = ("fp8", "fp8_e4m3", "fp8_e5m2")
"""KV cache dtypes with a byte a number, and scales that lie elsewhere."""
NO_STATES = "layers: the model doesn't keep states beside attention"


@dataclass(frozen=True)
class Gate:
    """One check for something unsupported."""

    name: str
    reason: str
    in_use: Callable[[Any], bool]
    """Of vLLM's configuration."""


def _quantized(config: Any) -> bool:
    """Whether attention keeps something else than the model's numbers; tidepool's own formats come with dtype auto.

    On a GPU a certificate tells whether numbers of eight bits may be kept, too.
    """
    dtype = config.cache_config.cache_dtype
    of_gpus = dtype.startswith("turboquant_") or dtype in EIGHT_BITS
    return dtype not in ("auto", "bfloat16") and not (of_gpus and config.device_config.device_type != "cpu")


def _other_drafter(config: Any) -> bool:
    """Whether drafts come from elsewhere than what has been run on a CPU, or can have a certificate on a GPU."""
    speculative = config.speculative_config
    if speculative is None or speculative.method == "ngram":
        return False
    if speculative.method in ("eagle", "draft_model"):
        return bool(config.device_config.device_type != "cpu")
    return speculative.method != "mtp" or speculative.draft_model_config.hf_config.model_type != "qwen3_5_mtp"


def _drafts_on_stages(config: Any) -> bool:
    return config.speculative_config is not None and config.parallel_config.pipeline_parallel_size > 1


def _elsewhere(config: Any) -> bool:
    """Whether workers run anywhere but in processes of vLLM's own on this machine."""
    parallel = config.parallel_config
    ours = parallel.distributed_executor_backend in (None, "uni", "mp") and parallel.data_parallel_backend == "mp"
    return not ours or parallel.nnodes > 1


def _steps_together(config: Any) -> bool:
    """Whether data parallel engines take their steps together; those of other models are engines like any other."""
    return config.parallel_config.data_parallel_size > 1 and bool(config.model_config.is_moe)


def offloads(config: Any) -> bool:
    """Whether vLLM was asked for host memory behind the device's, by nothing but its size."""
    transfer, cache = config.kv_transfer_config, config.cache_config
    asked = cache.kv_offloading_size is not None and cache.kv_offloading_backend == "native"
    return asked and (transfer is None or set(transfer.kv_connector_extra_config) <= {"cpu_bytes_to_use"})


def _other_connector(config: Any) -> bool:
    return config.kv_transfer_config is not None and config.cache_config.kv_offloading_size is None


def _other_offloading(config: Any) -> bool:
    asked = config.cache_config.kv_offloading_size is not None
    return asked and not (offloads(config) and config.cache_config.enable_prefix_caching)


def _parallel(field: str) -> Callable[[Any], bool]:
    return lambda config: getattr(config.parallel_config, field) > 1


GATES: tuple[Gate, ...] = (
    Gate("kv-connector", "a KV connector addresses blocks by ids of one pool (what it would take: docs/connectors.md)", _other_connector),
    Gate("ec-connector", "encoder cache connectors are untested", lambda c: c.ec_transfer_config is not None),
    Gate("kv-offload", "host memory behind the pools is for prefix caching, and of vLLM's backend native alone", _other_offloading),
    Gate("data-parallel", "data parallel engines of a mixture of experts step together, which vLLM doesn't do on a CPU, so it is untested", _steps_together),
    Gate("decode-context-parallel", "context parallelism spreads one block over ranks", _parallel("decode_context_parallel_size")),
    Gate("prefill-context-parallel", "context parallelism spreads one block over ranks", _parallel("prefill_context_parallel_size")),
    Gate("executor", "only vLLM's own executors on one node have been run (the setting allow: [\"executor\"] serves others)", _elsewhere),
    Gate("speculative-decoding", "of drafters only n-grams (ngram) and the head of Qwen3.5 (mtp) have been run, and on a CPU EAGLE's heads (eagle) and small models (draft_model)", _other_drafter),
    Gate("speculative-stages", "vLLM doesn't start speculative decoding over pipeline stages on a CPU, so it is untested", _drafts_on_stages),
    Gate("mla", "latent attention is untested: vLLM's CPU kernels take its blocks to lie side by side, and tidepool verify has no scenario with it", lambda c: bool(c.model_config.use_mla)),
    Gate("kv-cache-dtype", "a KV cache dtype of one's own is untested, except for fp8 and TurboQuant's on a GPU (and the setting kv on the CPU)", _quantized),
    Gate("replayssm", "ReplaySSM keeps rings in place of states", lambda c: bool(c.cache_config.use_replayssm)),
    Gate("prefix-match-unit", "prefix hits land on every attention block here, so there is nothing to set: leave prefix_match_unit out", lambda c: c.cache_config.prefix_match_unit is not None),
    Gate("hisparse", "HiSparse has pools of its own", lambda c: c.attention_config.hisparse_config is not None),
    Gate("hybrid-manager-off", "without vLLM's hybrid KV cache manager all layers are one group", lambda c: bool(c.scheduler_config.disable_hybrid_kv_cache_manager)),
    Gate("scheduler-class", "a scheduler class of one's own is untested", lambda c: c.scheduler_config.scheduler_cls is not None),
    Gate("watermark", "a watermark counts blocks of one pool, and tidepool keeps room for those who run by itself: leave watermark out", lambda c: c.scheduler_config.watermark > 0),
    Gate("kv-cache-metrics", "block residency metrics tell blocks apart by an id of one pool: leave kv_cache_metrics out", lambda c: bool(c.observability_config.kv_cache_metrics)),
    Gate("encoder-decoder", "encoder-decoder models are untested", lambda c: bool(c.model_config.is_encoder_decoder)),
    Gate("model-runner-v2", "vLLM's second model runner is untested on the CPU", lambda c: bool(c.use_v2_model_runner) and c.device_config.device_type == "cpu"),
    Gate("aux-output", "auxiliary outputs (routed experts) are filed by the block hashes of one pool", lambda c: c.aux_output_config.enabled),
    Gate("kv-cache-grouping", "the model groups its layers itself", lambda c: getattr(c.model_config, "supports_kv_cache_grouping", False)),
    Gate("hash-lookahead", "block hashes that look more than one token ahead are untested", lambda c: hash_lookahead_of(c) > 1),
    Gate("additional-config", "vLLM's platform keeps something else than a table there", lambda c: not can_note(c)),
)  # fmt: skip


def unsupported_features(vllm_config: Any, allow: Sequence[str] = ()) -> Iterator[str]:
    """The reasons, each as ``name: reason``, why this configuration is left to vLLM.

    Args:
        vllm_config: vLLM's configuration of the engine.
        allow: names of gates that are passed over.
    """
    for gate in GATES:
        if gate.name not in allow and gate.in_use(vllm_config):
            yield f"{gate.name}: {gate.reason}"


def unsupported_layers(specs: Mapping[str, Any]) -> str | None:
    """Why these layers are unsupported, or None.

    Supported are models whose layers keep states (``MambaSpec``) beside attention to everything before or to a window, in
    any sizes and numbers of groups.

    Args:
        specs: layer name to vLLM's KVCacheSpec.
    """
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec, SlidingWindowSpec

    attention = {spec for spec in specs.values() if not isinstance(spec, MambaSpec)}
    states = [spec for spec in specs.values() if isinstance(spec, MambaSpec)]
    if not attention or not states:
        return NO_STATES
    for spec in attention:
        if type(spec) not in (FullAttentionSpec, SlidingWindowSpec) or spec.page_size_padded is not None:
            return f"layers: {type(spec).__name__} layers beside states are untested"
        if spec.tokens_per_state != 1 or getattr(spec, "non_causal", False):
            return "layers: pooled or non-causal attention beside states is untested"
        if isinstance(spec, SlidingWindowSpec):
            if spec.extra_retained_tokens:
                return "layers: windows that keep more tokens than they attend to are untested beside states"
        elif spec.sliding_window is not None or spec.attention_chunk_size is not None:
            return "layers: windowed or chunked attention that keeps every token is untested beside states"
    return None


def unsupported_setup(
    setup: Setup,
    proven: Sequence[Setup],
    command: str,
    allow: Sequence[str] = (),
    *,
    drafts: bool = False,
    host_memory: bool = False,
) -> str | None:
    """Why an engine on a device that needs a certificate is unsupported, or None.

    Args:
        setup: the engine's.
        proven: the setups that every rank has found a certificate for.
        command: what would make one for this setup.
        allow: names of gates that are passed over; drafts and host memory have their own.
        drafts: whether the engine has speculative decoding.
        host_memory: whether it has host memory behind the pools.
    """
    asked = {"device": True, "drafts": drafts, "host-memory": host_memory}
    closed = [name for name, used in asked.items() if used and name not in allow]
    if setup in proven or not closed:
        return None
    closest = nearest(setup, proven)
    other = f" (the nearest is for another {', '.join(setup.differences(closest))})" if closest else ""
    kernels = "; ".join(filter(None, (setup.attention, setup.states, setup.kv_dtype)))
    return (
        f"{closed[0]}: no certificate covers this engine on {setup.device} with {kernels}{other}. To verify this machine "
        f"and make one, run: {command}"
    )


def unsupported_backends(backends: Sequence[str]) -> str | None:
    """Why layers are unsupported for their attention backends, or None.

    Args:
        backends: names of the backends' classes.
    """
    if "FlexAttentionBackend" in backends:
        return "layers: FlexAttention takes num_gpu_blocks for the blocks of every layer"
    return None

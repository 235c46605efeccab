"""Whether tidepool would serve an engine as planned: the plugin's own gates, asked before there is an engine."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from tidepool.tqkv.formats import FORMATS
from tidepool.vllm_plugin import gates

CERTIFICATE = (
    "device: on a GPU tidepool serves an engine that a certificate covers; tidepool verify makes one on that machine"
)


def stock_lacks(formats: list[str]) -> str | None:
    """Why stock vLLM can't keep a cache in these formats, or None."""
    lacking = [name for name in formats if name in FORMATS]
    return f"vLLM has no KV cache dtype {', '.join(lacking)}." if lacking else None


def reasons(
    *,
    gpu: bool,
    hybrid: bool,
    latent: bool,
    formats: list[str],
    prefix_caching: bool,
    drafts: bool,
    own_head: bool,
    family: str,
    tp: int,
    pp: int,
) -> list[str]:
    """Why tidepool would leave the engine to vLLM, each as ``gate: reason``; none where it serves it.

    Args:
        gpu: whether the device is one.
        hybrid: whether states lie beside attention.
        latent: whether attention is latent.
        formats: KV cache dtypes.
        prefix_caching: whether it is on.
        drafts: whether there is speculative decoding.
        own_head: whether the model's own head drafts.
        family: the model's type.
        tp: tensor parallel size.
        pp: pipeline parallel size.
    """
    ours = [name for name in formats if name in FORMATS]
    config = engine_config(
        gpu=gpu,
        latent=latent,
        kv_dtype=next((name for name in formats if name not in ("auto", *FORMATS)), "auto"),
        prefix_caching=prefix_caching,
        drafter=("mtp" if own_head else "ngram") if drafts else None,
        family=family,
        tp=tp,
        pp=pp,
    )
    # The gate for devices is for those who start an engine; what a plan can say of them follows below.
    found = list(gates.unsupported_features(config, allow=("device",)))
    return [*found, *_of_layers(hybrid), *_of_formats(ours, gpu), *([CERTIFICATE] if gpu else [])]


def engine_config(
    *, gpu: bool, latent: bool, kv_dtype: str, prefix_caching: bool, drafter: str | None, family: str, tp: int, pp: int
) -> Any:
    """As much of a ``VllmConfig`` as the gates read, of a server with these options and all else as vLLM has it."""
    draft = SimpleNamespace(hf_config=SimpleNamespace(model_type=f"{family.removesuffix('_text')}_mtp"))
    return SimpleNamespace(
        kv_transfer_config=None,
        ec_transfer_config=None,
        additional_config={},
        use_v2_model_runner=gpu,
        aux_output_config=SimpleNamespace(enabled=False),
        device_config=SimpleNamespace(device_type="cuda" if gpu else "cpu"),
        model_config=SimpleNamespace(use_mla=latent, is_moe=False, is_encoder_decoder=False),
        attention_config=SimpleNamespace(hisparse_config=None),
        observability_config=SimpleNamespace(kv_cache_metrics=False),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False, scheduler_cls=None, watermark=0),
        speculative_config=SimpleNamespace(method=drafter, draft_model_config=draft) if drafter else None,
        cache_config=SimpleNamespace(
            cache_dtype=kv_dtype,
            enable_prefix_caching=prefix_caching,
            kv_offloading_size=None,
            kv_offloading_backend="native",
            mamba_cache_mode="align" if prefix_caching else "none",
            use_replayssm=False,
            prefix_match_unit=None,
        ),
        parallel_config=SimpleNamespace(
            tensor_parallel_size=tp,
            pipeline_parallel_size=pp,
            data_parallel_size=1,
            data_parallel_backend="mp",
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            distributed_executor_backend=None,
            nnodes=1,
        ),
    )


def _of_layers(hybrid: bool) -> Iterator[str]:
    if not hybrid:
        yield gates.NO_STATES


def _of_formats(ours: list[str], gpu: bool) -> Iterator[str]:
    if ours and gpu:
        yield f"kv: {', '.join(ours)} is read by kernels for the CPU only"

"""What an engine is in a certificate's terms: told by its workers, who alone know which backends vLLM has chosen."""

from __future__ import annotations

import importlib.metadata
import platform
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tidepool.certificates import Setup, code_hash
from tidepool.vllm_plugin.settings import certificate_requested

KERNEL_PACKAGES = ("triton", "flashinfer-python", "flash-linear-attention", "vllm-flash-attn")
NO_DRAFTS = "none"


def needs_certificate(vllm_config: Any) -> bool:
    """Whether tidepool serves an engine on this device only with a certificate."""
    return vllm_config.device_config.device_type != "cpu" or certificate_requested()


def setup_of(vllm_config: Any, specs: Mapping[str, Any], block_tokens: int) -> Setup:
    """The setup of one rank, with its model loaded.

    Args:
        vllm_config: vLLM's configuration of the engine.
        specs: layer name to vLLM's KVCacheSpec.
        block_tokens: tokens of an attention block.
    """
    import torch
    from vllm.version import __version__ as vllm_version

    layers = vllm_config.compilation_config.static_forward_context
    states = [name for name, spec in specs.items() if hasattr(spec, "dtypes")]
    device, capability, memory, driver = _device()
    parallel = vllm_config.parallel_config
    return Setup(
        code=code_hash(),
        vllm=vllm_version,
        torch=torch.__version__,
        kernels=_words(f"{name} {version}" for name in KERNEL_PACKAGES if (version := _version_of(name))),
        device=device,
        capability=capability,
        memory=memory,
        driver=driver,
        runner="2" if vllm_config.use_v2_model_runner else "1",
        attention=_words(_attention(layers[name]) for name in specs if name not in states),
        states=_words(_states(layers[name], vllm_config) for name in states),
        block=str(block_tokens) if len(states) < len(specs) else "",
        dtype=_dtype(vllm_config.model_config.dtype),
        kv_dtype=_words(_kv_dtype(vllm_config, spec) for name, spec in specs.items() if name not in states),
        state_dtypes=_words("/".join(map(_dtype, specs[name].dtypes)) for name in states),
        drafts=_drafts(vllm_config.speculative_config),
        ranks=f"{parallel.tensor_parallel_size} x {parallel.pipeline_parallel_size}",
        layouts=_layouts(),
    )


def setup_of_ranks(setups: Sequence[Setup]) -> Setup:
    """The setup of an engine. Ranks whose devices or versions differ make one that no certificate has."""
    return Setup(*(_words(word for text in texts for word in text.split(", ")) for texts in zip(*setups, strict=True)))


def command_for(vllm_config: Any, setup: Setup) -> str:
    """The command that verifies an engine of this setup."""
    cache, drafts, parallel = vllm_config.cache_config, vllm_config.speculative_config, vllm_config.parallel_config
    options: dict[str, Any] = {}
    if vllm_config.device_config.device_type != "cpu" and setup.attention and ", " not in setup.attention:
        options["--attention-backend"] = setup.attention.split()[0]
    if setup.dtype != "bfloat16":
        options["--dtype"] = setup.dtype
    for option, value, default in (
        ("--kv-cache-dtype", cache.cache_dtype, "auto"),
        ("--mamba-backend", vllm_config.mamba_config.backend.name.lower(), "triton"),
        ("--gdn-prefill-backend", vllm_config.additional_config.get("gdn_prefill_backend", "auto"), "auto"),
    ):
        if value != default:
            options[option] = value
    window, _, state = setup.state_dtypes.partition("/")
    if window != setup.dtype:
        options["--mamba-cache-dtype"] = window
    if state != "float32":
        options["--mamba-ssm-cache-dtype"] = state
    if cache.user_specified_block_size or "block_tokens" in vllm_config.additional_config.get("tidepool", {}):
        options["--block-size"] = setup.block
    if drafts is not None:
        options[f"--{drafts.method}"] = drafts.num_speculative_tokens
    for option, ranks in (
        ("--tp", parallel.tensor_parallel_size),
        ("--pipeline-parallel-size", parallel.pipeline_parallel_size),
    ):
        if ranks > 1:
            options[option] = ranks
    return shlex.join(["tidepool", "verify", *(str(word) for pair in options.items() for word in pair)])


def _words(found: Iterable[str]) -> str:
    return ", ".join(sorted(set(filter(None, found))))


def _device() -> tuple[str, str, str, str]:
    """(name, compute capability, memory, driver) of this rank's device."""
    import torch
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return f"CPU {platform.machine()}", torch.backends.cpu.get_cpu_capability(), "", ""
    index = torch.accelerator.current_device_index()
    capability = current_platform.get_device_capability(index)
    memory = current_platform.get_device_total_memory(index)
    return (
        current_platform.get_device_name(index),
        str(capability and capability.as_version_str()),
        f"{memory >> 20} MiB",
        _nvidia_driver() if current_platform.is_cuda() else str(torch.version.hip),
    )


def _nvidia_driver() -> str:
    from vllm.utils.import_utils import import_pynvml

    nvml = import_pynvml()
    nvml.nvmlInit()
    try:
        return str(nvml.nvmlSystemGetDriverVersion())
    finally:
        nvml.nvmlShutdown()


def _attention(layer: Any) -> str:
    """The backend of a layer, and which of FlashAttention's kernels it takes."""
    impl = getattr(layer, "impl", None)
    flash_version = getattr(impl, "vllm_flash_attn_version", None)
    words = (layer.get_attn_backend().get_name(), flash_version, getattr(impl, "fa4_hd256", False) and "hd256")
    return " ".join(str(word) for word in words if word)


def _states(layer: Any, vllm_config: Any) -> str:
    """The backend of a layer that keeps states, and the kernels that are chosen by name."""
    prefill = getattr(layer, "gdn_prefill_backend", None)
    words = (layer.get_attn_backend().get_name(), prefill or vllm_config.mamba_config.backend.name.lower())
    return " ".join(words)


def _kv_dtype(vllm_config: Any, spec: Any) -> str:
    asked = vllm_config.cache_config.cache_dtype
    return _dtype(spec.dtype) if asked == "auto" else f"{asked} ({_dtype(spec.dtype)})"


def _dtype(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _drafts(speculative: Any) -> str:
    return NO_DRAFTS if speculative is None else f"{speculative.method} {speculative.num_speculative_tokens}"


def _layouts() -> str:
    from vllm import envs

    asked = {"attention": envs.VLLM_KV_CACHE_LAYOUT, "convolution": envs.VLLM_SSM_CONV_STATE_LAYOUT}
    return _words(f"{name} {layout}" for name, layout in asked.items() if layout)


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None

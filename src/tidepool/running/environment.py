"""The environment of a process that runs one side."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping

from tidepool.sides import Side, switch

_DEFAULTS = {
    # One core each.
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # Long prompts make large tensors. By default glibc gives each back to the system, up to a third of the time.
    "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    # Sampling is greedy here, and FlashInfer may not be there.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    # Kernels that are tuned when first run round differently from process to process; so all take the first one's.
    "TRITON_CACHE_AUTOTUNING": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


def runs_on_gpu() -> bool:
    """Whether the installed vLLM was built for a GPU; by its version, as vLLM itself tells, without importing it."""
    found = {each.name for each in importlib.metadata.distributions() if each.name in ("vllm", "vllm-cpu")}
    return "vllm-cpu" not in found and "cpu" not in importlib.metadata.version("vllm")


def environment_of(side: Side, environ: Mapping[str, str]) -> dict[str, str]:
    """A user's environment with what the side needs, and with defaults for what the user hasn't set."""
    plugins = environ.get("VLLM_PLUGINS")
    # Without the plugin there is nothing to compare, and vllm-cpu may not even import.
    named = {} if plugins is None else {"VLLM_PLUGINS": ",".join(filter(None, (plugins, "tidepool", "tidepool_early")))}
    return _DEFAULTS | dict(environ) | named | switch(side)

"""Layer caches against what vLLM's own model classes and attention backends say. No weights are made."""

from functools import cache
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest

from tidepool.cache import STATE_FORMATS, FullAttention, SlidingWindow, State
from tidepool.models import CacheOptions, ModelConfigError, entry, names
from tidepool.models.dtypes import PER_TOKEN_HEAD_BITS, TURBOQUANT_BITS, head_bytes
from tidepool.vllm_plugin.compat import declare_torchvision_ops, hide_media_packages

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm")

CLASSES = {
    "qwen3_5_text": ("vllm.model_executor.models.qwen3_5", "Qwen3_5ForCausalLM"),
    "qwen3_5_moe_text": ("vllm.model_executor.models.qwen3_5", "Qwen3_5MoeForCausalLM"),
    "qwen3_next": ("vllm.model_executor.models.qwen3_next", "Qwen3NextForCausalLM"),
    "nemotron_h": ("vllm.model_executor.models.nemotron_h", "NemotronHForCausalLM"),
    "falcon_h1": ("vllm.model_executor.models.falcon_h1", "FalconH1ForCausalLM"),
    "granitemoehybrid": ("vllm.model_executor.models.granitemoehybrid", "GraniteMoeHybridForCausalLM"),
    # vLLM 0.32 has no Bamba; its layers are Granite's.
    "bamba": ("vllm.model_executor.models.granitemoehybrid", "GraniteMoeHybridForCausalLM"),
    "jamba": ("vllm.model_executor.models.jamba", "JambaForCausalLM"),
    "lfm2": ("vllm.model_executor.models.lfm2", "Lfm2ForCausalLM"),
    "mamba2": ("vllm.model_executor.models.mamba2", "Mamba2ForCausalLM"),
    "kimi_linear": ("vllm.models.kimi_k3", "KimiLinearForCausalLM"),
    "glm5_next_text": ("vllm.models.glm5next", "Glm5NextForCausalLM"),
}
STATEFUL = [name for name in names() if entry(name).config["model_type"] in CLASSES]
WITH_ATTENTION = [name for name in names() if entry(name).config["model_type"] != "mamba2"]


@pytest.fixture(scope="module", autouse=True)
def importable() -> None:
    """Let vLLM import beside a CPU torch."""
    declare_torchvision_ops()
    hide_media_packages()


@cache
def hf_config(name: str) -> Any:
    """The transformers configuration of a catalogue entry."""
    from transformers import AutoConfig

    config = dict(entry(name).config)
    config.pop("quantization_config", None)
    return AutoConfig.for_model(config.pop("model_type"), **config)


def vllm_config(name: str, tp: int, draft_tokens: int, state_dtype: str) -> Any:
    """As much of a VllmConfig as the state methods of model classes read, its defaults filled in by vLLM."""
    import torch
    from vllm.model_executor.models.config import NemotronHForCausalLMConfig, Qwen3_5ForCausalLMConfig

    hf = hf_config(name)
    draft = SimpleNamespace(num_speculative_tokens=draft_tokens) if draft_tokens else None
    config = SimpleNamespace(
        model_config=SimpleNamespace(dtype=torch.bfloat16, hf_config=hf, hf_text_config=hf),
        cache_config=SimpleNamespace(
            mamba_cache_dtype="auto",
            mamba_ssm_cache_dtype=state_dtype,
            use_replayssm=False,
            use_kda_recoverssm=False,
        ),
        parallel_config=SimpleNamespace(tensor_parallel_size=tp),
        speculative_config=draft,
        num_speculative_tokens=draft_tokens,
    )
    model_type = entry(name).config["model_type"]
    if model_type == "nemotron_h":
        NemotronHForCausalLMConfig.verify_and_update_config(config)
    elif model_type.startswith("qwen3_5"):
        Qwen3_5ForCausalLMConfig.verify_and_update_config(config)
    return config


@pytest.mark.parametrize("state_dtype", ["auto", "float32", "bfloat16"])
@pytest.mark.parametrize("draft_tokens", [0, 3])
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", STATEFUL)
def test_states_are_those_of_vllms_model_class(name: str, tp: int, draft_tokens: int, state_dtype: str) -> None:
    from vllm.v1.kv_cache_interface import MambaSpec

    from tidepool.vllm_plugin.state_parts import state_parts

    module, class_name = CLASSES[entry(name).config["model_type"]]
    model_class = getattr(import_module(module), class_name)
    config = vllm_config(name, tp, draft_tokens, state_dtype)
    spec = MambaSpec(
        block_size=1,
        shapes=model_class.get_mamba_state_shape_from_config(config),
        dtypes=model_class.get_mamba_state_dtype_from_config(config),
    )
    for state_format in STATE_FORMATS:
        options = CacheOptions(
            tp=tp, speculative_tokens=draft_tokens, state_dtype=state_dtype, checkpoint_states=state_format
        )
        states = {
            (cache.bytes, cache.packed_bytes)
            for layer, cache in entry(name).model().layer_caches(options).items()
            if isinstance(cache, State) and layer.endswith("state")
        }
        parts = state_parts(spec)
        assert parts.page_bytes == spec.page_size_bytes
        assert states == {(spec.page_size_bytes, parts.packed_page_bytes(state_format))}


@pytest.mark.parametrize("tp", [1, 2, 8])
@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
@pytest.mark.parametrize("name", WITH_ATTENTION)
def test_attention_is_that_of_vllms_attention_spec(name: str, kv_dtype: str, tp: int) -> None:
    import torch
    from vllm.transformers_utils.model_arch_config_convertor import (
        MODEL_ARCH_CONFIG_CONVERTORS,
        ModelArchConfigConvertorBase,
    )
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec

    hf = hf_config(name)
    convertor = MODEL_ARCH_CONFIG_CONVERTORS.get(hf.model_type, ModelArchConfigConvertorBase)(hf, hf)
    dtype = torch.bfloat16 if kv_dtype == "auto" else torch.float8_e4m3fn
    latent = convertor.is_deepseek_mla()
    heads = 1 if latent else max(1, convertor.get_total_num_kv_heads() // tp)
    spec_class = MLAAttentionSpec if latent else FullAttentionSpec
    spec = spec_class(block_size=1, num_kv_heads=heads, head_size=convertor.get_head_size(), dtype=dtype)
    try:
        caches = entry(name).model().layer_caches(CacheOptions(tp=tp, kv_dtype=kv_dtype))
    except ModelConfigError:
        pytest.skip("the states don't divide among so many devices")
    found = {
        cache.bytes_per_token
        for layer, cache in caches.items()
        if isinstance(cache, FullAttention | SlidingWindow) and not layer.endswith("index")
    }
    assert found == {spec.page_size_bytes}


@pytest.mark.parametrize("size", [64, 80, 128, 256])
@pytest.mark.parametrize("kv_dtype", [*PER_TOKEN_HEAD_BITS, *TURBOQUANT_BITS])
def test_packed_heads_are_those_of_vllms_backends(kv_dtype: str, size: int) -> None:
    import torch
    from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend
    from vllm.v1.attention.backends.turboquant_attn import TurboQuantAttentionBackend
    from vllm.v1.kv_cache_interface import FullAttentionSpec, get_kv_quant_mode

    backend = TurboQuantAttentionBackend if kv_dtype in TURBOQUANT_BITS else TritonAttentionBackend
    spec = FullAttentionSpec(
        block_size=1,
        num_kv_heads=3,
        head_size=size,
        dtype=torch.uint8,
        kv_quant_mode=get_kv_quant_mode(kv_dtype),
    )
    assert backend.customize_spec(spec).page_size_bytes == 3 * head_bytes(kv_dtype, size, size, 2)


def test_nvfp4_heads_are_vllms() -> None:
    from vllm.utils.torch_utils import nvfp4_kv_cache_full_dim

    assert all(head_bytes("nvfp4", s, s, 2) == 2 * nvfp4_kv_cache_full_dim(s) for s in (64, 128, 256))


def test_kimi_layers_alternate_as_in_transformers() -> None:
    kinds = hf_config("Kimi-Linear-48B-A3B").layer_types
    layers = entry("Kimi-Linear-48B-A3B").model().layers
    assert ["attention" if kind == "full_attention" else "state" for kind in kinds] == [
        next(iter(layer.mixers)) for layer in layers
    ]

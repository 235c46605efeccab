"""What tqkv refuses, and how it joins vLLM, without an engine."""

from __future__ import annotations

from typing import Any

import pytest

from tidepool.cache import CacheConfigError
from tidepool.tqkv.formats import FORMATS

pytestmark = pytest.mark.vllm


def config(**changes: Any) -> Any:
    import torch
    from vllm.v1.attention.selector import AttentionSelectorConfig

    plain = {"head_size": 64, "dtype": torch.bfloat16, "kv_cache_dtype": "auto", "block_size": None}
    return AttentionSelectorConfig(**plain | changes)


@pytest.mark.parametrize("name", FORMATS)
def test_vllms_registry_leads_to_every_format(name: str) -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from tidepool.tqkv.backend import choose

    form = FORMATS[name]
    backend = choose(form, config())
    assert choose(form, config()) is backend
    assert AttentionBackendEnum[backend.get_name()].get_class() is backend
    assert backend.get_impl_cls().form == form
    spec = FullAttentionSpec(block_size=16, num_kv_heads=3, head_size=80, dtype=config().dtype)
    packed = backend.customize_spec(spec)
    assert packed.page_size_bytes == 16 * 3 * form.head_bytes(80, 80)
    assert backend.customize_spec(packed) == packed


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"has_sliding_window": True}, "sliding window not supported"),
        ({"has_sink": True}, "attention sinks not supported"),
        ({"use_mla": True}, "MLA not supported"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype not supported"),
        ({"attn_type": "encoder_only"}, "attention type encoder_only not supported"),
        ({"use_kv_connector": True}, "KV connector not supported"),
        ({"use_non_causal": True}, "non-causal attention not supported"),
        ({"block_size": 24}, "block_size not supported"),
    ],
)
def test_attention_of_other_kinds_is_refused(changes: dict[str, Any], words: str) -> None:
    from tidepool.tqkv.backend import choose

    with pytest.raises(CacheConfigError, match=rf"tqkv-k4v4 can't keep this model's attention \({words}\): leave"):
        choose(FORMATS["tqkv-k4v4"], config(**changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"logits_soft_cap": 30.0}, "a soft cap of logits"),
        ({"alibi_slopes": [0.5]}, "ALiBi"),
        ({"sliding_window": 128}, "a sliding window"),
        ({"kv_sharing_target_layer_name": "layers.0.attn"}, "layers that share a cache"),
        ({"sinks": [1.0]}, "sinks"),
    ],
)
def test_layers_of_other_kinds_are_refused(changes: dict[str, Any], words: str) -> None:
    from tidepool.tqkv.backend import BACKENDS

    impl = BACKENDS[FORMATS["tqkv-k3v2"]].get_impl_cls()
    assert impl(8, 64, 0.125, 2).codec.bytes == 24 + 16 + 8
    with pytest.raises(CacheConfigError, match=f"tqkv-k3v2 doesn't know {words}: leave the setting kv out"):
        impl(8, 64, 0.125, 2, **changes)


def test_values_of_another_size_are_refused() -> None:
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from tidepool.tqkv.backend import BACKENDS

    spec = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=64, head_size_v=32, dtype=config().dtype)
    with pytest.raises(CacheConfigError, match="not of 64 and 32 numbers"):
        BACKENDS[FORMATS["tqkv-k4v4"]].customize_spec(spec)


def test_a_wrong_configuration_is_refused_before_anything_starts() -> None:
    from vllm.engine.arg_utils import EngineArgs

    from tidepool.verify.task import MODEL
    from tidepool.vllm_plugin.settings import SettingsError

    settings = {"tidepool": {"kv": "tqkv-k4v4"}}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"kv_cache_dtype": "fp8"}, "exclude each other"),
        ({"additional_config": {"tidepool": {"kv": "q4"}}}, "q4"),
    ]
    for changes, words in cases:
        arguments: dict[str, Any] = {"model": str(MODEL), "additional_config": settings} | changes
        with pytest.raises(SettingsError, match=words):
            EngineArgs(**arguments).create_engine_config()

"""Whatever compares asks first whose memory an engine uses; figures of stock vLLM's are never called tidepool's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm")


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    from tidepool.vllm_plugin import patches

    monkeypatch.setattr(patches, "is_installed", lambda: True)


def config_of(side: str) -> Any:
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from tidepool.vllm_plugin.planning import TidepoolKVCacheConfig

    if side == "stock":
        return KVCacheConfig(1, [], [])
    return TidepoolKVCacheConfig(1, [], [], partition="fixed" if side == "fixed" else "elastic")


@pytest.mark.parametrize("asked", ["stock", "elastic", "fixed"])
@pytest.mark.parametrize("found", ["stock", "elastic", "fixed"])
def test_an_engine_is_what_it_is_called(loaded: None, asked: str, found: str) -> None:
    from tidepool.vllm_plugin.served import NotServedError, require_served

    if asked == found:
        require_served(asked, SimpleNamespace(additional_config={}), config_of(found))
        return
    with pytest.raises(NotServedError) as caught:
        require_served(asked, SimpleNamespace(additional_config={}), config_of(found))
    assert ("falls back" if found == "stock" else f"{asked} was asked for") in str(caught.value)


def test_the_reason_is_named(loaded: None) -> None:
    from tidepool.vllm_plugin.served import reason
    from tidepool.vllm_plugin.serving_plan import fall_back
    from tidepool.vllm_plugin.settings import Settings

    config = SimpleNamespace(additional_config={})
    assert reason(config) == "layers: the model doesn't keep states beside attention"
    fall_back(config, Settings(), "mla: latent attention is untested")
    assert reason(config) == "mla: latent attention is untested"
    fall_back(config, Settings(enabled=False), "mla: latent attention is untested")
    assert reason(config).startswith("off: TIDEPOOL")


@pytest.mark.parametrize(
    ("plugins", "words"),
    [
        ("tidepool_early", "VLLM_PLUGINS=tidepool_early doesn't name tidepool"),
        ("tidepool,tidepool_early", "is tidepool installed beside it"),
        (None, "is tidepool installed beside it"),
    ],
)
def test_a_plugin_that_is_not_loaded_is_said(monkeypatch: pytest.MonkeyPatch, plugins: str | None, words: str) -> None:
    from vllm.version import __version__

    from tidepool.vllm_plugin import patches, versions
    from tidepool.vllm_plugin.served import NotServedError, reason, require_plugin

    monkeypatch.setattr(patches, "is_installed", lambda: False)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if plugins is not None:
        monkeypatch.setenv("VLLM_PLUGINS", plugins)
    assert words in reason(SimpleNamespace(additional_config={}))
    with pytest.raises(NotServedError, match=words):
        require_plugin()
    monkeypatch.setattr(versions, "SUPPORTED_VLLM", ())
    assert reason(SimpleNamespace(additional_config={})).startswith(f"vllm-version: vLLM {__version__}")


def test_other_models_say_that_tidepool_falls_back() -> None:
    """vLLM's platform asks nobody about models without states, so the plugin has to speak up by itself."""
    from vllm.platforms import current_platform

    from tidepool.vllm_plugin import register
    from tidepool.vllm_plugin.serving_plan import fallback_reason

    register()
    config = SimpleNamespace(
        model_config=SimpleNamespace(is_hybrid=False),
        compilation_config=SimpleNamespace(static_forward_context={}),
        additional_config={},
    )
    current_platform.update_block_size_for_backend(config)
    assert fallback_reason(config) == "layers: the model doesn't keep states beside attention"

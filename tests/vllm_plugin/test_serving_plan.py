"""A plan reaches the engine core with the layers' specs, or the engine doesn't start."""

from __future__ import annotations

import pickle
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from tidepool.cache import CacheConfigError

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm")


def make_specs() -> dict[str, Any]:
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec

    return {
        "a": FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.bfloat16),
        "s": MambaSpec(block_size=128, shapes=((4, 4),), dtypes=(torch.float32,)),
    }


def from_worker(plan: Any) -> dict[str, Any]:
    from tidepool.vllm_plugin.serving_plan import attach_plan, note_plan

    config, specs = SimpleNamespace(additional_config={}), make_specs()
    if plan is not None:
        note_plan(config, plan)
    attach_plan(config, specs)
    return specs


@pytest.fixture
def plan() -> Any:
    from tidepool.vllm_plugin.serving_plan import ServingPlan, StockBlocks

    return ServingPlan("fixed", "returns", StockBlocks(640, None), 512)


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The engine core's own configuration, before the workers have said anything."""
    monkeypatch.delenv("TIDEPOOL", raising=False)
    monkeypatch.setattr("tidepool.vllm_plugin.deciding.unsupported_features", lambda config, allow: iter(()))
    return SimpleNamespace(
        additional_config={},
        model_config=SimpleNamespace(is_hybrid=True),
        device_config=SimpleNamespace(device_type="cpu"),
        cache_config=SimpleNamespace(mamba_cache_mode="align", mamba_block_size=None),
    )


def test_a_plan_survives_pickling_and_is_taken_off(plan: Any, core: Any) -> None:
    from tidepool.vllm_plugin.ranks import agree
    from tidepool.vllm_plugin.serving_plan import carries_plan, plan_of

    specs = pickle.loads(pickle.dumps(from_worker(plan)))
    assert carries_plan(specs.values())
    agree(core, [specs])
    assert plan_of(core) == plan
    assert core.cache_config.mamba_block_size == 128
    assert [vars(spec) for spec in specs.values()] == [vars(spec) for spec in make_specs().values()]


def test_a_worker_that_falls_back_says_so(core: Any) -> None:
    from tidepool.vllm_plugin.ranks import agree
    from tidepool.vllm_plugin.serving_plan import carries_plan, plan_of

    specs = pickle.loads(pickle.dumps(from_worker(None)))
    assert not carries_plan(specs.values())
    agree(core, [specs])
    assert plan_of(core) is None
    assert core.cache_config.mamba_block_size is None


@pytest.mark.parametrize("lost", [["a"], ["s"], ["a", "s"]])
@pytest.mark.parametrize("served", [True, False])
def test_word_that_is_lost_stops_the_engine(lost: list[str], served: bool, plan: Any, core: Any) -> None:
    """`dataclasses.replace` loses it, which vLLM uses on specs; stock vLLM would go on with pages of several sizes."""
    from tidepool.vllm_plugin.ranks import agree

    specs = from_worker(plan if served else None)
    specs |= {name: replace(specs[name]) for name in lost}
    words = "sent no word" if len(lost) == 2 else f"lost on the way from rank 1: 1 of 2 layers.*first '{lost[0]}'"
    with pytest.raises(CacheConfigError, match=words):
        agree(core, [{}, specs])


@pytest.mark.parametrize("known", ["not hybrid", "off", "unsupported", "noted plan", "noted reason"])
def test_no_word_is_expected(known: str, plan: Any, core: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """From workers that aren't asked, or that decide in this very configuration."""
    from tidepool.vllm_plugin.ranks import agree
    from tidepool.vllm_plugin.serving_plan import fall_back, note_plan, plan_of
    from tidepool.vllm_plugin.settings import Settings

    if known == "not hybrid":
        core.model_config.is_hybrid = False
    elif known == "off":
        monkeypatch.setenv("TIDEPOOL", "off")
    elif known == "unsupported":
        monkeypatch.setattr("tidepool.vllm_plugin.deciding.unsupported_features", lambda config, allow: iter(["mla"]))
    elif known == "noted plan":
        note_plan(core, plan)
    else:
        fall_back(core, Settings(), "layers: not these")
    agree(core, [make_specs()])
    assert plan_of(core) == (plan if known == "noted plan" else None)


@pytest.mark.parametrize(
    ("kernel", "export", "block", "column", "spacing"),
    [
        (16, 1, 16, 128, 512),
        (16, 64, 16, 128, 512),
        (96, 64, 96, 192, 576),
        (16, 256, 16, 256, 512),
        (48, 1, 48, 48, 528),
    ],
)
def test_columns_and_checkpoints_are_where_layers_save_states(
    kernel: int, export: int, block: int, column: int, spacing: int
) -> None:
    from tidepool.vllm_plugin.deciding import _set_blocks
    from tidepool.vllm_plugin.settings import Settings

    cache = SimpleNamespace(
        mamba_cache_mode="align",
        block_size=16,
        user_specified_block_size=False,
        prefix_cache_retention_interval=None,
        mamba_block_size=None,
    )
    config = SimpleNamespace(additional_config={}, cache_config=cache)
    assert _set_blocks(config, Settings(), kernel, export) == spacing
    assert (cache.block_size, cache.mamba_block_size) == (block, column)
    assert column % export == spacing % column == column % block == 0
    with pytest.raises(CacheConfigError, match=r"checkpoint_tokens \(\d+\) must be a multiple of the attention block"):
        _set_blocks(config, Settings(checkpoint_tokens=max(kernel, export) + 8), kernel, export)
    if export > 1:
        with pytest.raises(CacheConfigError, match=f"and of the {export} at which layers save states"):
            _set_blocks(config, Settings(checkpoint_tokens=kernel), kernel, export)

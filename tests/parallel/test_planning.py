"""How several ranks come to one plan; no model runs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tidepool.cache import CacheConfigError, FullAttention, State
from tidepool.models import CacheOptions, entry
from tidepool.testing.tiny import Family, make_checkpoint

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("partition", ["elastic", "fixed"])
@pytest.mark.parametrize(
    ("family", "cut", "memory"),
    [
        ("qwen3.5", 4, (90_000_000, 70_000_000)),
        ("qwen3.5", 3, (70_000_000, 90_000_000)),  # no attention on the first stage
        ("nemotron-h", 7, (60_000_001, 60_000_000)),  # less than an extent apart
        ("nemotron-h", 14, (90_000_000, 90_000_000)),  # no cache at all on the second stage
    ],
)
def test_stages_of_unequal_memory_get_the_same_blocks(
    family: Family, cut: int, memory: tuple[int, int], partition: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor.models.utils import extract_layer_index

    from tidepool.replay.engine import EngineShape, NoModelExecutor, make_engine
    from tidepool.vllm_plugin.planning import core_groups

    configs: list[Any] = []

    def stages(self: Any) -> list[dict[str, Any]]:
        return [
            {name: spec for name, spec in self.specs.items() if (extract_layer_index(name) < cut) == begins}
            for begins in (True, False)
        ]

    monkeypatch.setattr(NoModelExecutor, "get_kv_cache_specs", stages)
    monkeypatch.setattr(NoModelExecutor, "determine_available_memory", lambda self: list(memory))
    monkeypatch.setattr(NoModelExecutor, "initialize_from_config", lambda self, given: configs.extend(given))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TIDEPOOL", os.environ.get("TIDEPOOL", ""))
    model = json.loads((make_checkpoint(family, tmp_path) / "config.json").read_text())
    engine = make_engine(EngineShape(model, memory[0], partition, max_num_seqs=8, max_model_len=4096))

    scheduler = engine.scheduler.kv_cache_config
    assert [config.pool_blocks for config in configs] == [scheduler.pool_blocks] * 2
    assert [config.num_blocks for config in configs] == [scheduler.num_blocks] * 2
    assert scheduler.arena_bytes == sum(config.arena_bytes for config in configs)
    assert sum(len(group.layer_names) for group in scheduler.kv_cache_groups) == sum(
        len(group.layer_names) for config in configs for group in config.kv_cache_groups
    )
    left = [have - config.arena_bytes for have, config in zip(memory, configs, strict=True)]
    assert min(left) >= 0
    if partition == "elastic":
        assert any(rest < each.geometry.extent_bytes for rest, each in zip(left, configs, strict=True)), "all is used"
    else:
        attention = 1
        assert any(rest < config.strides[attention] for rest, config in zip(left, configs, strict=True)), "all is used"
    for config in configs:
        assert all(tensor.layers for tensor in config.kv_cache_tensors)
    # What is told to others: attention's blocks beside the states of one request.
    if partition == "elastic":
        blocks_per_extent = [layout.blocks_per_extent for layout in scheduler.geometry.layouts]
        states = core_groups(engine.vllm_config, scheduler.kv_cache_groups)[0].blocks_for(1)
        attention_blocks = (scheduler.num_blocks - 1 - -(-states // blocks_per_extent[0])) * blocks_per_extent[1]
    else:
        attention_blocks = scheduler.shares[1].blocks
    assert engine.vllm_config.cache_config.num_gpu_blocks == attention_blocks
    engine.shutdown()


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_a_large_models_ranks_keep_what_vllm_says(tp: int, tmp_path: Path) -> None:
    """Qwen3.5-27B has 4 KV heads: from 8 ranks on they are replicated."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.models.qwen3_5 import Qwen3_5ForCausalLM
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec

    path = tmp_path / "config.json"
    hf_config = {"architectures": ["Qwen3_5ForCausalLM"], "dtype": "bfloat16"} | dict(entry("Qwen3.5-27B").config)
    path.write_text(json.dumps(hf_config))
    config = EngineArgs(
        model=str(tmp_path),
        skip_tokenizer_init=True,
        tensor_parallel_size=tp,
        max_model_len=4096,
        distributed_executor_backend="mp",
    ).create_engine_config()
    attention = FullAttentionSpec(
        block_size=1,
        num_kv_heads=config.model_config.get_num_kv_heads(config.parallel_config),
        head_size=config.model_config.get_head_size(),
        dtype=config.model_config.dtype,
    )
    state = MambaSpec(
        block_size=1,
        shapes=Qwen3_5ForCausalLM.get_mamba_state_shape_from_config(config),
        dtypes=Qwen3_5ForCausalLM.get_mamba_state_dtype_from_config(config),
    )
    caches = entry("Qwen3.5-27B").model().layer_caches(CacheOptions(tp=tp))
    assert set(caches.values()) == {FullAttention(attention.page_size_bytes), State(state.page_size_bytes)}
    assert attention.num_kv_heads == max(1, 4 // tp)


class TestAgreement:
    def specs(self, **changes: Any) -> dict[str, Any]:
        import torch
        from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec

        attention = {"block_size": 16, "num_kv_heads": 2, "head_size": 64, "dtype": torch.bfloat16}
        return {
            "a": FullAttentionSpec(**attention | changes),
            "s": MambaSpec(block_size=16, shapes=((4, 4),), dtypes=(torch.float32,)),
        }

    def test_ranks_that_differ_are_refused(self) -> None:
        from tidepool.vllm_plugin.ranks import agree
        from tidepool.vllm_plugin.serving_plan import ServingPlan, StockBlocks, attach_plan, note_plan, plan_of

        def rank(plan: ServingPlan | None) -> dict[str, Any]:
            specs = self.specs()
            config = SimpleNamespace(additional_config={})
            if plan is not None:
                note_plan(config, plan)
            attach_plan(config, specs)
            return specs

        stock = StockBlocks(640, None)
        elastic, fixed = ServingPlan("elastic", "returns", stock), ServingPlan("fixed", "returns", stock)
        core = SimpleNamespace(additional_config={}, cache_config=SimpleNamespace(mamba_cache_mode="none"))
        for one, other in ((elastic, None), (None, elastic), (elastic, fixed)):
            with pytest.raises(CacheConfigError, match=r"rank 0: .*; rank 1: .*install the same tidepool"):
                agree(core, [rank(one), rank(other)])
        agree(core, [rank(None), {}, rank(None)])
        assert plan_of(core) is None

    def decide(self, monkeypatch: pytest.MonkeyPatch, others: list[Any], **environment: str) -> bool:
        from tidepool.vllm_plugin import deciding
        from tidepool.vllm_plugin.deciding import RankView
        from tidepool.vllm_plugin.serving_plan import plan_of
        from tidepool.vllm_plugin.settings import read_settings

        views = [RankView(read_settings({}, environment), specs, 16) for specs, environment in others]
        monkeypatch.setattr(deciding, "views_of_ranks", lambda config, mine: [mine, *views])
        monkeypatch.setattr(deciding, "layer_specs_of", lambda config: {"s": self.specs()["s"]})
        monkeypatch.setattr(deciding, "_attention_backends", lambda platform, config: [])
        monkeypatch.setattr(deciding, "_smallest_kernel_block", lambda config, backends: 1)
        monkeypatch.setattr(deciding, "state_export_tokens", lambda config: 1)
        monkeypatch.setattr(deciding, "unsupported_features", lambda config, allow: iter(()))
        monkeypatch.setattr(deciding, "setup_of", lambda config, specs, tokens: None)
        monkeypatch.setattr(deciding, "needs_certificate", lambda config: False)
        monkeypatch.delenv("TIDEPOOL", raising=False)
        cache_config = SimpleNamespace(mamba_cache_mode="none", block_size=128, user_specified_block_size=False)
        config = SimpleNamespace(additional_config={}, cache_config=cache_config)
        served = deciding.keep_pages_natural(None, config, None)
        assert cache_config.block_size == (16 if served else 128)
        assert (plan_of(config) is not None) == served
        return served

    def test_a_stage_of_states_alone_is_served_where_another_has_the_attention(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert self.decide(monkeypatch, [({"a": self.specs()["a"]}, {})])

    def test_a_layer_that_is_not_served_on_one_stage_lets_all_fall_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        windowed = self.specs(attention_chunk_size=64)["a"]
        assert not self.decide(monkeypatch, [({"a": windowed}, {})])

    def test_switches_that_differ_are_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for value in ("off", "fixed"):
            with pytest.raises(CacheConfigError, match="isn't the same on every node"):
                self.decide(monkeypatch, [({"a": self.specs()["a"]}, {"TIDEPOOL": value})])

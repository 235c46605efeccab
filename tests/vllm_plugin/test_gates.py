from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tidepool.vllm_plugin.gates import (
    GATES,
    unsupported_backends,
    unsupported_features,
    unsupported_layers,
)
from tidepool.vllm_plugin.versions import SUPPORTED_VLLM, unsupported_version


def config() -> SimpleNamespace:
    """The parts of a VllmConfig that gates look at, with nothing unsupported in use."""
    return SimpleNamespace(
        additional_config={},
        kv_transfer_config=None,
        ec_transfer_config=None,
        speculative_config=None,
        use_v2_model_runner=False,
        cache_config=SimpleNamespace(
            kv_offloading_size=None,
            kv_offloading_backend="native",
            enable_prefix_caching=True,
            cache_dtype="auto",
            mamba_cache_mode="align",
            use_replayssm=False,
            prefix_match_unit=None,
        ),
        parallel_config=SimpleNamespace(
            tensor_parallel_size=2,
            pipeline_parallel_size=2,
            data_parallel_size=1,
            data_parallel_backend="mp",
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            distributed_executor_backend="mp",
            nnodes=1,
        ),
        model_config=SimpleNamespace(use_mla=False, is_moe=False, is_encoder_decoder=False),
        attention_config=SimpleNamespace(hisparse_config=None),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False, scheduler_cls=None, watermark=0.0),
        observability_config=SimpleNamespace(kv_cache_metrics=False),
        aux_output_config=SimpleNamespace(enabled=False),
        device_config=SimpleNamespace(device_type="cpu"),
    )


IN_USE: dict[str, tuple[str, Any]] = {
    "additional-config": ("additional_config", SimpleNamespace(compute_hash=lambda: "")),
    "kv-connector": ("kv_transfer_config", object()),
    "ec-connector": ("ec_transfer_config", object()),
    "kv-offload": ("cache_config.kv_offloading_size", 4.0),
    "data-parallel": ("parallel_config.data_parallel_size", 2),
    "decode-context-parallel": ("parallel_config.decode_context_parallel_size", 2),
    "prefill-context-parallel": ("parallel_config.prefill_context_parallel_size", 2),
    "executor": ("parallel_config.distributed_executor_backend", "ray"),
    "speculative-decoding": ("speculative_config", SimpleNamespace(method="suffix")),
    "speculative-stages": ("speculative_config", SimpleNamespace(method="ngram")),
    "mla": ("model_config.use_mla", True),
    "kv-cache-dtype": ("cache_config.cache_dtype", "fp8"),
    "replayssm": ("cache_config.use_replayssm", True),
    "prefix-match-unit": ("cache_config.prefix_match_unit", 32),
    "hisparse": ("attention_config.hisparse_config", object()),
    "hybrid-manager-off": ("scheduler_config.disable_hybrid_kv_cache_manager", True),
    "scheduler-class": ("scheduler_config.scheduler_cls", "my.Scheduler"),
    "watermark": ("scheduler_config.watermark", 0.1),
    "kv-cache-metrics": ("observability_config.kv_cache_metrics", True),
    "encoder-decoder": ("model_config.is_encoder_decoder", True),
    "model-runner-v2": ("use_v2_model_runner", True),
    "aux-output": ("aux_output_config.enabled", True),
    "kv-cache-grouping": ("model_config.supports_kv_cache_grouping", True),
    "hash-lookahead": ("num_hash_lookahead_tokens", 2),
}


def test_nothing_is_unsupported_on_a_plain_engine() -> None:
    assert list(unsupported_features(config())) == []


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.name)
def test_each_gate_finds_its_feature_alone(gate: Any) -> None:
    path, value = IN_USE[gate.name]
    engine = config()
    if gate.name == "speculative-decoding":
        engine.parallel_config.tensor_parallel_size = engine.parallel_config.pipeline_parallel_size = 1
    if gate.name == "data-parallel":
        engine.model_config.is_moe = True
    if gate.name == "kv-offload":
        engine.cache_config.kv_offloading_backend = "lmcache"
    *owners, field = path.split(".")
    owner: Any = engine
    for name in owners:
        owner = getattr(owner, name)
    setattr(owner, field, value)
    assert list(unsupported_features(engine)) == [f"{gate.name}: {gate.reason}"]


@pytest.mark.parametrize(
    ("device", "dtype", "served"),
    [("cpu", "fp8", False), ("cuda", "fp8", True), ("cuda", "fp8_e5m2", True), ("cuda", "fp8_ds_mla", False)],
)
def test_a_certificate_tells_whether_fp8_is_served_on_a_gpu(device: str, dtype: str, served: bool) -> None:
    engine = config()
    engine.device_config.device_type, engine.cache_config.cache_dtype = device, dtype
    assert (list(unsupported_features(engine)) == []) is served


def test_drafters_that_were_run_are_served() -> None:
    engine = config()
    engine.parallel_config.tensor_parallel_size = engine.parallel_config.pipeline_parallel_size = 1

    def found(method: str, model_type: str = "") -> list[str]:
        draft_model = SimpleNamespace(hf_config=SimpleNamespace(model_type=model_type))
        engine.speculative_config = SimpleNamespace(method=method, draft_model_config=draft_model)
        return [reason.partition(":")[0] for reason in unsupported_features(engine)]

    assert found("ngram") == []
    assert found("mtp", "qwen3_5_mtp") == []
    assert found("eagle") == found("draft_model", "llama") == []
    for method, model_type in [
        ("mtp", "nemotron_h_mtp"),
        ("mtp", "qwen3_next_mtp"),
        ("eagle3", "llama"),
        ("ngram_gpu", ""),
    ]:
        assert found(method, model_type) == ["speculative-decoding"]
    engine.device_config.device_type = "cuda"
    assert found("ngram") == [], "a certificate decides"
    assert found("eagle") == found("draft_model", "llama") == ["speculative-decoding"], (
        "tidepool verify has none of them"
    )
    engine.device_config.device_type = "cpu"
    engine.parallel_config.tensor_parallel_size = 2
    assert found("ngram") == []
    engine.parallel_config.pipeline_parallel_size = 2
    assert found("ngram") == ["speculative-stages"]


def test_data_parallel_engines_are_like_any_other_unless_they_step_together() -> None:
    engine = config()
    engine.parallel_config.data_parallel_size = 2
    assert list(unsupported_features(engine)) == []
    engine.model_config.is_moe = True
    assert [reason.partition(":")[0] for reason in unsupported_features(engine)] == ["data-parallel"]


def test_what_is_allowed_is_served() -> None:
    engine = config()
    engine.parallel_config.distributed_executor_backend = "ray"
    assert list(unsupported_features(engine, allow=("executor",))) == []


@pytest.mark.parametrize(("field", "value"), [("nnodes", 2), ("data_parallel_backend", "ray")])
def test_several_nodes_are_untested_whoever_starts_them(field: str, value: Any) -> None:
    engine = config()
    setattr(engine.parallel_config, field, value)
    assert [reason.partition(":")[0] for reason in unsupported_features(engine)] == ["executor"]


def test_version() -> None:
    assert all(unsupported_version(version) is None for version in SUPPORTED_VLLM)
    for version in ("0.31.2", "0.32.1", "0.34.0", "0.33.0.dev1"):
        words = f"vllm-version: vLLM {version} hasn't been tested (tested: 0.32.0, 0.33.0)"
        assert unsupported_version(version) == words


@pytest.mark.vllm
class TestLayers:
    def specs(self, **changes: Any) -> dict[str, Any]:
        import torch
        from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec

        attention = {"block_size": 16, "num_kv_heads": 2, "head_size": 64, "dtype": torch.bfloat16}
        return {
            "a": FullAttentionSpec(**attention | changes),
            "s": MambaSpec(block_size=16, shapes=((4, 4),), dtypes=(torch.float32,)),
        }

    def test_states_beside_plain_attention_are_served(self) -> None:
        import torch
        from vllm.v1.kv_cache_interface import SlidingWindowSpec

        assert unsupported_layers(self.specs()) is None
        window = SlidingWindowSpec(block_size=16, num_kv_heads=1, head_size=64, dtype=torch.bfloat16, sliding_window=8)
        assert unsupported_layers(self.specs() | {"b": self.specs(head_size=128)["a"], "w": window}) is None

    def test_what_is_not(self) -> None:
        import torch
        from vllm.v1.kv_cache_interface import MLAAttentionSpec, SlidingWindowSpec

        plain = self.specs()
        attention, state = plain["a"], plain["s"]
        sizes = {"block_size": 16, "num_kv_heads": 1, "head_size": 64, "dtype": torch.bfloat16}
        cases = {
            "doesn't keep states beside": [{"a": attention}, {"s": state}, {}],
            "more tokens than they attend": [
                {"a": SlidingWindowSpec(**sizes, sliding_window=8, extra_retained_tokens=1), "s": state}
            ],
            "MLAAttentionSpec": [{"a": MLAAttentionSpec(**sizes), "s": state}],
            "windowed": [self.specs(sliding_window=64), self.specs(attention_chunk_size=64)],
            "FullAttentionSpec": [self.specs(page_size_padded=8192)],
        }
        for words, all_specs in cases.items():
            for specs in all_specs:
                assert words in str(unsupported_layers(specs))

    @pytest.mark.parametrize("kv_dtype", ["turboquant_k8v4", "turboquant_3bit_nc"])
    def test_turboquant_is_planned_at_its_natural_page(self, kv_dtype: str) -> None:
        """By its specs: no GPU is needed for that. Its blocks are at most 128 tokens, or vLLM would split them."""
        import torch
        from vllm.v1.attention.backends.turboquant_attn import TurboQuantAttentionBackend
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec, get_kv_quant_mode
        from vllm.v1.kv_cache_layout import KVCacheLayout
        from vllm.v1.worker.utils import customize_attention_spec

        from tidepool.cache import CacheConfigError, FullAttention, choose_geometry
        from tidepool.models.dtypes import head_bytes
        from tidepool.vllm_plugin.planning import core_groups, group_by_layer_cache, make_kv_cache_config
        from tidepool.vllm_plugin.serving_plan import ServingPlan, StockBlocks

        def groups(block_tokens: int) -> list[KVCacheGroupSpec]:
            plain = FullAttentionSpec(
                block_size=block_tokens,
                num_kv_heads=3,
                head_size=128,
                dtype=torch.uint8,
                kv_quant_mode=get_kv_quant_mode(kv_dtype),
            )
            specs = self.specs() | {"a": customize_attention_spec(TurboQuantAttentionBackend, plain)}
            assert unsupported_layers(specs) is None
            return group_by_layer_cache(specs)

        engine = SimpleNamespace(
            additional_config={},
            model_config=SimpleNamespace(max_model_len=4096),
            cache_config=SimpleNamespace(
                mamba_cache_mode="none",
                num_gpu_blocks_override=None,
                prefix_cache_retention_interval=None,
                get_resolved_kv_cache_layout=lambda: KVCacheLayout.LBNHC,
            ),
            parallel_config=SimpleNamespace(decode_context_parallel_size=1),
            speculative_config=None,
        )
        plan = ServingPlan("elastic", "returns", StockBlocks(2688, None))
        per_token = 3 * head_bytes(kv_dtype, 128, 128, 2)
        attention, state = core_groups(engine, groups(16))
        assert attention.cache == FullAttention(per_token)
        assert attention.page_bytes == 16 * per_token
        assert choose_geometry([attention, state]).padding < 0.01
        with pytest.raises(CacheConfigError, match="block of 256 tokens is more than the attention kernels take"):
            make_kv_cache_config(engine, plan, groups(256), 1000)
        config = make_kv_cache_config(engine, plan, groups(128), 1000)
        assert config.block_bytes[0] == 128 * per_token
        assert core_groups(engine, groups(2688))[0].block_tokens == 2688, "stock vLLM's, for the comparison in the log"


def test_backends_that_reckon_with_num_gpu_blocks_are_not_served() -> None:
    assert unsupported_backends(["FlashAttentionBackend"]) is None
    assert "FlexAttention" in str(unsupported_backends(["FlashAttentionBackend", "FlexAttentionBackend"]))


def test_turboquant_is_for_gpus() -> None:
    engine = config()
    engine.cache_config.cache_dtype = "turboquant_4bit_nc"
    assert [reason.partition(":")[0] for reason in unsupported_features(engine)] == ["kv-cache-dtype"]
    engine.device_config.device_type = "cuda"
    assert list(unsupported_features(engine)) == []


@pytest.mark.vllm
@pytest.mark.parametrize("backend", ["FLASHINFER", "FLASH_ATTN 3"])
def test_flashinfers_blocks_lie_whole_heads_apart(backend: str) -> None:
    """XQA divides the distance by a head and rounds down: a padded one that isn't whole would reach other blocks."""
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec, MambaSpec

    from tidepool.cache import choose_geometry
    from tidepool.certificates import Setup
    from tidepool.vllm_plugin.planning import core_groups
    from tidepool.vllm_plugin.serving_plan import ServingPlan, note_plan

    engine = SimpleNamespace(
        additional_config={},
        model_config=SimpleNamespace(max_model_len=4096),
        cache_config=SimpleNamespace(mamba_cache_mode="none"),
        speculative_config=None,
    )
    setup = Setup(*[""] * len(Setup._fields))._replace(attention=backend)
    note_plan(engine, ServingPlan("elastic", "returns", None, setup=setup))
    head = 256 * 2
    padded = []
    for state in range(1_000, 30_000, 1_003):
        attention = FullAttentionSpec(block_size=16, num_kv_heads=3, head_size=256, dtype=torch.bfloat16)
        states = MambaSpec(block_size=16, shapes=((state,),), dtypes=(torch.float32,))
        groups = [KVCacheGroupSpec(["a", "b", "c"], attention), KVCacheGroupSpec(["s"], states)]
        layout = choose_geometry(core_groups(engine, groups)).layouts[0]
        padded.append(layout.stride % head)
    assert any(padded) == (backend != "FLASHINFER"), "the other backend shows that there is something to align"

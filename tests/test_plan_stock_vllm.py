"""The closed form of vLLM's planning against vLLM's own functions, for the whole catalogue."""

from types import SimpleNamespace
from typing import Any

import pytest

from tidepool.cache import FullAttention, LayerCache, SlidingWindow, State
from tidepool.models import CacheOptions, Model, ModelConfigError, entry, names
from tidepool.plan import PlanOptions, stock_layout, stock_memory
from tidepool.plan.stock import attention_block, export_tokens, startup_lines
from tidepool.vllm_plugin.compat import declare_torchvision_ops, hide_media_packages
from tidepool.vllm_plugin.versions import planner_of_vllm, series_here

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm")

BUDGET = 30 << 30
DTYPES = ["auto", "fp8", "int8_per_token_head", "turboquant_3bit_nc"]


@pytest.fixture(scope="module", autouse=True)
def importable() -> None:
    """Let vLLM import beside a CPU torch."""
    declare_torchvision_ops()
    hide_media_packages()


def layers_of(name: str, kv_dtype: str, tp: int = 1) -> tuple[Model, dict[str, LayerCache]]:
    model = entry(name).model()
    try:
        return model, model.layer_caches(CacheOptions(kv_dtype=kv_dtype, tp=tp))
    except ModelConfigError:
        pytest.skip("the model can't be cut or typed so")


def planner_config(layout: str) -> Any:
    """As much of a VllmConfig as vLLM's grouping reads."""
    from vllm.v1.kv_cache_layout import KVCacheLayout

    return SimpleNamespace(
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        attention_config=SimpleNamespace(hisparse_config=None),
        cache_config=SimpleNamespace(
            get_resolved_kv_cache_layout=lambda: KVCacheLayout[layout],
            num_gpu_blocks_override=None,
            prefix_cache_retention_interval=None,
        ),
        speculative_config=None,
        num_speculative_tokens=0,
        num_prefill_lookahead_tokens=0,
    )


def align(
    layers: dict[str, LayerCache], latent: bool, block_tokens: int, monkeypatch: Any, export: int | None = None
) -> tuple[int, int | None]:
    """vLLM's own inflation: tokens of an attention block, and the page that states are padded to."""
    import torch
    import vllm.model_executor.models as models
    from vllm.platforms.interface import Platform
    from vllm.v1.attention.backend import AttentionBackend, MultipleOf

    state = max(cache.bytes for cache in layers.values() if isinstance(cache, State))
    token = max(cache.bytes_per_token for cache in layers.values() if isinstance(cache, FullAttention))

    class Backend(AttentionBackend):  # type: ignore[misc]
        @staticmethod
        def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
            return [MultipleOf(16)]

    class Stateful:
        @staticmethod
        def get_mamba_state_shape_from_config(config: Any) -> tuple[tuple[int, ...], ...]:
            return ((state,),)

        @staticmethod
        def get_mamba_state_dtype_from_config(config: Any) -> tuple[Any, ...]:
            return (torch.uint8,)

    registry = SimpleNamespace(resolve_model_cls=lambda *args, **kwargs: (Stateful, None))
    monkeypatch.setattr(models, "ModelRegistry", registry)
    monkeypatch.setattr("vllm.config.vllm.set_current_vllm_config", lambda config: _nothing())
    monkeypatch.setattr(Platform, "_find_non_ssm_backends", classmethod(lambda cls, config: [Backend]))
    # The plugin may be on in this process, and this is about what vLLM does without it.
    monkeypatch.setattr("tidepool.vllm_plugin.wrappers.keep_pages_natural", lambda *args: False)
    config = SimpleNamespace(
        cache_config=SimpleNamespace(
            cache_dtype="auto",
            block_size=block_tokens,
            mamba_cache_mode="align" if export else "none",
            mamba_block_size=None,
            mamba_page_size_padded=None,
            kv_cache_dtype_skip_layers=[],
        ),
        model_config=SimpleNamespace(
            dtype=torch.uint8,
            use_mla=latent,
            architecture="any",
            get_num_kv_heads=lambda parallel: 1,
            get_head_size=lambda: token if latent else token // 2,
        ),
        parallel_config=None,
    )
    if series_here() != "0.32":
        name = "vllm.model_executor.layers.mamba.abstract.get_mamba_prefill_checkpoint_alignment"
        monkeypatch.setattr(name, lambda config: export)
    Platform._align_hybrid_block_size(config, Backend)
    return config.cache_config.block_size, config.cache_config.mamba_page_size_padded


def _nothing() -> Any:
    from contextlib import nullcontext

    return nullcontext()


def specs_of(layers: dict[str, LayerCache], latent: bool, block_tokens: int, state_page: int | None) -> dict[str, Any]:
    """vLLM's cache specs of the same bytes."""
    import torch
    from vllm.v1.kv_cache_interface import (
        CircularBufferSpec,
        FullAttentionSpec,
        MambaSpec,
        MLAAttentionSpec,
        SlidingWindowSpec,
    )

    specs: dict[str, Any] = {}
    for name, cache in layers.items():
        if isinstance(cache, State) and name.endswith("tail"):
            specs[name] = CircularBufferSpec(
                block_size=16,
                num_kv_heads=2,
                head_size=cache.bytes // 64,
                head_size_v=0,
                dtype=torch.bfloat16,
                dcp_sharded=False,
            )
        elif isinstance(cache, State):
            specs[name] = MambaSpec(
                block_size=1 << 20,
                shapes=((cache.bytes,),),
                dtypes=(torch.uint8,),
                page_size_padded=state_page,
            )
        elif isinstance(cache, FullAttention) and latent:
            specs[name] = MLAAttentionSpec(
                block_size=block_tokens, num_kv_heads=1, head_size=cache.bytes_per_token, dtype=torch.uint8
            )
        else:
            assert isinstance(cache, FullAttention | SlidingWindow)
            half = {"num_kv_heads": 1, "head_size": cache.bytes_per_token // 2, "dtype": torch.uint8}
            if isinstance(cache, FullAttention):
                specs[name] = FullAttentionSpec(block_size=block_tokens, **half)
            else:
                specs[name] = SlidingWindowSpec(block_size=block_tokens, sliding_window=cache.window, **half)
        assert state_page or specs[name].page_size_bytes == cache.page_bytes(block_tokens)
    return specs


@pytest.mark.parametrize("block_tokens", [16, 32])
@pytest.mark.parametrize("kv_dtype", DTYPES)
@pytest.mark.parametrize("name", names())
def test_closed_form_is_vllms_planning(
    name: str, kv_dtype: str, block_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm = planner_of_vllm()
    model, layers = layers_of(name, kv_dtype)
    hybrid = {State, FullAttention} <= {type(cache) for cache in layers.values()}
    block, page = align(layers, model.latent, block_tokens, monkeypatch) if hybrid else (block_tokens, None)
    assert attention_block(layers, block_tokens, model.latent) == block

    layout = stock_layout(layers, block_tokens, model.latent)
    mixed = len(set(layout.pages.values())) > 1
    config = planner_config("BLNHC" if mixed else "LBNHC")
    specs = specs_of(layers, model.latent, block, page)
    groups = vllm.get_kv_cache_groups(config, dict(specs))
    assert [sorted(g.layers) for g in layout.groups] == [sorted(g.layer_names) for g in groups]

    planned = vllm.get_kv_cache_config_from_groups(config, groups, BUDGET)
    memory = stock_memory([layers], BUDGET, 256, 4096, block_tokens=block_tokens, latent=model.latent)
    assert memory.pool_blocks == planned.num_blocks
    attention = [g.kv_cache_spec.block_size for g in groups if g.layer_names[0].endswith(("attention", "window"))]
    assert {g.block_tokens for g in memory.groups if g.label != "state"} == set(attention)


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("name", names())
def test_start_up_lines_are_vllms(name: str, caching: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity
    from vllm.v1.kv_cache_interface import MambaSpec

    model = entry(name).model()
    options = PlanOptions(kv_bytes=BUDGET, prefix_caching=caching, max_model_len=100_000, max_num_batched_tokens=8192)
    layers = model.layer_caches(options.cache_options())
    hybrid = {State, FullAttention} <= {type(cache) for cache in layers.values()}
    block, page = align(layers, model.latent, 16, monkeypatch) if hybrid else (16, None)
    specs = specs_of(layers, model.latent, block, page)
    for layer, spec in specs.items():
        if isinstance(spec, MambaSpec):
            # Caching takes a second state, and layers that save one inside a step a third.
            inside = layers[layer].blocks_for(1, 16) - 2 if caching else 0
            specs[layer] = replace(spec, num_prefill_checkpoint_blocks=inside)
    mixed = len(set(stock_layout(layers, 16, model.latent).pages.values())) > 1
    config = planner_config("BLNHC" if mixed else "LBNHC")
    config.cache_config.mamba_cache_mode = "align" if caching else "none"
    config.model_config = SimpleNamespace(max_model_len=100_000)
    config.parallel_config = SimpleNamespace(decode_context_parallel_size=1)
    config.max_in_flight_tokens = options.in_flight_tokens
    vllm = planner_of_vllm()
    groups = vllm.get_kv_cache_groups(config, dict(specs))
    planned = vllm.get_kv_cache_config_from_groups(config, groups, BUDGET)
    tokens, concurrency = get_kv_cache_capacity(config, planned)
    memory = stock_memory([layers], BUDGET, 256, 100_000, block_tokens=16, latent=model.latent)
    assert startup_lines(memory, options.in_flight_tokens) == [
        f"GPU KV cache size: {tokens:,} tokens",
        f"Maximum concurrency for 100,000 tokens per request: {concurrency:.2f}x",
    ]


@pytest.mark.parametrize("pp", [2, 4])
@pytest.mark.parametrize("name", ["Qwen3.5-27B", "Nemotron-3-Nano-30B-A3B", "Falcon-H1-3B", "Gemma-3-4B"])
def test_pipeline_stages_are_vllms(name: str, pp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    vllm = planner_of_vllm()
    model, layers = layers_of(name, "auto")
    hybrid = {State, FullAttention} <= {type(cache) for cache in layers.values()}
    block, page = align(layers, model.latent, 16, monkeypatch) if hybrid else (16, None)
    config = planner_config("LBNHC")
    specs = specs_of(layers, model.latent, block, page)
    groups = vllm.get_kv_cache_groups(config, dict(specs))
    stages = model.stages(pp, CacheOptions())
    blocks = [
        vllm.get_kv_cache_config_from_groups(
            config,
            vllm._project_kv_cache_groups_to_worker(groups, {n: specs[n] for n in stage}),
            BUDGET,
        ).num_blocks
        for stage in stages
    ]
    memory = stock_memory(stages, BUDGET, 256, 4096, block_tokens=16, latent=model.latent)
    assert memory.pool_blocks == min(blocks)


@pytest.mark.parametrize(("layers", "pp"), [(32, 3), (45, 4), (27, 2), (56, 6), (40, 7)])
def test_stage_bounds_are_vllms(layers: int, pp: int) -> None:
    from vllm.distributed.utils import get_pp_indices

    from tidepool.models.model import stage_bounds

    assert stage_bounds(layers, pp) == [get_pp_indices(layers, rank, pp) for rank in range(pp)]


@pytest.mark.parametrize("block_tokens", [16, 48])
@pytest.mark.parametrize("name", [name for name in names() if name.startswith("Qwen3.5")])
def test_blocks_end_where_states_are_saved(name: str, block_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With prefix caching on Hopper, where 0.33 has Gated DeltaNet save states inside steps."""
    model, layers = layers_of(name, "auto")
    export = export_tokens(model.family, series_here(), True)
    assert export == (1 if series_here() == "0.32" else 64)
    block, page = align(layers, model.latent, block_tokens, monkeypatch, export=export)
    assert attention_block(layers, block_tokens, model.latent, export_tokens=export) == block
    layout = stock_layout(layers, block_tokens, model.latent, export_tokens=export)
    assert layout.pages[next(name for name, cache in layers.items() if isinstance(cache, State))] == page
    assert export_tokens(model.family, series_here(), False) == 1
    if (name, block_tokens) == ("Qwen3.5-4B", 16):
        assert block == (528 if series_here() == "0.32" else 576)


# What vLLM 0.32 was seen to do: tokens of an attention block and layers of each group.
@pytest.mark.parametrize(
    ("name", "block", "counts"),
    [("Qwen3.5-4B", 528, [8, 8, 8, 8]), ("Nemotron-3-Nano-4B", 976, [4, 4, 4, 3, 3, 3, 4])],
)
def test_measured_layouts(name: str, block: int, counts: list[int]) -> None:
    model, layers = layers_of(name, "auto")
    layout = stock_layout(layers, 16, model.latent)
    assert layout.groups[0].block_tokens == block
    assert [len(group.layers) for group in layout.groups] == counts

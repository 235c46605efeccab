"""Model shapes: figures that were published, tensor and pipeline parallel cuts, and configs that can't be read."""

import json
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from tidepool.cache import FullAttention, LayerCache, SlidingWindow, State
from tidepool.models import (
    FAMILIES,
    KV_DTYPES,
    CacheOptions,
    ModelConfigError,
    entry,
    find_model,
    model_from_config,
    names,
)
from tidepool.models.dtypes import head_bytes
from tidepool.models.model import stage_bounds


def kinds(name: str, options: CacheOptions | None = None) -> list[tuple[int, LayerCache]]:
    """Distinct layer caches of a model and how many layers have each, in order of appearance."""
    caches = list(entry(name).model().layer_caches(options or CacheOptions()).values())
    return [(caches.count(cache), cache) for cache in dict.fromkeys(caches)]


# Shapes measured on vLLM 0.32: attention bytes per token, and convolution + matrices of a state.
SHAPES = {
    "Qwen3.5-0.8B": [(18, State(3 * 6144 * 2 + 16 * 128 * 128 * 4)), (6, FullAttention(2048))],
    "Qwen3.5-4B": [(24, State(3 * 8192 * 2 + 32 * 128 * 128 * 4)), (8, FullAttention(4096))],
    "Qwen3.5-27B": [(48, State(3 * 10240 * 2 + 48 * 128 * 128 * 4)), (16, FullAttention(4096))],
    "Nemotron-3-Nano-4B": [(21, State(3 * 9728 * 2 + 96 * 80 * 128 * 4)), (4, FullAttention(4096))],
    "Gemma-3-4B": [(29, SlidingWindow(4096, 1024)), (5, FullAttention(4096))],
    "Llama-3.1-8B": [(32, FullAttention(4096))],
    "Kimi-Linear-48B-A3B": [(20, State(3 * 12288 * 2 + 32 * 128 * 128 * 4)), (7, FullAttention(1152))],
    "LFM2-1.2B": [(10, State(2 * 2048 * 2)), (6, FullAttention(2048))],
}


@pytest.mark.parametrize("name", SHAPES)
def test_layer_caches_are_those_measured(name: str) -> None:
    assert kinds(name) == SHAPES[name]


def test_bfloat16_states_of_nemotron() -> None:
    assert kinds("Nemotron-3-Nano-4B", CacheOptions(state_dtype="bfloat16"))[0] == (21, State(2_024_448))


# Parameters as published with the checkpoints, in billions.
PARAMETERS = {
    "Nemotron-3-Nano-4B": 3.9736,
    "Nemotron-Nano-9B-v2": 8.8882,
    "Nemotron-3-Nano-30B-A3B": 31.6,
    "Llama-3.1-8B": 8.03,
    "Mixtral-8x7B": 46.7,
    "Granite-4.0-H-Small": 32.2,
    "Granite-4.0-H-1B": 1.46,
    "Kimi-Linear-48B-A3B": 49.1,
    "gpt-oss-120b": 116.8,
    "LFM2-1.2B": 1.17,
    "LFM2-2.6B": 2.57,
    "Jamba-v0.1": 51.6,
    "Qwen3-Next-80B-A3B": 79.7,
    "Mamba-Codestral-7B": 7.29,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_close_to_those_published(name: str) -> None:
    assert entry(name).model().parameters / 1e9 == pytest.approx(PARAMETERS[name], rel=0.005)


def test_every_family_of_the_catalogue_is_known_and_has_a_source() -> None:
    for name in names():
        assert entry(name).config["model_type"] in FAMILIES
        assert len(entry(name).source) > 20, name


def test_weights_of_quantized_experts_are_counted_at_their_own_size() -> None:
    # 60.8 GiB is the size of the published checkpoint.
    assert entry("gpt-oss-120b").model().weight_bytes() / 2**30 == pytest.approx(60.8, rel=0.01)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_tensor_parallel_shards_states_and_replicates_few_heads(tp: int) -> None:
    state, attention = (cache for _, cache in kinds("Qwen3.5-4B", CacheOptions(tp=tp)))
    assert state == State((3 * 8192 * 2 + 32 * 128 * 128 * 4) // tp)
    assert attention == FullAttention(max(1, 4 // tp) * 2 * 256 * 2)


def test_latent_attention_is_whole_on_every_device() -> None:
    assert kinds("Kimi-Linear-48B-A3B", CacheOptions(tp=8))[1] == (7, FullAttention(1152))


def test_groups_of_mamba2_that_do_not_divide_are_replicated() -> None:
    one, two = (kinds("Falcon-H1-3B", CacheOptions(tp=tp))[0][1] for tp in (1, 2))
    assert one == State(3 * (4096 + 2 * 256) * 2 + 4096 * 256 * 2)
    assert two == State(3 * (4096 + 2 * 2 * 256) // 2 * 2 + 4096 * 256 * 2 // 2)


def test_draft_tokens_widen_convolutions() -> None:
    plain, wide = (kinds("Qwen3.5-0.8B", CacheOptions(speculative_tokens=n))[0][1] for n in (0, 2))
    assert isinstance(plain, State)
    assert wide == State(plain.bytes + 2 * 6144 * 2)


def test_a_head_that_drafts_keeps_a_cache_on_the_last_stage() -> None:
    model = entry("Qwen3.5-4B").model()
    with_head = CacheOptions(mtp=True)
    assert len(model.layer_caches(CacheOptions())) == 32
    caches = model.layer_caches(with_head)
    assert caches["layers.32.attention"] == FullAttention(4096)
    stages = model.stages(3, with_head)
    assert [len(stage) for stage in stages] == [10 + 1, 10 + 1, 10 + 1]
    assert "layers.32.attention" in stages[-1]
    with pytest.raises(ModelConfigError, match="leave --mtp out"):
        entry("Llama-3.1-8B").model().layer_caches(with_head)


def test_heads_that_do_not_divide_are_an_error() -> None:
    with pytest.raises(ModelConfigError, match="don't divide among 3 devices"):
        kinds("Qwen3.5-4B", CacheOptions(tp=3))


# TurboQuant at 128: 4-bit keys + norm, 4-bit values + scale and zero point; NVFP4: codes + a scale for every 16.
@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("auto", 512),
        ("fp8", 256),
        ("int8_per_token_head", 264),
        ("int4_per_token_head", 136),
        ("nvfp4", 144),
        ("turboquant_k8v4", 128 + 64 + 4),
        ("turboquant_4bit_nc", 66 + 68),
        ("turboquant_3bit_nc", 50 + 52),
        ("tqkv-k4v4", 64 + 64 + 8),
        ("tqkv-k8v3", 128 + 48 + 8),
    ],
)
def test_bytes_of_a_head(dtype: str, expected: int) -> None:
    assert head_bytes(dtype, 128, 128, 2) == expected


def test_unknown_dtype_names_those_that_exist() -> None:
    with pytest.raises(ModelConfigError, match=r"no KV cache dtype 'int2'.*fp8"):
        kinds("Llama-3.1-8B", CacheOptions(kv_dtype="int2"))


def test_packed_heads_are_refused_for_latent_attention() -> None:
    for kv_dtype in ("nvfp4", "tqkv-k4v4"):
        with pytest.raises(ModelConfigError, match="latent attention"):
            kinds("Kimi-Linear-48B-A3B", CacheOptions(kv_dtype=kv_dtype))


@given(layers=st.integers(1, 200), data=st.data())
def test_stages_cover_all_layers_in_order(layers: int, data: st.DataObject) -> None:
    bounds = stage_bounds(layers, data.draw(st.integers(1, min(layers, 16))))
    assert [first for first, _ in bounds] == [0, *(end for _, end in bounds[:-1])]
    assert bounds[-1][1] == layers
    sizes = [end - first for first, end in bounds]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("pp", [1, 2, 4])
def test_stages_of_a_model_hold_each_layer_once(pp: int) -> None:
    model = entry("Falcon-H1-7B").model()
    stages = model.stages(pp, CacheOptions())
    assert {name: cache for stage in stages for name, cache in stage.items()} == model.layer_caches(CacheOptions())
    assert sum(map(len, stages)) == 88
    assert model.weight_bytes(1, pp) < model.weight_bytes() / pp * 1.3


def test_find_model_reads_a_directory_and_a_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(entry("Qwen3.5-4B").config))
    name, source, model = find_model(str(tmp_path))
    assert (name, source) == (tmp_path.name, str(tmp_path))
    assert model == find_model(str(tmp_path / "config.json"))[2] == model_from_config(entry("qwen/QWEN3.5-4b").config)


def test_nested_text_config_is_read() -> None:
    config = entry("Qwen3.5-4B").config
    nested = {"model_type": "qwen3_5", "tie_word_embeddings": True, "text_config": config}
    assert model_from_config(nested) == model_from_config(config)


def broken(change: dict[str, object], name: str = "Qwen3.5-4B") -> dict[str, object]:
    return {key: value for key, value in (entry(name).config | change).items() if value is not None}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            broken({"linear_num_value_heads": None}),
            'qwen3_5_text model needs "linear_num_value_heads", which is miss',
        ),
        (broken({"hidden_size": -1}), '"hidden_size" of the config must be a positive whole number, not -1'),
        (broken({"head_dim": "big"}), '"head_dim" of the config must be a positive whole number'),
        (broken({"layer_types": ["dream"] * 32}), "unknown kind of layer: 'dream'"),
        (broken({"layer_types": ["linear_attention"]}), "lists 1 layers of 32"),
        (broken({"dtype": "int3"}), '"dtype" of the config must be one of'),
        (broken({"hybrid_override_pattern": "M?"}, "Nemotron-3-Nano-4B"), "unknown letters"),
        (broken({"hybrid_override_pattern": "--"}, "Nemotron-3-Nano-4B"), "no layer that keeps anything"),
        ({"model_type": "gpt2"}, "Models of type 'gpt2' are unknown"),
        ({}, 'The config of the model needs "model_type"'),
    ],
)
def test_bad_configs_say_what_is_wrong(config: dict[str, object], message: str) -> None:
    with pytest.raises(ModelConfigError, match=message):
        model_from_config(config)


def test_unreadable_files_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ModelConfigError, match=r"Can't read .*config\.json"):
        find_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelConfigError, match="isn't valid JSON"):
        find_model(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelConfigError, match="must hold a JSON object"):
        find_model(str(tmp_path))
    with pytest.raises(ModelConfigError, match=r"did you mean.*Qwen3.5-4B"):
        find_model("Qwen3.5-4")


def test_every_kv_dtype_has_a_size() -> None:
    assert all(head_bytes(dtype, 128, 128, 2) > 0 for dtype in KV_DTYPES)

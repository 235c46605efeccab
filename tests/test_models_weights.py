"""Weights: parameter counts as published, and the bytes of quantized checkpoints as their files have them."""

import json
from pathlib import Path
from typing import Any

import pytest

from tidepool.models import CacheOptions, Model, ModelConfigError, entry, find_model, model_from_config, names
from tidepool.models.weights import parameters
from tidepool.plan import PlanOptions, make_plan

BILLION, GIB = 1e9, 1 << 30

# In billions, as model cards and checkpoints are known to have them. First those that count all parts:
WITH_ALL = {
    # size of the checkpoint in bfloat16 over two bytes, from vLLM's start-up logs: 51.75 and 66.97 GiB
    "Qwen3.5-27B": 27.78,
    "Qwen3.6-27B": 27.78,
    "Qwen3.8-27B": 27.78,
    "Qwen3.5-35B-A3B": 35.95,
    "Qwen3.6-35B-A3B": 35.95,
    # of their checkpoints
    "Qwen3.5-0.8B": 0.873,
    "Qwen3.5-2B": 2.27,
    "Qwen3.5-4B": 4.66,
    "Qwen3.5-9B": 9.65,
    "Qwen3.5-122B-A10B": 125.1,
    "GLM-5.3-Flash": 321.32,
    # total_size of its index, 4,892,388,705,238 bytes, as vLLM's recipes quote it
    "Qwen3.8-2.4T-A95B": 2446.19,
}
TEXT = {
    "Bamba-9B": 9.78,
    "Falcon-H1-1.5B": 1.55,
    "Falcon-H1-3B": 3.15,
    "Falcon-H1-7B": 7.59,
    "Gemma-3-4B": 3.88,
    "Granite-4.0-H-1B": 1.46,
    "Granite-4.0-H-Small": 32.2,
    "Granite-4.0-H-Tiny": 6.94,
    "Jamba-v0.1": 51.6,
    "Kimi-K3": 2_800,
    "Kimi-Linear-48B-A3B": 49.1,
    "LFM2-1.2B": 1.17,
    "LFM2-2.6B": 2.57,
    "Llama-3.1-8B": 8.03,
    "Mamba-Codestral-7B": 7.29,
    "Mixtral-8x7B": 46.7,
    "Nemotron-3-Nano-30B-A3B": 31.6,
    "Nemotron-3-Nano-4B": 3.97,
    "Nemotron-3-Super-120B-A12B": 120.6,
    "Nemotron-3-Ultra-550B-A55B": 550,
    "Nemotron-3.5-Lightning-30B-A3B": 31.6,
    "Nemotron-Nano-9B-v2": 8.89,
    "Qwen3-Next-80B-A3B": 79.7,
    "Qwen3.5-397B-A17B": 397,
    "gpt-oss-120b": 116.8,
    "gpt-oss-20b": 20.9,
}


@pytest.mark.parametrize("name", names())
def test_parameters_are_those_published(name: str) -> None:
    model = entry(name).model()
    counted = model.parameters
    if name in WITH_ALL:
        tower = model.vision
        counted += model.draft_parameters + (parameters(tower.linears) + tower.other if tower else 0)
    assert counted / BILLION == pytest.approx((WITH_ALL | TEXT)[name], rel=0.01)


def quantized(name: str, quantization: dict[str, Any]) -> Model:
    """A model of the catalogue in a quantized checkpoint."""
    found = entry(name)
    return model_from_config({**found.config, "vision_config": found.vision, "quantization_config": quantization})


def groups(weights: dict[str, Any], ignore: list[str], **more: Any) -> dict[str, Any]:
    """compressed-tensors with one group."""
    group = {"targets": ["Linear"], "weights": weights}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": ignore, **more}


def mixed(count: int, experts: list[str]) -> dict[str, Any]:
    """ModelOpt's mixed precision of Qwen3.6: feed-forward parts and head in NVFP4, attention and states in FP8."""
    eight = [f"self_attn.{name}_proj" for name in "qkvo"]
    eight += [f"linear_attn.{name}" for name in ("in_proj_qkv", "in_proj_z", "out_proj")]
    layers: dict[str, dict[str, Any]] = {}
    for index in range(count):
        prefix = f"model.language_model.layers.{index}"
        layers |= {f"{prefix}.{name}": {"quant_algo": "W4A16_NVFP4", "group_size": 16} for name in experts}
        layers |= {f"{prefix}.{name}": {"quant_algo": "FP8"} for name in eight}
    return {
        "quant_method": "modelopt",
        "quant_algo": "MIXED_PRECISION",
        "quantized_layers": layers | {"lm_head": {"quant_algo": "W4A16_NVFP4"}},
    }


def named(module: str) -> list[str]:
    return [f"{module}.{name}_proj" for name in ("gate", "up", "down")]


GROUP_OF_128 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}
NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
TENSOR_FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
MODELOPT_NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
FP8_SCHEME = {"num_bits": 8, "type": "float", "dynamic": False}
CHANNEL_INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
QWEN_FP8 = ["lm_head", "visual", "linear_attn.in_proj_a", "linear_attn.in_proj_b"]

# name, model, quantization_config, bytes, and whether the checkpoint has the head that drafts.
CHECKPOINTS = [
    # vLLM's log on an L40S: Checkpoint size 28.75 GiB, Model loading took 28.51 GiB
    (
        "FP8 in blocks: Qwen3.8-27B-FP8",
        "Qwen3.8-27B",
        {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": QWEN_FP8},
        28.51 * GIB,
        False,
    ),
    # the same with the head that drafts, in FP8 as well: Checkpoint size 28.75 GiB
    (
        "FP8 in blocks: Qwen3.8-27B-FP8, all",
        "Qwen3.8-27B",
        {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": QWEN_FP8},
        28.75 * GIB,
        True,
    ),
    # vLLM's log: Model loading took 35.02 GiB, the head that drafts included
    (
        "FP8 in blocks: Qwen3.6-35B-A3B-FP8",
        "Qwen3.6-35B-A3B",
        {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": QWEN_FP8},
        35.02 * GIB,
        True,
    ),
    # A user's report: model loading took 27.51 GiB, since attention isn't quantized; its rules are quoted there
    (
        "GPTQ but for attention: raydelossantos/Qwen3.6-27B-GPTQ-Int4",
        "Qwen3.6-27B",
        {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": 128,
            "dynamic": {f"-:.*{part}.*": {} for part in ("attn", "mtp", "shared_expert", "visual")} | {"lm_head": {}},
        },
        27.51 * GIB,
        False,
    ),
    # vLLM's log on a GB10: Checkpoint size 21.82 GiB; the head that drafts is in it, in bfloat16
    (
        "ModelOpt, mixed: nvidia/Qwen3.6-35B-A3B-NVFP4",
        "Qwen3.6-35B-A3B",
        mixed(40, ["mlp.experts", *named("mlp.shared_expert")]),
        21.82 * GIB,
        True,
    ),
    # vLLM's log on a 5090: Checkpoint size 20.42 GiB, the head that drafts included
    (
        "ModelOpt, mixed: nvidia/Qwen3.6-27B-NVFP4",
        "Qwen3.6-27B",
        mixed(64, named("mlp")),
        20.42 * GIB,
        True,
    ),
    # vLLM's log on a 5090: Model loading took 21.88 GiB
    (
        "compressed-tensors, NVFP4: RedHatAI/Qwen3.6-35B-A3B-NVFP4",
        "Qwen3.6-35B-A3B",
        groups(NVFP4, ["re:.*lm_head", "re:.*visual.*", "re:.*linear_attn.*", "re:.*mlp.gate$"]),
        21.88 * GIB,
        False,
    ),
    # vLLM's log on a 5090: Checkpoint size 23.32 GiB, the head that drafts in bfloat16 included
    (
        "compressed-tensors, NVFP4: RedHatAI/Qwen3.6-35B-A3B-NVFP4, all",
        "Qwen3.6-35B-A3B",
        groups(NVFP4, ["re:.*lm_head", "re:.*visual.*", "re:.*linear_attn.*", "re:.*mlp.gate$"]),
        23.32 * GIB,
        True,
    ),
    # 18.14 GiB of files, the head that drafts included; vLLM's log on an A100: Model loading took 17.71 GiB without it
    (
        "compressed-tensors, W4A16: RedHatAI/Qwen3.8-27B-INT4",
        "Qwen3.8-27B",
        groups(GROUP_OF_128, ["lm_head", "re:.*visual.*", "re:.*linear_attn.in_proj_[ab]$"]),
        18.14 * GIB,
        True,
    ),
    ("MXFP4: openai/gpt-oss-20b", "gpt-oss-20b", {"quant_method": "mxfp4"}, 12.8 * GIB, False),
    ("MXFP4: openai/gpt-oss-120b", "gpt-oss-120b", {"quant_method": "mxfp4"}, 60.8 * GIB, False),
    # The sizes of the files above and below, as their pages are known to have them; not looked up again.
    (
        "AWQ: hugging-quants/Meta-Llama-3.1-8B-Instruct-AWQ-INT4",
        "Llama-3.1-8B",
        {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True},
        5.74 * BILLION,
        False,
    ),
    (
        "GPTQ: hugging-quants/Meta-Llama-3.1-8B-Instruct-GPTQ-INT4",
        "Llama-3.1-8B",
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True, "sym": True},
        5.74 * BILLION,
        False,
    ),
    (
        "bitsandbytes: unsloth/Meta-Llama-3.1-8B-bnb-4bit",
        "Llama-3.1-8B",
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True},
        5.70 * BILLION,
        False,
    ),
    (
        "compressed-tensors, W4A16: neuralmagic/Meta-Llama-3.1-8B-Instruct-quantized.w4a16",
        "Llama-3.1-8B",
        groups(GROUP_OF_128, ["lm_head"], format="pack-quantized"),
        5.74 * BILLION,
        False,
    ),
    (
        "compressed-tensors, FP8: neuralmagic/Meta-Llama-3.1-8B-Instruct-FP8",
        "Llama-3.1-8B",
        groups(TENSOR_FP8, ["lm_head"]),
        9.08 * BILLION,
        False,
    ),
    (
        "compressed-tensors, W8A8: neuralmagic/Meta-Llama-3.1-8B-Instruct-quantized.w8a8",
        "Llama-3.1-8B",
        groups(CHANNEL_INT8, ["lm_head"]),
        9.08 * BILLION,
        False,
    ),
]


@pytest.mark.parametrize(
    ("name", "quantization", "size", "drafts"), [case[1:] for case in CHECKPOINTS], ids=[c[0] for c in CHECKPOINTS]
)
def test_quantized_checkpoints_have_the_size_of_their_files(
    name: str, quantization: dict[str, Any], size: float, drafts: bool
) -> None:
    assert quantized(name, quantization).weight_bytes(vision=True, drafts=drafts) == pytest.approx(size, rel=0.02)


FOUR_BITS: list[dict[str, Any]] = [
    {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]},
    {"quant_algo": "NVFP4", "exclude_modules": ["lm_head"]},
    {"quantization": {"quant_algo": "W4A16_AWQ", "exclude_modules": ["lm_head"]}},
    {"quant_method": "modelopt", "config_groups": {"group_0": {"weights": NVFP4, "targets": ["Linear"]}}},
    groups({"num_bits": 4, "type": "float", "group_size": 32}, ["lm_head"], format="mxfp4-pack-quantized"),
    {"quant_method": "awq", "w_bit": 4, "q_group_size": 64},
    {"quant_method": "gptq_marlin", "bits": 4, "group_size": -1},
    {"quant_method": "auto-round", "bits": 4, "group_size": 128, "extra_config": {"lm_head": {"bits": 16}}},
    {"quant_method": "bitsandbytes", "load_in_4bit": True},
    {"load_in_4bit": True},
    {
        "quant_method": "quark",
        "global_quant_config": {"weight": {"dtype": "fp4", "qscheme": "per_group", "group_size": 32}},
        "exclude": ["lm_head"],
    },
    {
        "quant_method": "quark",
        "global_quant_config": {
            "weight": [
                {"dtype": "fp8_e4m3", "qscheme": "per_tensor"},
                {"dtype": "int4", "qscheme": "per_channel"},
            ]
        },
        "exclude": ["lm_head"],
    },
    {
        "quant_method": "quark",
        "global_quant_config": None,
        "layer_quant_config": {
            f"*.{part}.*": {"weight": {"dtype": "fp4_e2m1", "qscheme": "per_group", "group_size": 32}}
            for part in ("mlp", "linear_attn", "self_attn")
        },
    },
    {"quant_method": "autoround", "bits": 4, "group_size": 128},
    {"quant_method": "modelopt_mixed", "quant_algo": "W4A16_NVFP4", "ignore": ["lm_head"]},
]


@pytest.mark.parametrize("quantization", FOUR_BITS, ids=str)
def test_27_billion_numbers_of_4_bits_are_not_50_gib(quantization: dict[str, Any]) -> None:
    assert 13 < quantized("Qwen3.5-27B", quantization).weight_bytes() / GIB < 20


def test_what_a_checkpoint_leaves_as_it_is_counts_in_full() -> None:
    eight = {"num_bits": 8, "type": "float", "strategy": "channel"}

    def size(ignore: list[str]) -> int:
        return quantized("Qwen3.5-4B", groups(eight, ["lm_head", *ignore])).weight_bytes()

    layer = entry("Qwen3.5-4B").model().layers[0]
    (up,) = [linear for linear in layer.linears if linear.name == "mlp.up_proj"]
    for pattern in ("model.layers.0.mlp.up_proj", "re:.*layers.0.mlp.up_proj", "*layers.0.mlp.up*"):
        assert size([pattern]) - size([]) == pytest.approx(up.parameters, rel=0.01), pattern
    assert size(["mlp.up_proj"]) - size([]) == pytest.approx(32 * up.parameters, rel=0.01)
    assert size(["model.language_model.layers.1.mlp"]) - size([]) == pytest.approx(3 * up.parameters, rel=0.01)
    # vLLM's own name for both of these, which it makes one matrix of
    assert size(["model.layers.1.mlp.gate_up_proj"]) - size([]) == pytest.approx(2 * up.parameters, rel=0.01)


UNKNOWN: list[dict[str, Any]] = [
    *(
        {"quant_method": method, "bits": 4, "group_size": 128}
        for method in ("hqq", "exl3", "aqlm", "gguf", "torchao", "bitnet", "fp_quant", "finegrained_fp8", "mlx")
    ),
    {"quant_method": "fp8", "weight_block_size": "128"},
    {"quant_method": "fp8", "weight_block_size": [128]},
    {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    {"quant_method": "quark", "global_quant_config": {}},
    {"quant_method": ["gptq"], "bits": 4},
    {"bits": 4},
    {"quant_method": "modelopt", "quant_algo": "NVFP2"},
    {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": {"quant_algo": "X"}}},
    {"quant_method": "gptq", "bits": "four"},
    {"quant_method": "awq", "group_size": 128},
    {"quant_method": "auto-round"},
    {"quant_method": "bitsandbytes"},
    {"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "mx6"}}},
    groups({"num_bits": 5, "type": "int"}, []),
    groups(NVFP4, [], sparsity_config={"format": "sparse-24-bitmask"}),
]


@pytest.mark.parametrize("quantization", UNKNOWN, ids=str)
def test_unknown_kinds_ask_for_the_weights(quantization: dict[str, Any]) -> None:
    model = quantized("Qwen3.5-4B", quantization)
    with pytest.raises(ModelConfigError, match=r"isn't known here.*--weights"):
        model.weight_bytes()
    assert len(model.layer_caches(CacheOptions())) == 32, "its cache is known all the same"


@pytest.mark.parametrize("key", ["compression_config", "quantization"])
def test_other_keys_that_say_how_weights_are_stored_are_read_too(key: str) -> None:
    # "quantization" is MLX's, whose checkpoints vLLM doesn't read.
    config = {**entry("Qwen3.5-4B").config, key: {"group_size": 64, "bits": 4}}
    with pytest.raises(ModelConfigError, match=r"isn't known here.*--weights"):
        model_from_config(config).weight_bytes()


def test_modelopts_own_file_is_read_beside_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(entry("Llama-3.1-8B").config))
    (tmp_path / "hf_quant_config.json").write_text(
        json.dumps(
            {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
        )
    )
    assert find_model(str(tmp_path))[2].weight_bytes() == pytest.approx(9.08 * BILLION, rel=0.02)


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        (MODELOPT_NVFP4 | {"kv_cache_quant_algo": "FP8"}, "fp8"),
        (MODELOPT_NVFP4 | {"kv_cache_scheme": FP8_SCHEME}, "fp8"),
        (MODELOPT_NVFP4 | {"kv_cache_scheme": None}, "auto"),
        (groups(NVFP4, [], kv_cache_scheme=FP8_SCHEME), "fp8"),
        (groups(NVFP4, [], kv_cache_scheme=None), "auto"),
    ],
)
def test_a_checkpoint_says_what_auto_means(named: dict[str, Any], expected: str) -> None:
    model = quantized("Qwen3.5-4B", named)
    plan = make_plan("x", "", model, PlanOptions(kv_bytes=9 << 30))
    assert plan.options.kv_dtype == expected
    assert [gate.split(":")[0] for gate in plan.fallbacks] == ([] if expected == "auto" else ["kv-cache-dtype"])


def test_a_tower_of_unknown_shape_asks_for_the_weights() -> None:
    model = model_from_config({**entry("Qwen3.5-4B").config, "vision_config": {"layers": 3}})
    assert model.weight_bytes() < model_from_config(
        {**entry("Qwen3.5-4B").config, "vision_config": entry("Qwen3.5-4B").vision}
    ).weight_bytes(vision=True)
    with pytest.raises(ModelConfigError, match=r"vision tower.*--weights"):
        model.weight_bytes(vision=True)


def test_each_device_of_a_group_has_all_of_what_is_not_cut() -> None:
    model = entry("Nemotron-3-Super-120B-A12B").model()
    whole = sum(linear.parameters for layer in model.layers for linear in layer.linears if linear.whole)
    one, four = model.weight_bytes(), model.weight_bytes(tp=4)
    assert four == pytest.approx((one - 2 * whole) / 4 + 2 * whole, rel=1e-6)

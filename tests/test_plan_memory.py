"""What a plan makes of a card, against vLLM's public start-up logs; docs/plan.md names the source of each."""

import re
from dataclasses import dataclass, replace
from typing import Any

import pytest

from tidepool.command_line import UsageError
from tidepool.gpus import GPUS, find_gpu
from tidepool.models import Model, entry, model_from_config
from tidepool.plan import Card, PlanOptions, make_plan
from tidepool.plan.reserve import Step, default_step, graph_count, reserve

GIB = 1 << 30

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head", "visual"]}
INT4 = {
    "quant_method": "compressed-tensors",
    "config_groups": {
        "group_0": {
            "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128},
            "targets": ["Linear"],
        }
    },
    "ignore": ["lm_head", "re:.*visual.*", "re:.*in_proj_[ab]$"],
}
NVFP4_DENSE = {
    "quant_method": "modelopt",
    "quant_algo": "MIXED_PRECISION",
    "quantized_layers": {
        f"model.language_model.layers.{index}.{name}": {"quant_algo": algorithm}
        for index in range(64)
        for algorithm, names in (
            ("W4A16_NVFP4", ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")),
            ("FP8", ("self_attn", "linear_attn.in_proj_qkv", "linear_attn.in_proj_z", "linear_attn.out_proj")),
        )
        for name in names
    }
    | {"lm_head": {"quant_algo": "W4A16_NVFP4"}},
}
NVFP4 = {
    "quant_method": "modelopt",
    "quant_algo": "MIXED_PRECISION",
    "quantized_layers": {
        f"model.language_model.layers.{index}.{name}": {"quant_algo": algorithm}
        for index in range(40)
        for algorithm, names in (
            ("W4A16_NVFP4", ("mlp.experts", "mlp.shared_expert")),
            ("FP8", ("self_attn", "linear_attn.in_proj_qkv", "linear_attn.in_proj_z", "linear_attn.out_proj")),
        )
        for name in names
    }
    | {"lm_head": {"quant_algo": "W4A16_NVFP4"}},
}


@dataclass(frozen=True)
class Log:
    """What a server said at start, and how it was started."""

    model: str
    gpu: str
    utilization: float
    gib: float
    """Its "Available KV cache memory"."""
    longest: int
    tokens: int
    """Its "GPU KV cache size"."""
    concurrency: str
    quantization: dict[str, Any] | None = None
    step: int | None = None
    requests: int | None = None
    options: tuple[tuple[str, Any], ...] = ()
    loaded: float | None = None
    """GiB of weights as logged, where the checkpoint's own format isn't known."""

    def shapes(self) -> Model:
        found = entry(self.model)
        more = {"quantization_config": self.quantization} if self.quantization else {}
        return model_from_config({**found.config, "vision_config": found.vision, **more})


FP8_CACHE = (("kv_dtype", "fp8"),)
HEAD_OF_2 = (*FP8_CACHE, ("speculative_tokens", 2), ("mtp", True))
HEAD_OF_3 = (("speculative_tokens", 3), ("mtp", True))
NO_CACHING = (("prefix_caching", False),)
LOGS = {
    "Qwen3.5-0.8B, A100-80": Log("Qwen3.5-0.8B", "A100-80", 0.92, 67.08, 262_144, 5_788_118, "22.08", step=8192),
    "Qwen3.5-0.8B, A100-80, served": Log(
        "Qwen3.5-0.8B", "A100-80", 0.85, 61.82, 8_192, 3_697_198, "451.32", requests=32
    ),
    "Qwen3.8-27B, A100-80": Log("Qwen3.8-27B", "A100-80", 0.92, 18.61, 262_144, 298_275, "1.14", step=8192),
    "Qwen3.8-27B-FP8, L40S": Log("Qwen3.8-27B", "L40S", 0.90, 8.82, 131_072, 141_036, "1.08", FP8, options=NO_CACHING),
    "Qwen3.8-27B-FP8, L40S, 16 requests": Log(
        "Qwen3.8-27B", "L40S", 0.90, 9.75, 131_072, 155_600, "1.19", FP8, requests=16, options=NO_CACHING
    ),
    "Qwen3.8-27B-INT4, A100-40": Log(
        "Qwen3.8-27B", "A100-40", 0.90, 16.74, 131_072, 267_509, "2.04", INT4, requests=16, options=NO_CACHING
    ),
    "Qwen3.8-27B-FP8, two 3090": Log(
        "Qwen3.8-27B", "3090", 0.92, 4.99, 131_072, 302_921, "2.31", FP8, 8192, 2, (*FP8_CACHE, ("tp", 2))
    ),
    "Qwen3.6-35B-A3B-NVFP4, 5090": Log(
        "Qwen3.6-35B-A3B", "5090", 0.92, 5.98, 131_072, 567_978, "4.33", NVFP4, 8192, 1, FP8_CACHE
    ),
    "Qwen3.6-35B-A3B-NVFP4, 5090, again": Log(
        "Qwen3.6-35B-A3B", "5090", 0.92, 6.01, 131_072, 569_878, "4.35", NVFP4, 8192, 1, FP8_CACHE
    ),
    "Qwen3.6-35B-A3B-NVFP4 with drafts, GB10": Log(
        "Qwen3.6-35B-A3B", "GB10", 0.85, 73.13, 262_144, 6_312_658, "24.08", NVFP4, 8192, 5, HEAD_OF_2
    ),
    "Nemotron-3-Nano-30B-A3B, GB10": Log(
        "Nemotron-3-Nano-30B-A3B", "GB10", 0.80, 34.32, 262_144, 5_769_184, "22.01", None, 8192, 8, NO_CACHING
    ),
    "Llama-3.1-8B, A100-80": Log("Llama-3.1-8B", "A100-80", 0.92, 56.21, 131_072, 460_496, "3.51"),
    "Qwen3.8-27B, RTX PRO 6000": Log("Qwen3.8-27B", "RTX-PRO-6000", 0.90, 31.24, 8_192, 314_187, "38.35", requests=256),
    "Qwen3.6-27B-NVFP4, GB10, long steps": Log(
        "Qwen3.6-27B", "GB10", 0.70, 47.84, 262_144, 1_505_068, "5.74", NVFP4_DENSE, 65_536, 8, FP8_CACHE
    ),
    "Qwen3.6-35B-A3B at 4.75 bits with drafts, GB10": Log(
        "Qwen3.6-35B-A3B", "GB10", 0.85, 71.15, 200_000, 3_131_683, "15.66", None, 32_768, 8, HEAD_OF_3, 21.42
    ),
    "Qwen3.6-35B-A3B-NVFP4 with drafts, GB10, four requests": Log(
        "Qwen3.6-35B-A3B", "GB10", 0.85, 74.76, 262_144, 6_455_296, "24.62", NVFP4, 8192, 4, HEAD_OF_2
    ),
    "Qwen3.5-4B, L40S": Log("Qwen3.5-4B", "L40S", 0.50, 11.11, 1_024, 141_107, "137.80", None, 8192, 256, NO_CACHING),
    "Qwen3.5-4B, A6000": Log("Qwen3.5-4B", "A6000", 0.50, 12.85, 1_024, 163_225, "159.40", None, 2048, 128, NO_CACHING),
}


@dataclass(frozen=True)
class Lines:
    """A log of which nothing but the memory, its lines and the options that they depend on is known."""

    model: str
    gib: float
    longest: int
    concurrency: str
    options: tuple[tuple[str, Any], ...] = ()
    tokens: int | None = None
    """None from versions whose "GPU KV cache size" was something else."""


NANO = (*FP8_CACHE, *NO_CACHING)
LINES = {
    "Qwen3.6-35B-A3B-NVFP4, 80 GB": Lines("Qwen3.6-35B-A3B", 64.16, 262_144, "12.49", tokens=3_274_229),
    "Qwen3.6-35B-A3B": Lines("Qwen3.6-35B-A3B", 13.1, 32_768, "17.11", tokens=560_505),
    "Qwen3.6-35B-A3B-NVFP4 with drafts, GB10": Lines(
        "Qwen3.6-35B-A3B", 53.84, 131_072, "31.08", (*FP8_CACHE, *HEAD_OF_3), 4_073_445
    ),
    "Qwen3.6-35B-A3B at 4 bits, two 3090": Lines(
        "Qwen3.6-35B-A3B", 4.55, 262_144, "3.45", (*FP8_CACHE, ("tp", 2)), 903_602
    ),
    "Qwen3.6-27B at 4 bits with drafts, two 3090": Lines(
        "Qwen3.6-27B", 11.05, 262_144, "2.38", (*FP8_CACHE, *HEAD_OF_3, ("tp", 2)), 623_873
    ),
    "Nemotron-Cascade-2-30B-A3B-NVFP4, 5090": Lines(
        "Nemotron-3-Nano-30B-A3B", 3.72, 256_000, "4.71", (*NANO, ("state_dtype", "float32")), 1_206_303
    ),
    "LFM2.5-1.2B": Lines("LFM2-1.2B", 13.33, 32_768, "70.93", FP8_CACHE, 2_324_244),
    "Qwen3.6-35B-A3B-NVFP4, 5090, vLLM 0.20": Lines("Qwen3.6-35B-A3B", 2.95, 65_536, "3.87", FP8_CACHE),
    "Granite-4.0-H-1B, vLLM 0.19": Lines("Granite-4.0-H-1B", 4.09, 4_096, "66.95", NO_CACHING),
    "Qwen3.5-122B-A10B, two cards, vLLM 0.16": Lines(
        "Qwen3.5-122B-A10B", 1.73, 131_072, "1.89", (*FP8_CACHE, ("tp", 2))
    ),
    "Nemotron-3-Nano-4B-FP8, vLLM 0.13": Lines(
        "Nemotron-3-Nano-4B", 11.15, 8_192, "98.20", (*NANO, ("state_dtype", "float16"))
    ),
}


@pytest.mark.parametrize("name", LOGS)
def test_memory_is_that_of_the_log(name: str) -> None:
    log, (known, gpu) = LOGS[name], find_gpu(LOGS[name].gpu)
    tokens, requests = default_step(gpu)
    step = Step(log.step or tokens, log.requests or requests)
    options = PlanOptions(kv_bytes=1, **dict(log.options))
    model = log.shapes()
    needed = reserve(model, gpu, step, options.tp, options.pp, options.speculative_tokens)
    weights = model.weight_bytes(options.tp, options.pp, vision=True, drafts=options.mtp)
    weights = int(log.loaded * GIB) if log.loaded else weights
    card = Card(known, gpu.total_bytes, log.utilization, weights, needed.total)
    assert card.kv_bytes / GIB == pytest.approx(log.gib, rel=0.05)


@pytest.mark.parametrize("name", [*LOGS, *LINES])
def test_start_up_lines_are_those_of_the_log(name: str) -> None:
    log = LOGS[name] if name in LOGS else LINES[name]
    model = log.shapes() if isinstance(log, Log) else entry(log.model).model()

    def lines(gib: float) -> list[str]:
        options = PlanOptions(kv_bytes=int(gib * GIB), max_model_len=log.longest, **dict(log.options))
        return make_plan("x", "", model, options).startup

    said = [f"Maximum concurrency for {log.longest:,} tokens per request: {log.concurrency}x"]
    if log.tokens is not None:
        said.insert(0, f"GPU KV cache size: {log.tokens:,} tokens")
    # The log rounds its memory to a hundredth of a GiB, which may be a block more or less.
    assert said in [lines(log.gib + offset / 10_000)[-len(said) :] for offset in range(-50, 51, 5)]


@pytest.mark.parametrize(
    ("model", "gpu", "utilization", "quantization", "drafts", "blocks"),
    # As users reported with default options: "max_num_seqs (1024) exceeds available Mamba cache blocks (856)"
    [
        ("Qwen3.6-27B", "H100", 0.95, FP8, 0, 856),
        ("Qwen3.8-27B", "RTX-PRO-6000", 0.90, None, 0, 635),
        ("Qwen3.5-27B", "A800", 0.92, None, 0, 348),
        ("Qwen3.8-27B", "H100-NVL", 0.92, FP8, 1, 983),
    ],
)
def test_what_keeps_vllm_from_starting_is_said(
    model: str, gpu: str, utilization: float, quantization: dict[str, Any] | None, drafts: int, blocks: int
) -> None:
    shapes = Log(model, gpu, utilization, 0, 0, 0, "", quantization).shapes()
    known, card = find_gpu(gpu)
    tokens, requests = default_step(card)
    weights = shapes.weight_bytes(1, 1, vision=True, drafts=drafts > 0)
    needed = reserve(shapes, card, Step(tokens, requests), draft_tokens=drafts).total
    memory = Card(known, card.total_bytes, utilization, weights, needed)
    options = PlanOptions(memory.kv_bytes, max_num_seqs=requests, speculative_tokens=drafts, mtp=drafts > 0)
    plan = make_plan("x", "", shapes, options, memory)
    said = re.fullmatch(r"max_num_seqs \(1024\) exceeds available Mamba cache blocks \((\d+)\)", plan.refusal)
    assert said
    assert int(said[1]) == pytest.approx(blocks, rel=0.05)
    assert not plan.starts("stock")
    fewer = make_plan("x", "", shapes, replace(options, max_num_seqs=int(said[1])), memory)
    assert (fewer.refusal, fewer.starts("stock")) == ("", True)
    assert make_plan("x", "", shapes, replace(options, enforce_eager=True), memory).refusal == ""


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("A100", "A100-80"),
        ("a100-sxm4-80gb", "A100-80"),
        ("A100-40GB", "A100-40"),
        ("NVIDIA A100-SXM4-40GB", "A100-40"),
        ("RTX 4090", "4090"),
        ("rtx-3090", "3090"),
        ("NVIDIA GeForce RTX 4080", "4080"),
        ("h100-sxm", "H100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 NVL", "H100-NVL"),
        ("h100-nvl-94gb", "H100-NVL"),
        ("NVIDIA A800 80GB PCIe", "A800"),
        ("h200-141gb", "H200"),
        ("NVIDIA B300", "B300"),
        ("RTX PRO 6000", "RTX-PRO-6000"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX-PRO-6000"),
        ("DGX Spark", "GB10"),
        ("AMD Instinct MI300X", "MI300X"),
        ("mi355x", "MI355X"),
        ("l4", "L4"),
    ],
)
def test_cards_are_known_as_people_spell_them(name: str, known: str) -> None:
    assert find_gpu(name)[0] == known


@pytest.mark.parametrize("known", GPUS)
def test_every_card_is_known_by_its_name_and_by_nothing_like_it(known: str) -> None:
    assert find_gpu(known)[0] == known
    with pytest.raises(UsageError):
        find_gpu(f"{known}x")


def test_defaults_are_vllms() -> None:
    assert default_step(None) == default_step(GPUS["A100-80"]) == default_step(GPUS["4090"]) == (2048, 256)
    assert default_step(GPUS["H100"]) == (8192, 1024)
    assert default_step(GPUS["B200"]) == (16384, 1024)


@pytest.mark.parametrize(
    ("requests", "tokens", "drafts", "card", "graphs"),
    # As logged: "Profiling CUDA graph memory: PIECEWISE=51 (largest=512), FULL=35 (largest=256)", and so on.
    [
        (256, 8192, 0, "A100-80", 51 + 35),
        (32, 2048, 0, "A100-80", 11 + 7),
        (40, 8192, 0, "H100", 13 + 8),
        (8, 65_536, 0, "GB10", 5 + 4),
        (128, 2048, 0, "A6000", 35 + 19),
    ],
)
def test_graphs_are_as_many_as_vllm_captures(requests: int, tokens: int, drafts: int, card: str, graphs: int) -> None:
    assert graph_count(Step(tokens, requests), GPUS[card], drafts) == graphs


def test_each_cause_moves_its_own_part() -> None:
    model, gpu = entry("Qwen3.5-27B").model(), GPUS["H100"]
    plain = reserve(model, gpu, Step(8192, 256))
    eager = reserve(model, gpu, Step(8192, 256, eager=True))
    assert (eager.graphs, eager.activations) == (0, plain.activations)
    assert plain.graphs > GIB
    text = reserve(model, gpu, Step(2048, 8, vision=False))
    assert text.activations < plain.activations / 2
    longer = reserve(model, gpu, Step(32_768, 8, vision=False))
    assert longer.activations == pytest.approx(16 * text.activations, rel=0.01)
    many = reserve(model, gpu, Step(2048, 1024, vision=False))
    assert many.activations > 1024 * model.vocabulary * 14
    one, two, four, eight = (reserve(model, gpu, Step(8192, 256), tp).communication for tp in (1, 2, 4, 8))
    assert 0 == one < two < four == eight
    assert reserve(model, GPUS["GB10"], Step(8192, 256)).runtime > plain.runtime
    # "profiled with 1 image items" in a step of up to 32,767 tokens, then 2, and never more than there are requests.
    small = entry("Qwen3.5-0.8B").model()
    one, two, three = (
        reserve(small, gpu, Step(tokens, count)).activations for tokens, count in ((8192, 8), (32_768, 8), (65_536, 3))
    )
    assert (two, three) == (2 * one, 3 * one)
    host = [reserve(small, GPUS["GB10"], Step(tokens, 8)).runtime for tokens in (8192, 32_768, 65_536)]
    assert host[1] - host[0] == (host[2] - host[1]) // 2 > GIB
    assert reserve(small, gpu, Step(65_536, 8)).runtime == plain.runtime
    experts = entry("Qwen3.5-35B-A3B").model()
    assert reserve(experts, GPUS["5090"], Step(8192, 1)).graphs > reserve(experts, GPUS["4090"], Step(8192, 1)).graphs

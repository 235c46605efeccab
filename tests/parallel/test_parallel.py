"""Two ranks on the CPU, tensor and pipeline parallel, against one process and against stock vLLM.

Pipeline stages compute what one process does, so tokens must be equal. Tensor parallelism adds in another order, so it
is compared with stock vLLM at the same size, where tokens must be equal too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from answers import assert_same_answers, gaps, tokens
from asking import make_prompts
from engines import run_child
from tidepool.cache import group_layers
from tidepool.capacity.memory import Memory
from tidepool.capacity.predict import predict_stages
from tidepool.models import CacheOptions, model_from_config
from tidepool.running.agreement import BFLOAT16_GAP
from tidepool.testing.tiny import make_checkpoint

pytestmark = pytest.mark.vllm

MIXED = {"requests": 24, "own_lengths": [40, 300, 620, 750], "shared_lengths": []}
SHORT = {"requests": 12, "own_lengths": [40, 150, 300], "shared_lengths": []}
SHARED = {"requests": 16, "own_lengths": [20, 60, 150, 400], "shared_lengths": [300, 500, 700]}
WORKLOADS = {
    "mixed": {"prompts": make_prompts(MIXED), "output_tokens": 40, "rounds": 1},
    "short": {"prompts": make_prompts(SHORT), "output_tokens": 20, "rounds": 1},
    "shared": {"prompts": make_prompts(SHARED), "output_tokens": 12, "rounds": 2},
}
ENGINES: dict[str, dict[str, Any]] = {
    "one process": {"side": "elastic", "kv_bytes": 52_000_000, "workloads": ["mixed", "shared"]},
    # Layers of the small model: three with states, one with attention, and the same again.
    "stages, prefix caching": {
        "side": "elastic",
        "pp": 2,
        "kv_bytes": 16_000_000,
        "caching": True,
        "max_num_seqs": 5,
        "poison": True,
        "workloads": ["shared"],
    },
    "stages, one without attention": {
        "side": "elastic",
        "pp": 2,
        "layers": "3,5",
        "kv_bytes": 16_000_000,
        "poison": True,
        "workloads": ["mixed"],
    },
    "stages, one without states": {
        "side": "fixed",
        "pp": 2,
        "layers": "7,1",
        "kv_bytes": 25_000_000,
        "max_num_seqs": 10,
        "poison": True,
        "workloads": ["mixed"],
    },
    "stages, host memory": {
        "side": "elastic",
        "pp": 2,
        "kv_bytes": 9_000_000,
        "caching": True,
        "host_gib": 0.2,
        "max_num_seqs": 3,
        "poison": True,
        "workloads": ["shared"],
    },
    "stock tensors": {"side": "off", "tp": 2, "kv_bytes": 26_000_000, "workloads": ["short", "shared"]},
    "tensors, host memory": {
        "side": "elastic",
        "tp": 2,
        "kv_bytes": 6_000_000,
        "caching": True,
        "host_gib": 0.2,
        "max_num_seqs": 3,
        "poison": True,
        "workloads": ["shared"],
    },
    "tensors": {"side": "elastic", "tp": 2, "kv_bytes": 10_000_000, "poison": True, "workloads": ["short"]},
}
STAGES = [name for name in ENGINES if name.startswith("stages")]
HOST = [name for name in ENGINES if "host memory" in name]
SERVED = [name for name, engine in ENGINES.items() if engine["side"] != "off"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("qwen3.5", tmp_path_factory.mktemp("models") / "qwen3.5")


@pytest.fixture(scope="module")
def results(checkpoint: Path) -> dict[str, Any]:
    job = {"model": str(checkpoint), "engines": ENGINES, "workloads": WORKLOADS}
    return dict(run_child(Path(__file__).with_name("child.py"), job, timeout=900))


@pytest.mark.parametrize("name", [name for name in STAGES if name not in HOST])
def test_stages_answer_as_one_process_does(results: dict[str, Any], name: str) -> None:
    """Under poison, with two batches in flight: a block is freed while an earlier batch may still read it."""
    (workload,) = ENGINES[name]["workloads"]
    assert results[name]["in_flight"] == 2
    assert_same_answers(results["one process"][workload], results[name][workload])


def test_tensor_ranks_answer_as_those_of_stock_vllm(results: dict[str, Any]) -> None:
    assert_same_answers(results["stock tensors"]["short"], results["tensors"]["short"])


@pytest.mark.parametrize("name", HOST)
def test_ranks_with_host_memory_answer_as_those_without(results: dict[str, Any], name: str) -> None:
    """Under poison, with a device cache that is far too small: each rank loads its own bytes."""
    reference = results["one process" if name in STAGES else "stock tensors"]["shared"]
    found = gaps(reference, results[name]["shared"])
    assert all(gap <= BFLOAT16_GAP for gap in found), found
    # Prompts that begin with a hit are computed in other pieces.
    assert len(found) <= len(reference["answers"]) // 4, found


@pytest.mark.parametrize("name", HOST)
def test_ranks_copy_the_same_blocks_from_and_to_the_host(results: dict[str, Any], name: str) -> None:
    first, second = results[name]["copies"]
    assert first == second
    traffic = results[name]["traffic"]
    assert traffic["loads"] == sum(not to_host for _, to_host, _ in first)
    assert traffic["loads"] > 4
    assert traffic["stores"] == len(first) - traffic["loads"]
    assert traffic["failed"] == 0
    assert results[name]["host_in_use_at_end"] == 0, "blocks leaked"


def test_the_runs_were_hard_enough(results: dict[str, Any]) -> None:
    assert len({tuple(answer) for answer in tokens(results["one process"]["mixed"])}) == MIXED["requests"]
    assert sum(results["stages, prefix caching"]["shared"]["cached"]) > 5000
    assert results["stages, one without attention"]["preemptions"] > 0
    assert all(results[name]["moves"] > 0 for name in ("stages, one without attention", "tensors"))
    assert all(results[name]["in_use_at_end"] == 0 for name in SERVED), "blocks leaked"


@pytest.mark.parametrize("name", SERVED)
def test_ranks_have_the_same_blocks_and_act_on_their_own_bytes(results: dict[str, Any], name: str) -> None:
    ranks = results[name]["ranks"]
    assert len(ranks) == ENGINES[name].get("tp", 1) * ENGINES[name].get("pp", 1)
    for field in ("extents", "pool_blocks", "max_num_seqs"):
        assert all(rank[field] == ranks[0][field] for rank in ranks), field
    for rank in ranks:
        assert rank["arena_bytes"] == rank["allocated"] <= ENGINES[name]["kv_bytes"]
        assert rank["hits"] == [[True] * 5] * 2, "poisoned, kept apart, copied, zeroed, left"
    if "layers" in ENGINES[name]:
        assert any(0 in rank["layers"] for rank in ranks)


def predicted(checkpoint: Path, engine: dict[str, Any]) -> Memory:
    """What the planner says of an engine, its layers cut as vLLM was told to."""
    model = model_from_config(json.loads((checkpoint / "config.json").read_text()))
    options = CacheOptions(tp=engine.get("tp", 1), copies=2 if engine.get("caching") else 1)
    stages = model.stages(engine.get("pp", 1), options)
    if "layers" in engine:
        first, _ = map(int, engine["layers"].split(","))
        layers = {name: cache for stage in stages for name, cache in stage.items()}
        early = {name for name in layers if int(name.split(".")[1]) < first}
        stages = [{n: c for n, c in layers.items() if (n in early) == begins} for begins in (True, False)]
    groups = [group_layers(stage, 32, align=64) for stage in stages]
    return predict_stages(groups, engine["kv_bytes"], engine["side"], engine.get("max_num_seqs", 64), 2048)


@pytest.mark.parametrize("name", SERVED)
def test_what_plan_predicts_is_allocated_to_the_block(results: dict[str, Any], checkpoint: Path, name: str) -> None:
    memory = predicted(checkpoint, ENGINES[name])
    if ENGINES[name]["side"] == "elastic":
        assert results[name]["extents"] == memory.units
    assert results[name]["blocks"] == [group.blocks for group in memory.groups]
    assert results[name]["told"] == memory.tokens_with(1), "what num_gpu_blocks x block_size is"

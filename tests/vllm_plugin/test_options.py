"""docs/settings.md is true, and says something about every option of vLLM's that touches the KV cache."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from engines import run_child
from tidepool.testing.tiny import make_checkpoint
from tidepool.vllm_plugin.asked import WITHOUT_EFFECT
from tidepool.vllm_plugin.gates import GATES
from tidepool.vllm_plugin.versions import series_here

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm")
DOCUMENT = Path(__file__).parents[2] / "docs" / "settings.md"
WORDS = ("honoured", "refused", "without effect", "vLLM's own")


FIELDS = {"kv_cache_dtype": "cache_dtype", "scheduling_policy": "policy"}
"""Arguments whose fields have other names; the document names both in one row."""


def table() -> dict[str, str]:
    """What the document says about each option."""
    rows: dict[str, str] = {}
    for line in DOCUMENT.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 3:
            for name in re.findall(r"`(\w+)`", cells[0]):
                assert name not in rows, f"{name} has two rows"
                rows[name] = cells[1]
    return rows


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    checkpoint = make_checkpoint("qwen3.5", tmp_path_factory.mktemp("models") / "tiny")
    config = json.loads((checkpoint / "config.json").read_text())
    child = Path(__file__).with_name("options_child.py")
    answers: dict[str, Any] = run_child(child, {"config": config}, timeout=600)
    return answers


def test_every_field_has_a_row() -> None:
    """A new field of a later vLLM has to be looked at before it is used."""
    from vllm.config import CacheConfig, SchedulerConfig

    names = {each.name for config in (CacheConfig, SchedulerConfig) for each in fields(config)}
    assert {name for name in names if not name.startswith("_")} - table().keys() == set()


def test_rows_use_the_words_explained_above_them() -> None:
    gates = {gate.name for gate in GATES}
    for name, word in table().items():
        gate = re.fullmatch(r"falls back \(([\w-]+)\)", word)
        assert gate[1] in gates if gate else word in WORDS, name


def test_whatever_is_without_effect_is_told_at_start() -> None:
    assert {name for name, word in table().items() if word == "without effect"} == WITHOUT_EFFECT.keys()


def test_options_do_what_the_document_says(found: dict[str, Any]) -> None:
    found = dict(found)
    if series_here() != "0.32":
        # vLLM's CPU backend refuses it itself where the processor lacks AVX-512.
        refused = found["kv_cache_dtype"].get("refused")
        if refused is not None:
            assert "not supported by the CPU attention" in refused
            del found["kv_cache_dtype"]
    for name, word in table().items():
        result = found.get(name)
        if name in FIELDS.values():
            continue
        if result is None:
            assert word == "vLLM's own" or name in UNTRIED, f"{name} wasn't tried"
        elif gate := re.fullmatch(r"falls back \(([\w-]+)\)", word):
            assert result == {"gate": gate[1]}, name
        elif word == "refused":
            assert result.keys() == {"refused"}, name
        else:
            assert "served" in result, (name, result)
            told = [line for line in result["log"] if "without effect here" in line]
            assert len(told) == (word == "without effect"), (name, result)


UNTRIED = {
    "kv_cache_dtype": "vLLM 0.33 without its libraries refuses it; with 0.32 it is tried",
    "use_replayssm": "vLLM refuses it for this model; test_gates has it",
    "disable_hybrid_kv_cache_manager": "vLLM refuses hybrid models with it; test_gates has it",
    "kv_transfer_config": "kv_offloading_size sets it",
    "ec_transfer_config": "test_gates has it",
    "tensor_parallel_size": "tests/parallel",
    "pipeline_parallel_size": "tests/parallel",
    "decode_context_parallel_size": "vLLM refuses it on one rank; test_gates has it",
    "prefill_context_parallel_size": "vLLM refuses it on the CPU; test_gates has it",
    "distributed_executor_backend": "test_gates has it",
    "nnodes": "test_gates has it",
    "data_parallel_backend": "test_gates has it",
    "speculative_config": "tests/speculative; test_gates has it",
    "attention_config": "test_gates has it",
    "VLLM_USE_V2_MODEL_RUNNER": "it needs Triton; test_gates has it",
    "VLLM_CPU_KVCACHE_SPACE": "the memory isn't allocated here; tests/server sets it",
}
"""Options that can't be tried in an engine without a model, and where they are instead."""


def served(found: dict[str, Any], name: str) -> Any:
    assert "served" in found[name], found[name]
    return found[name]["served"]


def test_the_checkpoint_spacing_is_the_users(found: dict[str, Any]) -> None:
    blocks, state_bytes = served(found, "nothing")
    assert blocks == {"MambaSpec": 512, "FullAttentionSpec": 16}
    assert served(found, "mamba_block_size") == [{"MambaSpec": 256, "FullAttentionSpec": 16}, 256]
    assert served(found, "mamba_block_size, as the block") == {"MambaSpec": 16, "FullAttentionSpec": 16}
    assert served(found, "mamba_block_size, agreed") == {"MambaSpec": 256, "FullAttentionSpec": 16}
    assert served(found, "block_size") == {"MambaSpec": 512, "FullAttentionSpec": 64}
    assert (
        "--mamba-block-size (250) must be a multiple of the attention block (16 tokens)."
        in (found["mamba_block_size, odd"]["refused"])
    )
    assert "both say how far checkpoints lie apart: leave one out." in found["mamba_block_size, twice"]["refused"]
    assert "of 24 tokens isn't a multiple of the 16" in found["block_size, odd"]["refused"]
    assert served(found, "mamba_cache_dtype") > state_bytes > served(found, "mamba_ssm_cache_dtype")


def test_the_retention_interval_is_the_users(found: dict[str, Any]) -> None:
    """A prompt of 3,000 tokens leaves a state at 2,112, twice the interval, or at the end of each of its steps."""
    assert served(found, "prefix_cache_retention_interval") == [{"MambaSpec": 528, "FullAttentionSpec": 16}, 2_112]
    assert served(found, "prefix_cache_retention_interval, dense") == [
        {"MambaSpec": 512, "FullAttentionSpec": 16},
        1_200,
    ]
    assert (
        "(1000) must be a multiple of the attention block (16 tokens)."
        in (found["prefix_cache_retention_interval, odd"]["refused"])
    )
    assert (
        "(1024) must be a multiple of --mamba-block-size (384)."
        in (found["prefix_cache_retention_interval, apart"]["refused"])
    )


def test_limits_hold(found: dict[str, Any]) -> None:
    assert served(found, "max_num_active_seqs") == 3
    assert served(found, "max_num_batched_tokens") <= 1_024
    assert served(found, "max_num_scheduled_tokens") <= 1_024
    assert served(found, "long_prefill_token_threshold") <= 600
    assert served(found, "long_prefill_token_threshold_adaptive") > 600
    assert served(found, "enable_chunked_prefill") == 3_000
    assert served(found, "enable_prefix_caching") == 0
    assert served(found, "num_gpu_blocks_override") == 20
    assert served(found, "kv_events_config") == ["AllBlocksCleared"]


def test_surprises_are_told_once_at_start(found: dict[str, Any]) -> None:
    (line,) = found["max_num_seqs"]["log"]
    assert line == "max_num_seqs: lowered from 256 to 40, the requests whose states fit in this memory"
    (line,) = found["num_gpu_blocks_override"]["log"]
    assert line.startswith("num_gpu_blocks_override: counts extents of 1.5")
    assert found["nothing"]["log"] == []


def test_a_format_leaves_out_no_single_layers(found: dict[str, Any]) -> None:
    assert "takes sliding_window alone, not 3." in found["kv_cache_dtype_skip_layers, kv"]["refused"]

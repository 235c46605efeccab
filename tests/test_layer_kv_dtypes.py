"""Layers that keep their tokens in several formats: what plan says, and what vLLM's engine core makes of it."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tidepool.cache import FullAttention, SlidingWindow
from tidepool.capacity.memory import ElasticMemory, StockMemory
from tidepool.command_line import UsageError
from tidepool.models import CacheOptions, ModelConfigError, entry, find_model
from tidepool.plan import PlanOptions, make_plan, parse_layer_dtypes
from tidepool.plan.planner import divide
from tidepool.replay.job import Job, Mode

GLM_LIKE = Path(__file__).parents[1] / "bench" / "glm_like"
MEMORY = 24_000_000_000


def odd_kinds() -> tuple[tuple[int | str, str], ...]:
    layers = json.loads((GLM_LIKE / "config.json").read_text(encoding="utf-8"))["layer_types"]
    attention = [index for index, kind in enumerate(layers) if kind == "full_attention"]
    return tuple((layer, f"{516 + 12 * number}B") for number, layer in enumerate(attention))


def test_layers_are_named_by_number_range_or_window() -> None:
    assert parse_layer_dtypes(None) == ()
    assert parse_layer_dtypes("3=fp8, 7-8=528B,sliding_window=auto") == (
        (3, "fp8"),
        (7, "528B"),
        (8, "528B"),
        ("sliding_window", "auto"),
    )
    for text in ("3", "3=", "=fp8", "a=fp8", "-3=fp8", "3=fp8,", "windows=auto"):
        with pytest.raises(UsageError, match="types no layers"):
            parse_layer_dtypes(text)


def test_layers_keep_what_they_are_told() -> None:
    model = entry("Qwen3.5-4B").model()
    plain = model.layer_caches(CacheOptions())
    mixed = model.layer_caches(CacheOptions(kv_dtype="fp8", layer_kv_dtypes=((3, "auto"), (7, "fp8"), (7, "528B"))))
    assert mixed["layers.3.attention"] == plain["layers.3.attention"]
    assert mixed["layers.7.attention"] == FullAttention(4 * 528)
    attention = plain["layers.11.attention"]
    assert isinstance(attention, FullAttention)
    assert mixed["layers.11.attention"] == FullAttention(attention.bytes_per_token // 2)
    with pytest.raises(ModelConfigError, match="Layer 4 has no attention"):
        model.layer_caches(CacheOptions(layer_kv_dtypes=((4, "fp8"),)))
    with pytest.raises(ModelConfigError, match="no KV cache dtype '0B'"):
        model.layer_caches(CacheOptions(layer_kv_dtypes=((3, "0B"),)))
    with pytest.raises(ModelConfigError, match="no layers with a sliding window"):
        model.layer_caches(CacheOptions(layer_kv_dtypes=(("sliding_window", "auto"),)))


def test_windows_keep_what_they_are_told() -> None:
    model = entry("Gemma-3-4B").model()
    plain = model.layer_caches(CacheOptions()).values()
    mixed = model.layer_caches(CacheOptions(kv_dtype="fp8", layer_kv_dtypes=(("sliding_window", "auto"),))).values()
    for before, after in zip(plain, mixed, strict=True):
        assert (before == after) == isinstance(before, SlidingWindow)


def test_a_plan_of_23_groups() -> None:
    """The figures of docs/many-groups.md; bench/many_groups.py has the same from vLLM's engine core."""
    model = find_model(str(GLM_LIKE))[2]
    options = PlanOptions(
        kv_bytes=MEMORY, prefix_caching=False, max_num_seqs=1024, contexts=(12,), layer_kv_dtypes=odd_kinds()
    )
    plan = make_plan("glm", "", model, options)
    stock, elastic = plan.columns["stock"], plan.columns["elastic"]
    assert (len(stock.memory.groups), stock.memory.token_step, stock.concurrency[12]) == (35, 4240, 11)
    assert (len(elastic.memory.groups), elastic.memory.token_step, elastic.concurrency[12]) == (23, 16, 138)
    assert max(group.padding for group in elastic.memory.groups) < 0.032


def small() -> dict[str, Any]:
    """A model of 5 groups of small layers."""
    return dict(json.loads((GLM_LIKE / "config.json").read_text(encoding="utf-8"))) | {
        "num_hidden_layers": 12,
        "layer_types": ["full_attention" if index % 3 == 2 else "linear_attention" for index in range(12)],
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 16,
    }


@pytest.mark.vllm
def test_the_engine_core_plans_the_same(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    from tidepool.replay.parent import run_jobs
    from tidepool.replay.workload import load_workload

    trace = tmp_path / "trace.jsonl"
    prompts = [{"token_ids": [index * 12 + place for place in range(12)], "output_length": 2} for index in range(40)]
    trace.write_text("\n".join(map(json.dumps, prompts)), encoding="utf-8")
    (tmp_path / "config.json").write_text(json.dumps(small()), encoding="utf-8")
    kinds: tuple[tuple[int | str, str], ...] = ((2, "tqkv-k4v4"), (5, "516B"), (8, "fp8"))
    kv_bytes = 400_000_000
    plain = Job("stock", small(), "H100", kv_bytes, str(trace), None, None, 0, 1.0, 64, 2048, layer_kv_dtypes=kinds)
    modes: tuple[Mode, ...] = ("stock", "elastic")
    requests = load_workload(plain).requests
    made, failures = run_jobs([replace(plain, mode=mode) for mode in modes], requests, Console(file=io.StringIO()))
    assert not failures
    stock, elastic = made

    model = find_model(str(tmp_path))[2]
    options = PlanOptions(kv_bytes=kv_bytes, max_num_seqs=64, prefix_caching=True, layer_kv_dtypes=kinds)
    stages = model.stages(1, options.cache_options())
    planned = divide("elastic", model, stages, options, 15)
    assert isinstance(planned, ElasticMemory)
    assert (elastic.extents, elastic.extent_bytes) == (planned.extents, planned.extent_bytes)
    assert [(g.layers, g.block_bytes, g.natural_bytes) for g in elastic.groups] == [
        (g.layers, g.stride, g.natural_bytes) for g in planned.groups
    ]
    pool = divide("stock", model, stages, options, 15)
    assert isinstance(pool, StockMemory)
    assert {group.block_bytes for group in stock.groups} == {pool.block_bytes}
    assert stock.block_tokens == pool.token_step
    assert sorted((g.layers, g.natural_bytes) for g in stock.groups) == sorted(
        (g.layers, g.natural_bytes) for g in pool.groups
    )
    assert elastic.running_peak > stock.running_peak

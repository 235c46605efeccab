"""Engines that tidepool serves and others that it leaves to vLLM, in one process: real cores, the model left out."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tidepool.testing.tiny import make_checkpoint

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm")
MEMORY = 100_000_000


def engine_of(side: Any, folder: Path, **options: Any) -> Any:
    from tidepool.replay.engine import EngineShape, make_engine

    config = json.loads((make_checkpoint("qwen3.5", folder) / "config.json").read_text(encoding="utf-8"))
    return make_engine(EngineShape(config, MEMORY, side, max_num_seqs=8, max_model_len=4096, **options))


def serve(engine: Any) -> int:
    """Serve a prompt. Returns the steps that it took."""
    from tidepool.replay.engine import add_request
    from tidepool.replay.step import take_step

    add_request(engine, "request", list(range(2000)), 4)
    steps = 0
    while engine.scheduler.has_unfinished_requests():
        take_step(engine)
        steps += 1
    return steps


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_one_is_vllms_own_beside_one_that_is_served(
    prefix_caching: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from tidepool.vllm_plugin.planning import TidepoolKVCacheConfig

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TIDEPOOL", os.environ.get("TIDEPOOL", ""))
    served = engine_of("elastic", tmp_path / "served", prefix_caching=prefix_caching)
    stock = engine_of("stock", tmp_path / "stock", prefix_caching=prefix_caching)
    config = stock.scheduler.kv_cache_config
    assert type(served.scheduler.kv_cache_config) is TidepoolKVCacheConfig
    assert type(config) is KVCacheConfig
    assert type(stock.scheduler.kv_cache_manager) is KVCacheManager
    assert type(stock.scheduler.kv_cache_manager.block_pool) is BlockPool
    specs = [group.kv_cache_spec for group in config.kv_cache_groups]
    assert len(specs) > len(served.scheduler.kv_cache_config.kv_cache_groups)
    (page,) = {spec.page_size_bytes for spec in specs}
    assert config.num_blocks == MEMORY // page // max(len(group.layer_names) for group in config.kv_cache_groups)
    cache_config = stock.vllm_config.cache_config
    assert cache_config.kv_cache_size_tokens == int(cache_config.kv_cache_max_concurrency * 4096) > 4096
    assert serve(stock) > 0
    assert serve(served) > 0


def test_workers_zero_blocks_of_their_group_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from tidepool.vllm_plugin.worker import encode
    from tidepool.vllm_plugin.wrappers import zero_blocks

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = engine_of("elastic", tmp_path).scheduler.kv_cache_config
    memory = torch.full((config.arena_bytes,), 7, dtype=torch.uint8)
    vllms: list[Any] = []
    zero_blocks(
        lambda *given: vllms.append(given),
        SimpleNamespace(kv_cache_config=config, kv_caches=[memory]),
        [encode(1, 150, 2)],
    )
    changed = torch.nonzero(memory != 7).flatten()
    start = 150 * config.strides[1]
    assert (int(changed[0]), len(changed)) == (start, config.block_bytes[1])
    assert not vllms
    other = SimpleNamespace(kv_cache_config=None)
    zero_blocks(lambda *given: vllms.append(given), other, [3])
    assert vllms == [(other, [3])]


def test_each_rank_has_its_part_of_the_host_memory() -> None:
    from tidepool.vllm_plugin.planning import host_bytes_of_rank

    def config(size: float | None, ranks: int, caching: bool) -> Any:
        return SimpleNamespace(
            cache_config=SimpleNamespace(kv_offloading_size=size, enable_prefix_caching=caching),
            parallel_config=SimpleNamespace(world_size=ranks),
        )

    assert host_bytes_of_rank(config(3.0, 2, True)) == 3 << 29
    assert host_bytes_of_rank(config(3.0, 1, False)) == 0
    assert host_bytes_of_rank(config(None, 1, True)) == 0

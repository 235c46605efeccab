"""What of vLLM's BlockPool a group's pool has; a later vLLM's new names are noticed here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tidepool.testing.tiny import make_checkpoint
from tidepool.vllm_plugin.versions import series_here

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm")

SET = {
    "num_gpu_blocks": "block ids of the group, the null block included",
    "medium": "as vLLM's",
    "enable_caching": "as vLLM's",
    "hash_block_size": "as vLLM's",
    "blocks": "as vLLM's",
    "cached_block_hash_to_block": "as vLLM's",
    "cached_block_hashes_by_block": "as vLLM's",
    "null_block": "as vLLM's",
    "enable_kv_cache_events": "as vLLM's",
    "kv_event_queue": "one for all groups",
    "metrics_collector": "always None: kv_cache_metrics is unsupported",
    "num_hash_lookahead_tokens": "as vLLM's, from 0.33 on",
}
"""Attributes that vLLM sets when it makes a pool and ours, which skips that, sets too."""
OURS = {
    "get_cached_block",
    "get_new_blocks",
    "touch",
    "free_blocks",
    "evict_blocks",
    "reset_prefix_cache",
    "get_num_free_blocks",
    "get_usage",
    "move_block_hashes",
    "_insert_block_hash",
    "_remove_cached_block_hashes",
    "cache_full_blocks",
    "cache_partial_block",
    "_emit_block_removed_events",
}
"""Methods that ours has of its own."""
VLLMS = {
    "is_block_writable",
    "take_events",
    "_build_block_stored_event",
    "_get_partial_block_hash",
    "_get_partial_block_parent_hash_and_start",
    "_maybe_evict_cached_block",
    "_generate_event_extra_keys",
    "_lookahead_token_ids",
}
"""Methods of vLLM's that work on ours as they are."""
LEFT_OUT = {
    "free_block_queue": "the arena knows which blocks are free",
    "_reuse_watchers": "for unpin_blocks",
    "unpin_blocks": "for KV connectors, which are unsupported",
    "_notify_reuse": "for unpin_blocks",
    "emit_cached_block_events": "the coordinator's tells what was found",
}
"""What nobody calls or reads on ours."""


SINCE_33 = {"num_hash_lookahead_tokens", "_generate_event_extra_keys", "_lookahead_token_ids"}
"""Those of them that 0.32 doesn't have."""


def names(pool_class: type) -> set[str]:
    return {name for name in vars(pool_class) if not name.startswith("__")}


def test_every_name_of_vllms_is_on_a_list() -> None:
    from vllm.v1.core.block_pool import BlockPool

    ours = SET.keys() | OURS | VLLMS | LEFT_OUT.keys()
    if series_here() == "0.32":
        ours = ours - SINCE_33
    assert names(BlockPool) | vars(BlockPool(4, True, 16)).keys() == ours


def test_the_lists_are_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.core.block_pool import BlockPool

    from tidepool.replay.engine import EngineShape, make_engine

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = json.loads((make_checkpoint("qwen3.5", tmp_path) / "config.json").read_text())
    engine = make_engine(EngineShape(config, 100_000_000, "elastic", max_num_seqs=8, max_model_len=4096))
    managers: list[Any] = engine.scheduler.kv_cache_manager.coordinator.single_type_managers
    assert len(managers) == 2
    for pool in (manager.block_pool for manager in managers):
        assert isinstance(pool, BlockPool)
        assert vars(pool).keys() >= SET.keys()
        assert not vars(pool).keys() & LEFT_OUT.keys()
        own = set().union(*(names(each) for each in type(pool).__mro__ if not issubclass(BlockPool, each)))
        assert own & names(BlockPool) == OURS
    engine.shutdown()

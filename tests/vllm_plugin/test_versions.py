"""What differs between versions, on the one that is installed (`make test-0.33` runs this on the other)."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from tidepool.vllm_plugin import versions

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm")
NEW = versions.series_here() != "0.32"


def test_a_later_version_is_left_to_vllm_in_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from tidepool.vllm_plugin import patches, register

    monkeypatch.setattr("vllm.version.__version__", "0.34.0")
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    monkeypatch.setattr(patches, "install", lambda: pytest.fail("nothing may be patched"))
    register()
    # pytest listens at "vllm", too, where that was set up before: then it meets each record twice.
    records = [record for record in dict.fromkeys(caplog.records) if record.name == "vllm.tidepool"]
    assert [record.getMessage() for record in records] == [
        "tidepool falls back to vLLM's own KV cache. vllm-version: vLLM 0.34.0 hasn't been tested "
        "(tested: 0.32.0, 0.33.0)."
    ]


def test_lookups_find_one_more_block_where_hashes_do_not_look_ahead() -> None:
    """From 0.33 on a group can hold a drafter's layers, and no lookup gives one block less for it."""
    assert versions.finds_one_more(SimpleNamespace(eagle_group_ids={1}))
    assert versions.finds_one_more(SimpleNamespace(eagle_group_ids={1}, drop_eagle_group_ids={1}))
    assert not versions.finds_one_more(SimpleNamespace(eagle_group_ids={1}, drop_eagle_group_ids=set()))


@pytest.mark.skipif(not NEW, reason="hashes look ahead from vLLM 0.33 on")
def test_events_tell_the_tokens_that_hashes_look_ahead_to() -> None:
    from vllm import SamplingParams
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.request import Request

    request = Request("one", list(range(100, 150)), SamplingParams(max_tokens=1), None)
    for ahead, told in ((0, None), (1, [[116], [132]])):
        pool = BlockPool(4, True, 16, num_hash_lookahead_tokens=ahead)
        details = versions.event_details(pool, request, [16, 32], 16)
        assert details == {"extra_keys_list": [None, None], "lookahead_token_ids": told}


def test_states_saved_inside_steps_come_with_what_the_version_wants() -> None:
    import torch

    metadata = versions.checkpoint_metadata(torch.tensor([64]), torch.tensor([3]), offsets=[64], query_lens=[70])
    assert metadata.offsets == [64]
    assert getattr(metadata, "query_lens", None) == ([70] if NEW else None)


def test_the_planner_is_vllms() -> None:
    vllm = versions.planner_of_vllm()
    assert callable(vllm.get_kv_cache_groups)
    assert callable(vllm.get_kv_cache_config_from_groups)

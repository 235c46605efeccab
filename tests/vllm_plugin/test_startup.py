"""What the log at start says of sizes that tidepool chose."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm")

from tidepool.vllm_plugin import planning  # noqa: E402
from tidepool.vllm_plugin.startup import _packed_words, _settings  # noqa: E402

BLOCK = "block_size: 32 tokens, the fewest that the attention kernels take"


@pytest.mark.parametrize(
    ("cache", "settings", "spacing", "lines"),
    [
        ({}, {}, 512, [BLOCK, "checkpoint_tokens: 512, the default"]),
        ({}, {}, 528, [BLOCK, "checkpoint_tokens: 528, what kernels and layers take"]),
        (
            {"prefix_cache_retention_interval": 1_200},
            {},
            600,
            [BLOCK, "checkpoint_tokens: 600, the part of prefix_cache_retention_interval (1,200) nearest to 512"],
        ),
        ({"enable_prefix_caching": False}, {}, 512, [BLOCK]),
        ({"user_specified_block_size": True}, {"checkpoint_tokens": 256}, 256, []),
        ({}, {"block_tokens": 32, "checkpoint_tokens": 256}, 256, []),
        (
            {"user_specified_block_size": True},
            {"checkpoint_tokens": 256, "checkpoint_states": "bfloat16"},
            256,
            ["checkpoint_states: bfloat16, without effect here (it makes no state smaller)"],
        ),
        (
            {"user_specified_block_size": True, "enable_prefix_caching": False},
            {"checkpoint_states": "int8"},
            512,
            ["checkpoint_states: int8, without effect here (nothing is cached)"],
        ),
    ],
)
def test_what_the_user_left_open_is_told_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, cache: dict[str, Any], settings: dict[str, Any], spacing: int, lines: list[str]
) -> None:
    monkeypatch.setattr(planning, "requests_with_states", lambda config: 8)
    given = {
        "block_size": 32,
        "user_specified_block_size": False,
        "enable_prefix_caching": True,
        "prefix_cache_retention_interval": None,
        "num_gpu_blocks_override": None,
    }
    vllm_config = SimpleNamespace(
        cache_config=SimpleNamespace(**given | cache), additional_config={"tidepool": settings}
    )
    config: Any = SimpleNamespace(packed=(), host_geometry=None, geometry=None, checkpoint_tokens=spacing)
    assert [line.strip() for line in _settings(vllm_config, config)] == lines


def test_what_packing_does_is_told() -> None:
    config: Any = SimpleNamespace(
        packed=(0,), kv_cache_groups=[1, 2], strides=(3_000, 16, 1_000), block_bytes=(9, 9, 9)
    )
    words = _packed_words("int8", config, caching=True)
    assert words.startswith("int8, which rounds states that are only cached and holds 3.0 times as many;")

"""What differs between the versions of vLLM that tidepool serves, but for the rows of the tables of patches.

Whoever takes tidepool to another version reads docs/versions.md, adds the version here, and then the rows of
`tidepool.vllm_plugin.patches`. The rest of the plugin asks here and knows no versions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

SUPPORTED_VLLM = ("0.32.0", "0.33.0")
"""Versions whose seams were read and tested."""


def series_of(version: str) -> str:
    """The series that a version is of: what a row of a table of patches is for."""
    return ".".join(version.split(".")[:2])


SERIES = tuple(map(series_of, SUPPORTED_VLLM))
"""Series of the versions that are served."""


def series_here() -> str:
    """The series of this process's vLLM."""
    from vllm.version import __version__

    return series_of(__version__)


def unsupported_version(version: str) -> str | None:
    """Why this version of vLLM is unsupported, or None."""
    if version in SUPPORTED_VLLM:
        return None
    return f"vllm-version: vLLM {version} hasn't been tested (tested: {', '.join(SUPPORTED_VLLM)})"


# Planning -----------------------------------------------------------------------------------------------------


def planner_of_vllm() -> Any:
    """The module with vLLM's own ``get_kv_cache_groups`` and ``get_kv_cache_config_from_groups``."""
    if series_here() == "0.32":
        from vllm.v1.core import kv_cache_utils

        return kv_cache_utils
    from vllm.v1.core import kv_cache_planning

    return kv_cache_planning


def state_export_tokens(vllm_config: Any) -> int:
    """Tokens at multiples of which all layers can save a state inside a step; 1 where they set no such limit.

    Asked in a worker, with the model loaded. Before 0.33 the layers' specs alone told.
    """
    if series_here() == "0.32":
        return 1
    from vllm.model_executor.layers.mamba.abstract import get_mamba_prefill_checkpoint_alignment

    return get_mamba_prefill_checkpoint_alignment(vllm_config) or 1


# Drafts -------------------------------------------------------------------------------------------------------


def hash_lookahead_of(vllm_config: Any) -> int:
    """Tokens behind a block that its hash covers as well, for a drafter that reads them. Before 0.33 none."""
    return int(getattr(vllm_config, "num_hash_lookahead_tokens", 0))


def finds_one_more(coordinator: Any) -> bool:
    """Whether lookups find one attention block more than they give: for a drafter, where hashes don't look ahead."""
    return bool(getattr(coordinator, "drop_eagle_group_ids", coordinator.eagle_group_ids))


# KV events ----------------------------------------------------------------------------------------------------


def event_details(pool: Any, request: Any, ends: Sequence[int], tokens: int) -> dict[str, Any]:
    """What an event tells of blocks beside their tokens, as arguments of vLLM's ``_build_block_stored_event``.

    Args:
        pool: a vLLM BlockPool.
        request: whose blocks they are.
        ends: where each ends, in tokens.
        tokens: of each block.
    """
    if series_here() == "0.32":
        from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys

        return {"extra_keys_list": [generate_block_hash_extra_keys(request, e - tokens, e, 0)[0] for e in ends]}
    return {
        "extra_keys_list": [pool._generate_event_extra_keys(request, e - tokens, e, 0)[0] for e in ends],
        "lookahead_token_ids": [pool._lookahead_token_ids(request, e) for e in ends]
        if pool.num_hash_lookahead_tokens
        else None,
    }


# States saved inside steps ------------------------------------------------------------------------------------


def checkpoint_metadata(*tensors: Any, query_lens: Sequence[int], **fields: Any) -> Any:
    """vLLM's MambaPrefillCheckpointMetadata; ``query_lens`` are the tokens of each row in the step."""
    from vllm.model_executor.layers.mamba.checkpoint import MambaPrefillCheckpointMetadata

    if series_here() != "0.32":
        fields["query_lens"] = list(query_lens)
    return MambaPrefillCheckpointMetadata(*tensors, **fields)

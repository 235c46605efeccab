"""What is decided about an engine, and how later steps and other processes come to know of it.

A worker decides, with the model loaded, and notes the `ServingPlan` in its configuration. The engine core may be
another process: the plan reaches it with the layers' specs, which it asks every worker for. vLLM's specs are frozen
dataclasses whose copies lose what isn't a field. So each spec carries word of its worker, be it only that vLLM serves
the engine, and a spec without any has lost it on the way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import KVCacheSpec

from tidepool.cache import CacheConfigError, StateFormat
from tidepool.capacity import Partition
from tidepool.certificates import Setup
from tidepool.vllm_plugin.notes import read_note, write_note
from tidepool.vllm_plugin.settings import Eviction, Settings

logger = init_logger("vllm.tidepool")

CHECKPOINT_TOKENS = 512
"""From one checkpoint that different prompts may share to the next; it costs no padding. Chosen by replay
(docs/prefix-caching.md): few enough for shared system prompts."""
_PLAN = "plan"
_FALLBACK = "fallback"
_ON_SPEC = "tidepool_plan"


class StockBlocks(NamedTuple):
    """What vLLM alone would have set for this model."""

    block_tokens: int
    state_page_bytes: int | None
    """The padded page of one state layer; None if it needs no padding."""


class ServingPlan(NamedTuple):
    """tidepool serves this engine, and how."""

    partition: Partition
    eviction: Eviction
    stock: StockBlocks | None
    """None on a pipeline stage without attention, which vLLM doesn't inflate."""
    checkpoint_tokens: int = CHECKPOINT_TOKENS
    """From one checkpoint to the next, with prefix caching."""
    blocks_per_extent: tuple[int, ...] = ()
    """Blocks of each group in an extent, where several pipeline stages share them."""
    places: tuple[tuple[int, int], ...] = ()
    """(first block, blocks) of each group's fixed share, where several ranks share them."""
    hits_first: bool = False
    """Of the requests that wait, those with much in the cache go first."""
    checkpoint_states: StateFormat = "same"
    """In which format states are kept that are only cached."""
    memory_bytes: int | None = None
    """KV memory of the smallest rank, once the engine core plans it. Who plans without has a small cache in mind, for
    CUDA graphs to be measured with."""
    setup: Setup | None = None
    """What the engine is in a certificate's terms."""


# In the configuration: the rest of the process, and copies of the configuration -------------------------------


def plan_of(vllm_config: Any) -> ServingPlan | None:
    """The plan of an engine that tidepool serves, else None."""
    plan: ServingPlan | None = read_note(vllm_config, _PLAN)
    return plan


def note_plan(vllm_config: Any, plan: ServingPlan | None) -> None:
    """Let `plan_of` tell this plan from now on; with None, vLLM serves the engine that is configured here."""
    write_note(vllm_config, _PLAN, plan)


def fall_back(vllm_config: Any, settings: Settings, reason: str | None) -> None:
    """Leave an engine to vLLM, and say so once.

    Args:
        vllm_config: vLLM's configuration of the engine; `fallback_reason` tells the reason from now on.
        settings: they may have switched tidepool off, which needs no other reason.
        reason: why it isn't served, as ``name: reason``.
    """
    if not settings.enabled:
        reason = "off: TIDEPOOL or additional_config says so"
        logger.info_once("tidepool is switched off: vLLM's own KV cache is used.", scope="global")
    else:
        logger.warning_once("tidepool falls back to vLLM's own KV cache. %s.", reason, scope="global")
    write_note(vllm_config, _FALLBACK, reason)


def fallback_reason(vllm_config: Any) -> str | None:
    """Why the worker of this configuration left its engine to vLLM, as ``name: reason``; None if it didn't."""
    reason: str | None = read_note(vllm_config, _FALLBACK)
    return reason


# On the layers' specs: from a worker to the engine core -------------------------------------------------------


def attach_plan(vllm_config: Any, specs: Mapping[str, KVCacheSpec]) -> None:
    """In a worker: send the plan with the layers' specs, or word that there is none."""
    for spec in specs.values():
        object.__setattr__(spec, _ON_SPEC, plan_of(vllm_config))


def carries_plan(specs: Iterable[KVCacheSpec]) -> bool:
    """Whether a plan is attached to any of the specs: tidepool serves their engine."""
    return any(getattr(spec, _ON_SPEC, None) for spec in specs)


def detach_plans(specs_of_ranks: Sequence[Mapping[str, KVCacheSpec]]) -> dict[int, ServingPlan | None]:
    """In the engine core: take off the specs what `attach_plan` attached.

    Returns:
        By rank, its plan, or None if vLLM serves it. Ranks without layers, or without word from a worker, aren't in it.

    Raises:
        CacheConfigError: some layers of a rank have word and others don't.
    """
    plans: dict[int, ServingPlan | None] = {}
    for rank, specs in enumerate(specs_of_ranks):
        lost = [name for name, spec in specs.items() if not hasattr(spec, _ON_SPEC)]
        if len(lost) == len(specs):
            continue
        if lost:
            raise CacheConfigError(
                f"tidepool's plan was lost on the way from rank {rank}: {len(lost)} of {len(specs)} layers came "
                f"without it, first {lost[0]!r}. Something copies them. TIDEPOOL=off leaves the engine to vLLM."
            )
        plans[rank] = getattr(next(iter(specs.values())), _ON_SPEC)
    # Last, for layers and ranks may share a spec.
    for spec in (spec for specs in specs_of_ranks for spec in specs.values()):
        spec.__dict__.pop(_ON_SPEC, None)
    return plans

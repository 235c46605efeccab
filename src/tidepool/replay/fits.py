"""Which modes can run as asked, and how long a request they hold: arithmetic, before any engine starts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tidepool.cache import CacheConfigError
from tidepool.models import model_from_config
from tidepool.plan import PlanOptions
from tidepool.plan.planner import divide
from tidepool.plan.served import reasons, stock_lacks
from tidepool.replay.bound import attention_only
from tidepool.replay.job import Job, Mode


def split(jobs: Iterable[Job]) -> tuple[dict[Mode, int | None], dict[Mode, str]]:
    """What each mode holds, and why others can't run.

    Returns:
        (tokens of the longest request by mode, None where nothing limits it; and a sentence for each other mode).
    """
    held: dict[Mode, int | None] = {}
    refused: dict[Mode, str] = {}
    for job in jobs:
        try:
            if reason := _unserved(job):
                refused[job.mode] = reason
            else:
                held[job.mode] = _tokens(job)
        except CacheConfigError as error:
            refused[job.mode] = str(error)
    return held, refused


def too_small(held: Mapping[Mode, int | None], longest: int) -> dict[Mode, str]:
    """A sentence for each mode that doesn't hold a request of so many tokens, of what `split` says that they hold."""
    return {
        mode: f"It holds requests of at most {tokens:,} tokens, and the longest has {longest:,}: --max-model-len "
        "leaves longer ones out."
        for mode, tokens in held.items()
        if tokens is not None and tokens < longest
    }


def _unserved(job: Job) -> str | None:
    """Why a server wouldn't run like this, as far as an engine without kernels doesn't find out itself."""
    if job.side == "stock":
        return stock_lacks([job.kv_dtype])
    told = reasons(
        gpu=True,
        hybrid=True,
        latent=False,
        formats=[job.kv_dtype],
        prefix_caching=job.prefix_caching,
        drafts=job.draft_tokens > 0,
        own_head=False,
        family=str(job.config["model_type"]),
        tp=job.tp,
        pp=1,
    )
    # A certificate is for the card; a replay shows what there is with one.
    lacking = [reason for reason in told if "certificate" not in reason]
    return f"tidepool falls back to vLLM's own KV cache. {lacking[0]}." if lacking else None


def _tokens(job: Job) -> int | None:
    model = model_from_config(attention_only(job.config) if job.mode == "bound" else job.config)
    options = PlanOptions(
        kv_bytes=job.kv_bytes,
        prefix_caching=job.prefix_caching,
        kv_dtype=job.kv_dtype,
        layer_kv_dtypes=job.layer_kv_dtypes,
        tp=job.tp,
        max_num_seqs=job.max_num_seqs,
        max_num_batched_tokens=job.max_num_batched_tokens,
        speculative_tokens=job.draft_tokens,
    )
    return divide(job.side, model, model.stages(1, options.cache_options()), options, model.max_tokens).tokens_with(1)

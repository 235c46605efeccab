"""How long a request may be: what the model was made for, and what every mode's memory holds."""

from __future__ import annotations

from collections.abc import Iterable

from tidepool.cache import CacheConfigError
from tidepool.models import ModelConfigError, model_from_config
from tidepool.plan import PlanOptions
from tidepool.plan.planner import divide
from tidepool.replay.bound import attention_only
from tidepool.replay.job import Job


def memory_tokens(jobs: Iterable[Job]) -> int | None:
    """Tokens of the longest request that all modes hold; None where nothing limits it.

    A mode that holds no request at all will say so itself. The fixed partition doesn't count: it leaves attention
    little, and says so, too.
    """
    found = [_tokens(job) for job in jobs if job.mode != "fixed"]
    return min((tokens for tokens in found if tokens), default=None)


def _tokens(job: Job) -> int | None:
    try:
        model = model_from_config(attention_only(job.config) if job.mode == "bound" else job.config)
        options = PlanOptions(
            kv_bytes=job.kv_bytes,
            prefix_caching=job.prefix_caching,
            kv_dtype=job.kv_dtype,
            layer_kv_dtypes=job.layer_kv_dtypes,
            tp=job.tp,
            speculative_tokens=job.draft_tokens,
            max_num_seqs=job.max_num_seqs,
            max_num_batched_tokens=job.max_num_batched_tokens,
        )
        stages = model.stages(1, options.cache_options())
        return divide(job.side, model, stages, options, model.max_tokens).tokens_with(1)
    except (CacheConfigError, ModelConfigError):
        return None

"""One step of an engine without a model, and the processor time that the scheduler takes for it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from vllm.v1.engine.core import EngineCore


@dataclass(frozen=True, slots=True)
class Step:
    """What a step did."""

    output: Any
    """vLLM's SchedulerOutput."""
    emitted: list[str]
    """Requests for which it made a token."""
    external_tokens: dict[str, int]
    """Of requests that it scheduled anew, hit tokens that stock vLLM loaded from host memory."""
    scheduler_seconds: float
    """Processor time of `schedule` and `update_from_output` together, and of nothing else."""


def take_step(engine: EngineCore) -> Step:
    """Schedule, execute and update, as ``EngineCore.step`` does."""
    scheduler = engine.scheduler
    began = time.process_time_ns()
    output = scheduler.schedule()
    scheduled = time.process_time_ns()
    external = {new.req_id: _external_tokens(scheduler.requests[new.req_id]) for new in output.scheduled_new_reqs}
    result = engine.model_executor.execute_model(output)
    emitted = [req_id for req_id, tokens in zip(result.req_ids, result.sampled_token_ids, strict=True) if tokens]
    executed = time.process_time_ns()
    scheduler.update_from_output(output, result)
    ended = time.process_time_ns()
    if drafts := engine.model_executor.take_draft_token_ids():
        scheduler.update_draft_token_ids(drafts)
    return Step(output, emitted, external, (scheduled - began + ended - executed) / 1e9)


def _external_tokens(request: Any) -> int:
    return request.prefill_stats.num_external_cached_tokens if request.prefill_stats else 0

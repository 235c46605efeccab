"""vLLM's engine in this process: started as one side, asked, and looked into."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tidepool.sides import Side
from tidepool.vllm_plugin.served import require_served


def start_engine(side: Side, **arguments: Any) -> Any:
    """A vLLM LLMEngine, which the environment has made one of this side.

    Args:
        side: whose memory it uses.
        arguments: of vLLM's EngineArgs.

    Raises:
        NotServedError: its memory is another's.
    """
    from vllm import EngineArgs, LLMEngine

    engine = LLMEngine.from_engine_args(EngineArgs(seed=0, enforce_eager=True, disable_log_stats=True, **arguments))
    require_side(side, core_of(engine))
    return engine


def require_side(side: Side, core: Any) -> None:
    """Refuse an engine core whose memory isn't the side's, as where tidepool falls back to vLLM.

    Raises:
        NotServedError: its memory is another's.
    """
    require_served(side, core.vllm_config, core.scheduler.kv_cache_config)


def core_of(engine: Any) -> Any:
    """The engine core, with scheduler and configuration, behind an LLMEngine in this process."""
    return engine.engine_core.engine_core


def preemptions_of(scheduler: Any) -> dict[str, int]:
    """How often each request under way has been preempted, of those that have been."""
    requests = scheduler.requests.values()
    return {request.request_id: request.num_preemptions for request in requests if request.num_preemptions}


def add_request(engine: Any, name: str, prompt: Sequence[int], output_tokens: int, logprobs: int | None = None) -> None:
    """Queue a request for the likeliest tokens: exactly so many, all told at its end."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    sampling = SamplingParams(
        temperature=0,
        max_tokens=output_tokens,
        ignore_eos=True,
        detokenize=False,
        logprobs=logprobs,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    engine.add_request(name, {"prompt_token_ids": prompt}, sampling)

"""vLLM's engine in this process: started as one side, asked, and looked into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

from tidepool.command_line import UsageError
from tidepool.sides import Side
from tidepool.vllm_plugin.served import require_served


def start_engine(side: Side, options: Sequence[str] = (), **arguments: Any) -> Any:
    """A vLLM LLMEngine, which the environment has made one of this side.

    Args:
        side: whose memory it uses.
        options: of vLLM's command line.
        arguments: of vLLM's EngineArgs; they win.

    Raises:
        NotServedError: its memory is another's.
        UsageError: vLLM has no such options.
    """
    from vllm import LLMEngine

    wanted = {"seed": 0, "enforce_eager": True, "disable_log_stats": True} | arguments
    engine = LLMEngine.from_engine_args(engine_arguments(options, **wanted))
    require_side(side, core_of(engine))
    return engine


def engine_arguments(options: Sequence[str], *, model: str, **arguments: Any) -> Any:
    """vLLM's EngineArgs of a command line, with some set otherwise.

    Raises:
        UsageError: vLLM has no such options.
    """
    from vllm import EngineArgs

    if not options:
        return EngineArgs(model=model, **arguments)
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    def refuse(message: str) -> NoReturn:
        raise UsageError(f"vLLM doesn't take these options: {message}.")

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    parser.error = refuse
    return replace(EngineArgs.from_cli_args(parser.parse_args(["--model", model, *options])), **arguments)


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


def likeliest(logprobs: Sequence[Mapping[int, Any]]) -> list[dict[str, float]]:
    """The log-probabilities of an answer, one entry a token, as `tidepool.running.agreement` wants them."""
    return [{str(token): each.logprob for token, each in likely.items()} for likely in logprobs]


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

"""The command ``tidepool plan``."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from tidepool.cache import STATE_FORMATS, CacheConfigError
from tidepool.command_line import UsageError, cannot_write, fail, parse_choice
from tidepool.gpus import GPUS, Gpu, find_gpu
from tidepool.models import KV_DTYPES, STATE_DTYPES, Model, ModelConfigError, find_model, names
from tidepool.plan.inputs import Card, parse_layer_dtypes, parse_lengths, parse_mix
from tidepool.plan.planner import CapacityPlan, PlanOptions, make_plan
from tidepool.plan.reserve import Step, default_step, reserve as model_reserve
from tidepool.plan.stock import VLLM_VERSIONS
from tidepool.sizes import parse_size, size


@dataclass(frozen=True)
class Given:
    """What the user says of a card's memory; None for what is to be found out."""

    utilization: float
    weight_bytes: int | None
    reserve_bytes: int | None

    def __post_init__(self) -> None:
        if not 0 < self.utilization <= 1:
            raise UsageError(f"gpu-memory-utilization must be above 0 and at most 1, not {self.utilization:g}.")


def plan(
    model: Annotated[
        str | None, typer.Argument(help="A name of the catalogue, a model directory or a config.json.")
    ] = None,
    list_models: Annotated[
        bool, typer.Option("--list", help="List the models of the catalogue, and nothing else.")
    ] = False,
    memory: Annotated[str | None, typer.Option(help="KV memory of one device, like 18GiB.")] = None,
    gpu: Annotated[str | None, typer.Option(help=f"In place of --memory, a GPU: {', '.join(GPUS)}.")] = None,
    gpu_memory_utilization: Annotated[
        float, typer.Option(help="With --gpu: the share of its memory that vLLM may use.")
    ] = 0.92,
    reserve: Annotated[
        str | None,
        typer.Option(help="With --gpu: what vLLM needs beside weights and cache; by default modelled, 0 for nothing."),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="With --gpu: weights on one device; by default counted from the shapes."),
    ] = None,
    kv_cache_dtype: Annotated[
        str, typer.Option(help=f"How attention keeps keys and values: {', '.join(KV_DTYPES)}.")
    ] = "auto",
    layer_kv_dtype: Annotated[
        str | None,
        typer.Option(help="Of single layers: 3=fp8,7-11=tqkv-k4v4,sliding_window=auto; see docs/many-groups.md."),
    ] = None,
    state_dtype: Annotated[str, typer.Option(help=f"How states are kept: {', '.join(STATE_DTYPES)}.")] = "auto",
    checkpoint_states: Annotated[
        str, typer.Option(help=f"How tidepool keeps states that are only cached: {', '.join(STATE_FORMATS)}.")
    ] = STATE_FORMATS[0],
    block_size: Annotated[int, typer.Option(help="Tokens of an attention block; CPU kernels need 32.")] = 16,
    prefix_caching: Annotated[
        bool,
        typer.Option(
            "--prefix-caching/--no-prefix-caching",
            help="Prefix caching, for which a running request may hold one state more; on as in vLLM.",
        ),
    ] = True,
    speculative_tokens: Annotated[int, typer.Option(help="Draft tokens in a step.")] = 0,
    mtp: Annotated[
        bool, typer.Option("--mtp", help="The model's own head drafts them; its layers keep a cache.")
    ] = False,
    tp: Annotated[int, typer.Option(help="Tensor parallel size.")] = 1,
    pp: Annotated[int, typer.Option(help="Pipeline parallel size.")] = 1,
    max_num_seqs: Annotated[
        int | None, typer.Option(help="Requests that may run at once; by default as vLLM has it for the card.")
    ] = None,
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(help="Tokens of a step; by default as vLLM has it for the card.")
    ] = None,
    enforce_eager: Annotated[bool, typer.Option("--enforce-eager", help="No CUDA graphs.")] = False,
    language_model_only: Annotated[
        bool, typer.Option("--language-model-only", help="With --gpu: without the model's vision tower.")
    ] = False,
    max_model_len: Annotated[int | None, typer.Option(help="Longest request; the model's own by default.")] = None,
    context: Annotated[str, typer.Option(help="Request lengths to count, in tokens.")] = "1k,8k,32k,128k",
    mix: Annotated[
        str, typer.Option(help="Requests whose place in memory is shown: how many x how many tokens.")
    ] = "32x2100,2x33k",
    host_memory: Annotated[
        str | None,
        typer.Option(help="Host memory behind tidepool's pools, of all ranks together, like 256GiB."),
    ] = None,
    vllm_version: Annotated[
        str, typer.Option(help=f"The vLLM that stock is, {' or '.join(VLLM_VERSIONS)}; see docs/versions.md.")
    ] = VLLM_VERSIONS[0],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    html: Annotated[Path | None, typer.Option(help="Also write one self-contained page.")] = None,
) -> None:
    """Say what fits on a device, with stock vLLM and with tidepool. Loads nothing."""
    try:
        if list_models:
            typer.echo("\n".join(names()))
            return
        if model is None:
            raise UsageError("Name a model, or list the catalogue with --list.")
        name, source, shapes = find_model(model)
        found = find_gpu(gpu, ", or give --memory") if gpu is not None else None
        default_tokens, default_seqs = default_step(found[1] if found else None)
        step = Step(
            tokens=default_tokens if max_num_batched_tokens is None else max_num_batched_tokens,
            requests=default_seqs if max_num_seqs is None else max_num_seqs,
            eager=enforce_eager,
            vision=not language_model_only,
        )
        given = Given(
            utilization=gpu_memory_utilization,
            weight_bytes=None if weights is None else parse_size(weights),
            reserve_bytes=None if reserve is None else parse_size(reserve, zero=True),
        )
        options = PlanOptions(
            kv_bytes=1,
            block_tokens=block_size,
            prefix_caching=prefix_caching,
            kv_dtype=kv_cache_dtype,
            layer_kv_dtypes=parse_layer_dtypes(layer_kv_dtype),
            state_dtype=state_dtype,
            checkpoint_states=parse_choice("--checkpoint-states", checkpoint_states, STATE_FORMATS),
            tp=tp,
            pp=pp,
            max_num_seqs=step.requests,
            max_num_batched_tokens=step.tokens,
            max_model_len=max_model_len,
            speculative_tokens=speculative_tokens,
            enforce_eager=enforce_eager,
            mtp=mtp,
            contexts=tuple(parse_lengths(context)),
            mix=tuple(parse_mix(mix)),
            vllm_version=vllm_version,
            host_bytes=0 if host_memory is None else parse_size(host_memory),
        )
        shapes.layer_caches(options.cache_options())
        card = None if found is None else _card(shapes, *found, step, given, options)
        made = make_plan(name, source, shapes, replace(options, kv_bytes=_kv_bytes(memory, card)), card)
        if html is not None:
            from tidepool.plan.page import render_page

            html.write_text(render_page(made), encoding="utf-8")
    except (UsageError, ModelConfigError, CacheConfigError) as error:
        fail(str(error), 2)
    except OSError as error:
        fail(cannot_write(error), 2)
    if as_json:
        typer.echo(json.dumps(plan_to_dict(made), indent=2))
        return
    from rich.console import Console

    from tidepool.plan.table import WIDTH, print_plan

    print_plan(made, Console(width=WIDTH if not sys.stdout.isatty() else None))


def plan_to_dict(plan: CapacityPlan) -> dict[str, Any]:
    """The plan as plain numbers, strings, lists and dicts."""
    content = asdict(plan)
    for kind, column in content["columns"].items():
        column["served"] = plan.starts(kind)
    for kind, column in plan.columns.items():
        memory = content["columns"][kind]["memory"]
        memory["unit_bytes"], memory["units"] = column.memory.unit_bytes, column.memory.units
        for group, planned in zip(memory["groups"], column.memory.groups, strict=True):
            group["stride"], group["padding"] = planned.stride, planned.padding
        content["columns"][kind]["account"]["waste"] = column.account.waste
    return content


def _card(model: Model, name: str, gpu: Gpu, step: Step, given: Given, options: PlanOptions) -> Card:
    """What a card leaves to the KV cache of one device, as far as the user hasn't said it."""
    weight_bytes = given.weight_bytes
    if weight_bytes is None:
        weight_bytes = model.weight_bytes(options.tp, options.pp, vision=step.vision, drafts=options.mtp)
    if given.reserve_bytes is not None:
        return Card(name, gpu.total_bytes, given.utilization, weight_bytes, given.reserve_bytes)
    needed = model_reserve(model, gpu, step, options.tp, options.pp, options.speculative_tokens)
    return Card(name, gpu.total_bytes, given.utilization, weight_bytes, needed.total, asdict(needed))


def _kv_bytes(memory: str | None, card: Card | None) -> int:
    if (memory is None) == (card is None):
        raise UsageError("Give the KV memory of one device with --memory, or a card with --gpu, and not both.")
    if card is None:
        return parse_size(memory or "")
    if card.kv_bytes <= 0:
        raise UsageError(
            f"{size(card.weight_bytes)} of weights and {size(card.reserve_bytes)} of reserve leave nothing "
            f"for the KV cache on {size(card.total_bytes)} x {card.utilization:g}: use more devices (--tp, "
            "--pp) or a larger card."
        )
    return card.kv_bytes

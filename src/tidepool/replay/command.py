"""The command ``tidepool replay``."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tidepool.cache import STATE_FORMATS
from tidepool.command_line import NO_VLLM, UsageError, cannot_write, fail, has_vllm, parse_choice
from tidepool.gpus import GPUS, Gpu, find_gpu
from tidepool.models import KV_DTYPES, ModelConfigError
from tidepool.plan import Card, parse_layer_dtypes
from tidepool.plan.reserve import Step, reserve
from tidepool.replay.bound import attention_only
from tidepool.replay.clock import cost_model
from tidepool.replay.fits import split, too_small
from tidepool.replay.generate import MOST_REQUESTS, WORKLOADS
from tidepool.replay.inputs import LINKS, parse_bandwidth, parse_modes, require_folder, require_positive
from tidepool.replay.job import GPU_KERNEL_BLOCK, MODES, Job, Mode
from tidepool.replay.model import ReplayModel, find_replay_model
from tidepool.replay.report import Report, Setting, read_report, versions
from tidepool.replay.trace import TraceError
from tidepool.replay.workload import Workload, leave_out_long, load_workload
from tidepool.running.unpacked import UnpackError, environment_with
from tidepool.sizes import parse_size, size
from tidepool.vllm_plugin.settings import EVICTIONS, QUEUE_ORDERS

if TYPE_CHECKING:
    from rich.console import Console

UTILIZATION = 0.92
"""Share of a card that is used where --memory doesn't say."""
MOST_MEMORY = 8 << 40
"""Bytes of KV memory on one device; more would only fill this machine's own memory with lists of blocks."""


def replay(
    traces: Annotated[
        list[Path] | None,
        typer.Argument(metavar="TRACE", help="Requests to replay; docs/replay.md names the formats."),
    ] = None,
    generate: Annotated[str | None, typer.Option(help=f"Make requests up instead: {', '.join(WORKLOADS)}.")] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Replay nothing: compare what --json wrote of several replays.")
    ] = False,
    model: Annotated[str, typer.Option(help="A name of the catalogue, a model directory or config.json.")] = (
        "Qwen3.5-4B"
    ),
    modes: Annotated[
        str, typer.Option(help="Whose memory to run, of these four; bound is attention without states.")
    ] = ",".join(MODES),
    gpu: Annotated[str, typer.Option(help=f"The GPU whose speed the clock has: {', '.join(GPUS)}.")] = "H100",
    tp: Annotated[int, typer.Option(help="Tensor parallel size: so many of these GPUs.")] = 1,
    memory: Annotated[
        str | None, typer.Option(help="KV memory of one device, like 60GiB; by default what the GPU leaves.")
    ] = None,
    requests: Annotated[int | None, typer.Option(help="How many of the requests to replay; by default all.")] = None,
    rate: Annotated[float, typer.Option(help="How many times as fast requests arrive.")] = 1.0,
    max_num_seqs: Annotated[int, typer.Option(help="Requests that may run at once.")] = 256,
    max_num_batched_tokens: Annotated[int, typer.Option(help="Tokens in a step of the engine at most.")] = 8_192,
    max_model_len: Annotated[
        int | None, typer.Option(help="Tokens of the longest request; by default what the model and the memory allow.")
    ] = None,
    prefix_caching: Annotated[bool, typer.Option("--prefix-caching/--no-prefix-caching")] = True,
    speculative_tokens: Annotated[
        int, typer.Option(help="Tokens drafted in a step for each request, by n-grams: drafting takes no time.")
    ] = 0,
    acceptance: Annotated[
        float | None, typer.Option(help="How likely a draft token is accepted if those before it were; 0 to 1.")
    ] = None,
    eviction: Annotated[
        str, typer.Option(help=f"How tidepool chooses what to evict: {', '.join(EVICTIONS)}.")
    ] = EVICTIONS[0],
    queue: Annotated[
        str, typer.Option(help=f"Who goes first with tidepool of requests that wait: {', '.join(QUEUE_ORDERS)}.")
    ] = QUEUE_ORDERS[0],
    checkpoint_states: Annotated[
        str, typer.Option(help=f"How tidepool keeps states that are only cached: {', '.join(STATE_FORMATS)}.")
    ] = STATE_FORMATS[0],
    block_size: Annotated[int, typer.Option(help="Tokens of an attention block, a multiple of 16.")] = GPU_KERNEL_BLOCK,
    kv_cache_dtype: Annotated[
        str, typer.Option(help=f"How attention keeps keys and values: {', '.join(KV_DTYPES)}.")
    ] = "auto",
    layer_kv_dtype: Annotated[
        str | None, typer.Option(help="How single layers keep tokens: 3=fp8,7-11=528B; see docs/many-groups.md.")
    ] = None,
    host_memory: Annotated[
        str | None, typer.Option(help="Host memory behind the GPU's, like 256GiB; see docs/host-memory.md.")
    ] = None,
    host_bandwidth: Annotated[
        str, typer.Option(help=f"Between the two, each way, like 50GB/s, or {', '.join(LINKS)}.")
    ] = "50GB/s",
    drop_reasoning: Annotated[
        float, typer.Option(help="Share of the answers that later prompts lack, as thinking models' do; 0 to 1.")
    ] = 0.0,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="The model directory or tokenizer.json for traces of text; else words stand for tokens."),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at the first request that can't run; else it is left out.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of --generate, --drop-reasoning and --acceptance.")] = 0,
    vllm: Annotated[
        str | None, typer.Option(help="The version of vLLM, where another is unpacked beside it; see docs/versions.md.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write all figures as JSON.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write one self-contained page.")] = None,
) -> None:
    """Replay a trace through vLLM's scheduler, with a clock in place of the model, and compare kinds of memory."""
    from rich.console import Console

    from tidepool.replay.page import render_page
    from tidepool.replay.parent import run_jobs
    from tidepool.replay.table import WIDTH, print_report

    console = Console(width=WIDTH if not sys.stdout.isatty() else None)
    try:
        for file in (json_file, html):
            require_folder(file)
        if compare:
            _compare(traces or [], console, json_file, html)
            return
        require_positive(
            requests=requests,
            rate=rate,
            tp=tp,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            block_size=block_size,
        )
        if block_size % GPU_KERNEL_BLOCK:
            raise UsageError(f"--block-size must be a multiple of {GPU_KERNEL_BLOCK}, as GPUs' kernels ask for.")
        if len(traces or ()) + (generate is not None) != 1:
            raise TraceError("Name a trace, or a workload with --generate, and not both.")
        if generate is not None and (requests or 0) > MOST_REQUESTS:
            raise UsageError(f"--generate makes at most {MOST_REQUESTS:,} requests.")
        if bool(speculative_tokens) != (acceptance is not None):
            raise UsageError("--speculative-tokens and --acceptance belong together.")
        chosen = parse_modes(modes)
        found = find_replay_model(model)
        card, device = find_gpu(gpu)
        kv_dtype = found.shapes.quantization.kv_dtype or "auto" if kv_cache_dtype == "auto" else kv_cache_dtype
        served = min(max_model_len or found.shapes.max_tokens, found.shapes.max_tokens)
        job = Job(
            mode=chosen[0],
            config=found.config,
            gpu=card,
            kv_bytes=_device_bytes(
                memory, found, card, device, tp, speculative_tokens, max_num_seqs, max_num_batched_tokens
            ),
            trace=None if not traces else str(traces[0]),
            workload=generate,
            requests=requests,
            seed=seed,
            rate=rate,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            eviction=parse_choice("--eviction", eviction, EVICTIONS),
            queue=parse_choice("--queue", queue, QUEUE_ORDERS),
            checkpoint_states=parse_choice("--checkpoint-states", checkpoint_states, STATE_FORMATS),
            block_size=block_size,
            layer_kv_dtypes=parse_layer_dtypes(layer_kv_dtype),
            host_bytes=parse_size(host_memory) if host_memory else 0,
            host_bandwidth=parse_bandwidth(host_bandwidth),
            drop_reasoning=drop_reasoning,
            max_model_len=served,
            tp=tp,
            kv_dtype=kv_dtype,
            prefix_caching=prefix_caching,
            draft_tokens=speculative_tokens,
            acceptance=acceptance or 0.0,
            tokenizer=None if tokenizer is None else str(tokenizer),
        )
        cost_model(found.config, device, job.cache_options())
        if "bound" in chosen:
            attention_only(found.config)
            if job.layer_kv_dtypes:
                raise UsageError("The bound keeps all layers alike: leave it out of --modes, or --layer-kv-dtype away.")
        held, refused = split(replace(job, mode=mode) for mode in chosen)
        workload = _load(job, served, held, strict)
        environ = environment_with(vllm, os.environ) if vllm else os.environ
        if not has_vllm():
            fail(NO_VLLM, 1)
        refused |= too_small(held, workload.longest)
        jobs = [
            replace(job, mode=mode, max_model_len=min(served, tokens or served))
            for mode, tokens in held.items()
            if mode not in refused
        ]
        results, failures = run_jobs(jobs, workload.requests, Console(stderr=True), environ)
    except (UsageError, ModelConfigError, TraceError, UnpackError) as error:
        fail(str(error), 2)
    failures = refused | failures
    if not results:
        for mode, reason in failures.items():
            typer.echo(f"{mode}: {reason}", err=True)
        raise typer.Exit(1)
    setting = Setting.of(
        job,
        model=found.name,
        source=f"{generate}, seed {seed}" if generate else Path(job.trace or "").name,
        command=shlex.join(["tidepool", *sys.argv[1:]]),
        versions=versions(vllm),
    )
    report = Report(setting, results, failures, workload.skipped, workload.notes)
    print_report(report, console)
    _write(json_file, lambda: json.dumps(report.to_dict()) + "\n")
    _write(html, lambda: render_page(report))


def _compare(files: list[Path], console: Console, json_file: Path | None, html: Path | None) -> None:
    from tidepool.replay.comparison import comparison_to_dict, print_comparison, render_comparison

    if not files:
        raise UsageError("Name the files that --json wrote: tidepool replay --compare A.json B.json --html PAGE.html.")
    reports = [read_report(file) for file in files]
    print_comparison(reports, console)
    _write(json_file, lambda: json.dumps(comparison_to_dict(reports)) + "\n")
    _write(html, lambda: render_comparison(reports))


def _write(file: Path | None, content: Callable[[], str]) -> None:
    if file is not None:
        try:
            file.write_text(content(), encoding="utf-8")
        except OSError as error:
            fail(cannot_write(error), 2)


def _load(job: Job, served: int, held: Mapping[Mode, int | None], strict: bool) -> Workload:
    """The requests that can run in all modes but the fixed partition, which leaves attention little."""
    workload = leave_out_long(load_workload(job, strict=strict), served, "that are served", strict=strict)
    tokens = min((tokens for mode, tokens in held.items() if tokens and mode != "fixed"), default=None)
    if tokens is not None:
        workload = leave_out_long(workload, tokens, "that the memory holds", strict=strict)
    return workload


def _device_bytes(
    memory: str | None, found: ReplayModel, name: str, gpu: Gpu, tp: int, drafts: int, seqs: int, tokens: int
) -> int:
    """The KV memory: what the user says, or what a card leaves, as ``tidepool plan`` counts it."""
    if memory:
        given = parse_size(memory)
        if given > MOST_MEMORY:
            raise UsageError(f"--memory is that of one device, and none has {size(given)}.")
        return given
    try:
        needed = reserve(found.shapes, gpu, Step(tokens, seqs), tp, draft_tokens=drafts).total
        left = Card(name, gpu.total_bytes, UTILIZATION, found.shapes.weight_bytes(tp), needed).kv_bytes
    except ModelConfigError as error:
        raise UsageError(f"What {found.name} leaves to the KV cache on {name} isn't known: give --memory.") from error
    if left <= 0:
        raise UsageError(f"The weights of {found.name} leave nothing for the KV cache on {name}: give --memory.")
    return left

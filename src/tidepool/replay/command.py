"""The command ``tidepool replay``."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from tidepool.command_line import UsageError, cannot_write, fail
from tidepool.gpus import GPUS, find_gpu
from tidepool.models import CacheOptions, ModelConfigError, find_model, model_from_config, read_config
from tidepool.models.catalogue import entry
from tidepool.plan import Card, parse_layer_dtypes
from tidepool.replay.architectures import ARCHITECTURES
from tidepool.replay.bound import attention_only
from tidepool.replay.generate import WORKLOADS
from tidepool.replay.job import MODES, Job, Mode
from tidepool.replay.report import Report, Setting
from tidepool.replay.trace import TraceError
from tidepool.replay.workload import load_workload
from tidepool.running.unpacked import UnpackError, environment_with
from tidepool.sizes import parse_size
from tidepool.vllm_plugin.settings import EVICTIONS, Eviction

UTILIZATION, RESERVE = 0.92, 2 << 30
"""Share of a card that is used, and bytes of it for activations and graphs, where --memory doesn't say."""


def replay(
    trace: Annotated[Path | None, typer.Argument(help="Requests to replay, JSON lines; see docs/replay.md.")] = None,
    generate: Annotated[str | None, typer.Option(help=f"Make requests up instead: {', '.join(WORKLOADS)}.")] = None,
    model: Annotated[str, typer.Option(help="A name of the catalogue, a model directory or config.json.")] = (
        "Qwen3.5-4B"
    ),
    modes: Annotated[
        str, typer.Option(help="Whose memory to run, of these four; bound is attention without states.")
    ] = ",".join(MODES),
    gpu: Annotated[str, typer.Option(help=f"The GPU whose speed the clock has: {', '.join(GPUS)}.")] = "H100",
    memory: Annotated[str | None, typer.Option(help="KV memory, like 60GiB; by default what the GPU leaves.")] = None,
    requests: Annotated[int | None, typer.Option(help="How many of the requests to replay; by default all.")] = None,
    rate: Annotated[float, typer.Option(help="How many times as fast requests arrive.")] = 1.0,
    max_num_seqs: Annotated[int, typer.Option(help="Requests that may run at once.")] = 256,
    max_num_batched_tokens: Annotated[int, typer.Option(help="Tokens in a step of the engine at most.")] = 8_192,
    eviction: Annotated[
        str, typer.Option(help=f"How tidepool chooses what to evict: {', '.join(EVICTIONS)}.")
    ] = EVICTIONS[0],
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
    seed: Annotated[int, typer.Option(help="Seed of --generate and --drop-reasoning.")] = 0,
    vllm: Annotated[
        str | None, typer.Option(help="The version of vLLM, where another is unpacked beside it; see docs/versions.md.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write all figures as JSON.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write one self-contained page.")] = None,
) -> None:
    """Replay a trace through vLLM's scheduler, with a clock in place of the model, and compare kinds of memory."""
    from rich.console import Console

    from tidepool.replay.parent import run_jobs
    from tidepool.replay.table import WIDTH, print_report

    try:
        _require_positive(
            requests=requests, rate=rate, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens
        )
        if not 0 <= drop_reasoning <= 1:
            raise UsageError(f"--drop-reasoning must be from 0 to 1, not {drop_reasoning:g}.")
        if (trace is None) == (generate is None):
            raise TraceError("Name a trace, or a workload with --generate, and not both.")
        for file in (json_file, html):
            _require_folder(file)
        chosen = parse_modes(modes)
        found = _find(model)
        card = find_gpu(gpu)[0]
        kv_bytes = parse_size(memory) if memory else _kv_bytes(found, card)
        layer_kv_dtypes = parse_layer_dtypes(layer_kv_dtype)
        model_from_config(found.config).layer_caches(CacheOptions(layer_kv_dtypes=layer_kv_dtypes))
        if "bound" in chosen:
            attention_only(found.config)
            if layer_kv_dtypes:
                raise UsageError("The bound keeps all layers alike: leave it out of --modes, or --layer-kv-dtype away.")
        jobs = [
            Job(
                mode=mode,
                config=found.config,
                gpu=card,
                kv_bytes=kv_bytes,
                trace=None if trace is None else str(trace),
                workload=generate,
                requests=requests,
                seed=seed,
                rate=rate,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                eviction=_parse_eviction(eviction),
                layer_kv_dtypes=layer_kv_dtypes,
                host_bytes=parse_size(host_memory) if host_memory else 0,
                host_bandwidth=parse_bandwidth(host_bandwidth),
                drop_reasoning=drop_reasoning,
            )
            for mode in chosen
        ]
        workload = load_workload(jobs[0])
        environ = environment_with(vllm, os.environ) if vllm else os.environ
        results, failures = run_jobs(jobs, len(workload), Console(stderr=True), environ)
    except (UsageError, ModelConfigError, TraceError, UnpackError) as error:
        fail(str(error), 2)
    if not results:
        for mode, reason in failures.items():
            typer.echo(f"{mode}: {reason}", err=True)
        raise typer.Exit(1)
    setting = Setting(
        model=found.name,
        gpu=card,
        kv_bytes=kv_bytes,
        source=f"{generate}, seed {seed}" if trace is None else trace.name,
        rate=rate,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        eviction=eviction,
        drop_reasoning=drop_reasoning,
        vllm=vllm,
    )
    report = Report(setting, results, failures)
    print_report(report, Console(width=WIDTH if not sys.stdout.isatty() else None))
    try:
        if json_file is not None:
            json_file.write_text(json.dumps(report.to_dict()) + "\n", encoding="utf-8")
        if html is not None:
            from tidepool.replay.page import render_page

            html.write_text(render_page(report), encoding="utf-8")
    except OSError as error:
        fail(cannot_write(error), 2)


LINKS = {"pcie4": 25e9, "pcie5": 50e9, "gh200": 400e9}
"""Bytes a second that copies of large blocks reach in each direction, about: four fifths of the link's peak."""


def parse_bandwidth(text: str) -> float:
    """Bytes a second of ``50GB/s`` or a name of `LINKS`.

    Raises:
        UsageError: it is neither.
    """
    named = LINKS.get(text.strip().lower())
    number, _, second = text.strip().partition("/")
    if named is None and second != "s":
        raise UsageError(f"--host-bandwidth takes {', '.join(LINKS)} or bytes a second like 50GB/s, not {text!r}.")
    return named or float(parse_size(number))


def parse_modes(text: str) -> list[Mode]:
    """Modes of ``stock,elastic``, in the order given.

    Raises:
        UsageError: one of them is unknown or comes twice.
    """
    words = [part.strip() for part in text.split(",")]
    chosen = [mode for word in words for mode in MODES if mode == word]
    if len(chosen) < len(words) or len(set(chosen)) < len(chosen):
        raise UsageError(f"--modes takes some of {', '.join(MODES)}, each once, not {text!r}.")
    return chosen


def _parse_eviction(text: str) -> Eviction:
    for policy in EVICTIONS:
        if policy == text:
            return policy
    raise UsageError(f"--eviction takes {' or '.join(EVICTIONS)}, not {text!r}.")


@dataclass(frozen=True)
class _Found:
    name: str
    config: dict[str, Any]
    weight_bytes: int


def _find(model: str) -> _Found:
    name, _, shapes = find_model(model)
    path = Path(model).expanduser()
    config = read_config(path) if path.exists() else entry(model).config
    if config.get("model_type") not in ARCHITECTURES:
        raise ModelConfigError(
            f"A replay builds vLLM's own class of a model, and knows it for {', '.join(ARCHITECTURES)}, "
            f"not for {config.get('model_type')!r}."
        )
    return _Found(name, config, shapes.weight_bytes())


def _kv_bytes(found: _Found, gpu: str) -> int:
    left = Card(gpu, find_gpu(gpu)[1].total_bytes, UTILIZATION, found.weight_bytes, RESERVE).kv_bytes
    if left <= 0:
        raise UsageError(f"The weights of {found.name} leave nothing for the KV cache on {gpu}: give --memory.")
    return left


def _require_positive(**options: float | None) -> None:
    for name, value in options.items():
        if value is not None and not value > 0:
            raise UsageError(f"--{name.replace('_', '-')} must be above zero, not {value:g}.")


def _require_folder(file: Path | None) -> None:
    if file is not None and not file.parent.is_dir():
        raise UsageError(f"Can't write {file}: there is no such directory.")

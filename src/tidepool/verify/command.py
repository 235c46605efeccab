"""The command ``tidepool verify``."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from tidepool import certificates
from tidepool.cache import STATE_FORMATS, StateFormat
from tidepool.command_line import NO_VLLM, UsageError, cannot_write, fail, has_vllm, parse_choice
from tidepool.running.environment import runs_on_gpu
from tidepool.verify import certify, drive, own_model, report
from tidepool.verify.scenarios import choose_parts

WIDTH = 100
NGRAM_LOOKUP = {"prompt_lookup_max": 4, "prompt_lookup_min": 2}


def verify(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL] [OPTIONS OF VLLM]",
            help="A model of your own to compare with stock vLLM in place of the trained one; options for all engines.",
        ),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write all numbers to this file.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Three scenarios, on stock vLLM and elastic.")] = False,
    workdir: Annotated[Path, typer.Option(help="Where vLLM's logs go.")] = Path(".cache/tidepool"),
    list_them: Annotated[bool, typer.Option("--list", help="Only show the certificates.")] = False,
    ngram: Annotated[int, typer.Option(help="Also with so many drafted tokens from n-grams.", min=0)] = 0,
    mtp: Annotated[int, typer.Option(help="Also with so many drafted tokens from Qwen3.5's own head.", min=0)] = 0,
    tp: Annotated[int, typer.Option(help="Ranks of tensor parallelism.", min=1)] = 1,
    checkpoint_states: Annotated[
        str | None, typer.Option(help=f"Cached states of this format in all scenarios: {', '.join(STATE_FORMATS)}.")
    ] = None,
) -> None:
    """Check the memory on this machine: a trained model must answer right, and as on stock vLLM."""
    if list_them:
        for line in certify.listing():
            typer.echo(line)
        typer.echo(f"Certificates lie in {certificates.folder()}.")
        return
    if not has_vllm():
        fail(NO_VLLM, 1)
    if json_file is not None and not json_file.parent.is_dir():
        fail(f"There is no directory {json_file.parent} to write {json_file.name} to.", 2)
    packing: StateFormat | None = None
    if checkpoint_states is not None:
        try:
            packing = parse_choice("--checkpoint-states", checkpoint_states, STATE_FORMATS)
        except UsageError as error:
            fail(str(error), 2)
    if ngram and mtp:
        fail("--ngram and --mtp exclude each other.", 2)
    console = Console(width=None if os.isatty(1) else WIDTH, highlight=False)
    words = list(arguments or ())
    if words and not words[0].startswith("-"):
        options = [*words[1:], *_vllm_options(ngram, mtp, tp)]
        own_model.verify(words[0], options, workdir / "verify", json_file, console, packing)
        return
    scenarios(
        console,
        [*words, *_vllm_options(ngram, mtp, tp)],
        workdir / "verify",
        quick=quick,
        json_file=json_file,
        checkpoint_states=packing,
    )


CERTIFIED_OPTIONS = frozenset(
    [
        "--attention-backend",
        "--block-size",
        "--dtype",
        "--gdn-prefill-backend",
        "--kv-cache-dtype",
        "--mamba-backend",
        "--mamba-cache-dtype",
        "--mamba-ssm-cache-dtype",
        "--pipeline-parallel-size",
        "-pp",
        "--speculative-config",
        "-sc",
        "--tensor-parallel-size",
        "-tp",
    ]
)
"""Options of vLLM's, each with a value, that a certificate depends on."""


def verify_for(arguments: Sequence[str], workdir: Path = Path(".cache/tidepool")) -> None:
    """Run the scenarios with those of ``vllm serve``'s arguments that a certificate depends on.

    Raises:
        typer.Exit: something doesn't hold.
    """
    words = [word for argument in arguments for word in (argument.split("=", 1) if argument[:1] == "-" else [argument])]
    options: list[str] = []
    for option, value in pairwise(words):
        if option.replace("_", "-") in CERTIFIED_OPTIONS:
            options += [option.replace("_", "-"), value]
    scenarios(Console(width=None if os.isatty(1) else WIDTH, highlight=False), options, workdir / "verify")


def scenarios(
    console: Console,
    options: Sequence[str],
    directory: Path,
    *,
    quick: bool = False,
    json_file: Path | None = None,
    checkpoint_states: StateFormat | None = None,
) -> None:
    """Run the scenarios, print what they show, and write or withdraw certificates.

    Args:
        console: where to print.
        options: of vLLM's, for every engine.
        directory: for logs and models.
        quick: whether to run a few only, which make no certificate.
        json_file: where to write all numbers.
        checkpoint_states: the format of cached states in all scenarios, in place of their own.

    Raises:
        typer.Exit: something doesn't hold.
    """
    drafts, draft_tokens = _drafts(options)
    parts = choose_parts(
        quick=quick,
        gpu=runs_on_gpu(),
        drafts=drafts,
        draft_tokens=draft_tokens,
        ranks=_ranks(options),
        checkpoint_states=checkpoint_states,
    )
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("starting vLLM", total=len(parts))
            done = drive.run(parts, directory, lambda done: bar.update(task, advance=1, description=done), options)
        rows = report.judge(done)
        if json_file is not None:
            json_file.write_text(json.dumps(report.to_json(done, rows), indent=2) + "\n", encoding="utf-8")
        report.print_report(done, rows, console)
        holds = not report.failures(done, rows)
        if done.machine is not None and done.machine.certifies and not (holds and quick):
            for line in certify.certify(rows, holds, shlex.join(["tidepool", "verify", *options])):
                console.print(line, soft_wrap=True)
    except OSError as error:
        fail(cannot_write(error), 1)
    if not holds:
        raise typer.Exit(1)


def _vllm_options(ngram: int, mtp: int, tp: int) -> list[str]:
    """vLLM's options for this command's own."""
    options = ["--tensor-parallel-size", str(tp)] if tp > 1 else []
    if ngram or mtp:
        method = {"method": "ngram", **NGRAM_LOOKUP} if ngram else {"method": "mtp"}
        options += ["--speculative-config", json.dumps(method | {"num_speculative_tokens": ngram or mtp})]
    return options


def _drafts(options: Sequence[str]) -> tuple[str, int]:
    """(method, tokens in a step) of the drafts that vLLM's options ask for, as far as scenarios know of them."""
    configs = [value for option, value in pairwise(options) if option in ("--speculative-config", "-sc")]
    config = json.loads(configs[-1]) if configs else {}
    method = config.get("method", "")
    return (method, config.get("num_speculative_tokens", 1)) if method in ("ngram", "mtp") else ("", 1)


def _ranks(options: Sequence[str]) -> int:
    """Whether there are several ranks, as far as their number says so."""
    sizes = ("--tensor-parallel-size", "-tp", "--pipeline-parallel-size", "-pp")
    named = [value for option, value in pairwise(options) if option in sizes]
    return max([int(value) for value in named if value.isdigit()], default=1)

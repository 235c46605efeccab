"""The commands ``tidepool top``, ``explain`` and ``dashboard``."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from tidepool.command_line import UsageError, fail
from tidepool.observe.dashboard import dashboard as make_dashboard
from tidepool.observe.explain import Evidence, evidence_of, evidence_of_replay, explain as explain_evidence
from tidepool.observe.look import Look, look_at
from tidepool.observe.scrape import scrape
from tidepool.replay.report import read_report

_LOOKS = 10
"""That `explain` takes of a server."""

Url = Annotated[str, typer.Argument(help="Of the server, like http://localhost:8000.")]


def top(
    url: Url,
    once: Annotated[bool, typer.Option("--once", help="Show it once and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, once, instead.")] = False,
    interval: Annotated[float, typer.Option(help="Seconds from one look to the next.")] = 1.0,
) -> None:
    """Watch the memory of a running server: what it holds, hits and misses, and what moves."""
    try:
        if interval <= 0:
            raise UsageError(f"The interval must be above 0 seconds, not {interval:g}.")
        look = look_at(scrape(url))
        if as_json:
            typer.echo(json.dumps(look.to_dict(), indent=2))
            return
        _show(url, look, once, interval)
    except UsageError as error:
        fail(str(error), 1)
    except KeyboardInterrupt:
        return


def _show(url: str, look: Look, once: bool, interval: float) -> None:
    from rich.console import Console
    from rich.live import Live

    from tidepool.observe.view import draw

    console = Console()
    if once:
        console.print(draw(look, width=console.width))
        return
    with Live(draw(look, width=console.width), console=console, screen=True, auto_refresh=False) as live:
        while True:
            seen, before = time.monotonic(), look
            time.sleep(interval)
            look = look_at(scrape(url))
            live.update(draw(look, before, time.monotonic() - seen, width=console.width), refresh=True)


def explain(
    what: Annotated[
        str, typer.Argument(metavar="URL|REPLAY.json", help="A server, or what tidepool replay --json printed.")
    ],
    seconds: Annotated[float, typer.Option(help="How long to look at a server.")] = 5.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of sentences.")] = False,
) -> None:
    """Say what limits a server or a replay, and which one setting would help."""
    try:
        if seconds < 0:
            raise UsageError(f"The time to look must not be below 0 seconds, not {seconds:g}.")
        path = Path(what)
        is_file = path.is_file() or path.suffix == ".json"
        evidence = evidence_of_replay(read_report(path)) if is_file else _watch(what, seconds)
    except UsageError as error:
        fail(str(error), 1)
    found = explain_evidence(evidence)
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2))
        return
    typer.echo("\n".join([f"{evidence.what}:", *found.sentences, found.advice]))


def _watch(url: str, seconds: float) -> Evidence:
    looks = [look_at(scrape(url))]
    while seconds and len(looks) < _LOOKS:
        time.sleep(seconds / (_LOOKS - 1))
        looks.append(look_at(scrape(url)))
    return evidence_of(looks)


def dashboard() -> None:
    """Print a dashboard for Grafana, as JSON for its import page."""
    typer.echo(json.dumps(make_dashboard(), indent=2))

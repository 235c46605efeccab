"""The tables of patches against the vLLM that is installed, and against docs/design.md."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import types
from dataclasses import replace
from typing import Any

import pytest
from patch_table import DOCUMENT, with_tables

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm")

from vllm.version import __version__  # noqa: E402

from tidepool.vllm_plugin import patching, wrappers  # noqa: E402
from tidepool.vllm_plugin.compat import WORKAROUNDS  # noqa: E402
from tidepool.vllm_plugin.patches import PATCHES  # noqa: E402
from tidepool.vllm_plugin.patching import Patch, PatchError  # noqa: E402
from tidepool.vllm_plugin.versions import SERIES, SUPPORTED_VLLM, series_here  # noqa: E402

TABLES = (*PATCHES, *WORKAROUNDS)


def test_the_installed_vllm_is_supported() -> None:
    """Otherwise the tests below would have nothing to look at."""
    assert __version__ in SUPPORTED_VLLM
    assert any(series_here() in patch.series for patch in TABLES)


@pytest.mark.parametrize(
    "patch", [each for each in TABLES if series_here() in each.series], ids=lambda each: each.target
)
def test_a_target_is_what_its_row_says(patch: Patch) -> None:
    """On every platform: vLLM's modules can be imported on any."""
    patch.check()


def test_rows_are_complete_and_used() -> None:
    for series in SERIES:
        targets = [patch.target for patch in TABLES if series in patch.series]
        assert len(targets) == len(set(targets)), f"two rows for one name of vLLM {series}"
        assert targets
    assert all(patch.does and patch.why and patch.until for patch in TABLES)
    made = {
        name
        for name, each in vars(wrappers).items()
        if inspect.isfunction(each) and each.__module__ == wrappers.__name__
    }
    assert made == {patch.wrapper.__name__ for patch in PATCHES}


def test_the_document_shows_the_tables() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert text == with_tables(text), "write them there: python tests/vllm_plugin/patch_table.py"


def test_vllm_is_patched_once() -> None:
    from tidepool.vllm_plugin import patches, register

    register()
    assert patches.is_installed()
    found = [patch.find()[2] for patch in patching.needed_here(TABLES)]
    register()
    assert [patch.find()[2] for patch in patching.needed_here(TABLES)] == found
    for each in found:
        original = inspect.unwrap(each)
        assert not original.__module__.startswith("tidepool"), "vLLM's own, whoever has wrapped it"


# How a name is replaced ---------------------------------------------------------------------------------------


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module to patch."""

    class Base:
        @classmethod
        def name(cls, suffix: str) -> str:
            return cls.__name__ + suffix

        def double(self, number: int) -> int:
            return 2 * number

    class Child(Base):
        pass

    def greet(word: str, *, loud: bool = False) -> str:
        return word.upper() if loud else word

    module = types.ModuleType("fake_vllm")
    vars(module).update(Base=Base, Child=Child, greet=greet)
    user = types.ModuleType("fake_user")
    user.greet = greet  # type: ignore[attr-defined]
    for each in (module, user):
        monkeypatch.setitem(sys.modules, each.__name__, each)
    return module


def surrounded(original: Any, *args: Any, **kwargs: Any) -> list[Any]:
    return [original(*args, **kwargs)]


def row(target: str, parameters: str, **more: Any) -> Patch:
    return Patch(f"fake_vllm:{target}", surrounded, parameters, "", "", "", **more)


def test_functions_methods_and_classes(fake: Any) -> None:
    greet = row("greet", "word, *, loud=", bound_in=("fake_user", "fake_absent"))
    rows = [greet, row("Base.name", "cls, suffix"), row("Child.double", "self, number"), row("Child", "")]
    assert not any(each.applied for each in rows)
    patching.apply(rows[:3])
    child = fake.Child()
    assert (fake.greet("a", loud=True), sys.modules["fake_user"].greet("b")) == (["A"], ["b"])
    assert fake.Child.name("!") == ["Child!"]
    assert (child.double(2), fake.Base().double(2)) == ([4], 4), "a subclass is patched by itself"
    patching.apply(rows[3:])
    (made,) = fake.Child()
    assert made.double(3) == [6]
    before = fake.greet
    patching.apply([greet])
    assert fake.greet is before


def test_what_is_inherited_from_a_patched_class_is_patched_once(fake: Any) -> None:
    patching.apply([row("Base.double", "self, number"), row("Child.double", "self, number")])
    assert fake.Child().double(2) == [4]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (row("Base.halve", "self"), "This vLLM has no Base.halve (fake_vllm), which tidepool replaces"),
        (
            row("greet", "word, loud="),
            "greet of this vLLM takes (word, *, loud=), and tidepool was written for (word, loud=)",
        ),
        (
            replace(row("greet", ""), target="fake_absent:greet"),
            "This vLLM has no greet (fake_absent), which tidepool replaces",
        ),
    ],
)
def test_all_rows_or_none(fake: Any, wrong: Patch, words: str) -> None:
    right = row("Base.double", "self, number")
    with pytest.raises(PatchError) as caught:
        patching.apply([right, wrong])
    assert str(caught.value) == words
    assert not right.applied


def test_rows_are_chosen_by_version_and_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row("greet", "", series=("0.32", "0.33")), row("greet", "", series=("0.34",), device="cuda")]
    for version, device, chosen in [
        ("0.33.1", "cpu", rows[:1]),
        ("0.34.0", "cuda", rows[1:]),
        ("0.34.0", "cpu", []),
        ("0.3", "cuda", []),
    ]:
        monkeypatch.setattr("vllm.version.__version__", version)
        monkeypatch.setattr(patching, "_is_on", lambda asked, device=device: asked == device)
        assert patching.needed_here(rows) == tuple(chosen)


CHANGED = """
import logging, sys
from vllm.v1.core.sched.scheduler import Scheduler
{change}
log = []
logging.getLogger("vllm.tidepool").addFilter(lambda record: log.append(record.getMessage()))
from tidepool.vllm_plugin import register, served
register()
from tidepool.vllm_plugin import patches
rows = patches.needed_here((*patches.PATCHES, *patches.WORKAROUNDS))
assert not any(row.applied for row in rows if "_aligned_split" not in row.name)
assert served._not_loaded() in log[0]
print("LOG", *log)
"""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            "del Scheduler._mamba_block_aligned_split",
            "This vLLM has no Scheduler._mamba_block_aligned_split (vllm.v1.core.sched.scheduler), which tidepool "
            "replaces.",
        ),
        (
            "Scheduler._mamba_block_aligned_split = lambda self, request: 0",
            "Scheduler._mamba_block_aligned_split of this vLLM takes (self, request), and tidepool was written for "
            "(self, request, num_new_tokens, num_new_local_computed_tokens=, num_external_computed_tokens=).",
        ),
    ],
)
def test_a_changed_vllm_is_left_alone(change: str, words: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", CHANGED.format(change=change)],
        env=os.environ | {"VLLM_PLUGINS": "tidepool_early"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    (line,) = (line for line in run.stdout.splitlines() if line.startswith("LOG"))
    assert line == f"LOG tidepool falls back to vLLM's own KV cache. patches: {words}"

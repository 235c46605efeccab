"""bench/gpu_check.py: how it computes the figures of the part "speed", from times made by hand."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "bench" / "gpu_check.py"


@pytest.fixture(scope="module")
def gpu_check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module
    spec.loader.exec_module(module)
    return module


def test_figures_of_two_requests(gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "FEWEST_STEPS", 1)
    watch = gpu_check.Watch(100.0)
    watch.step(100.125, {"stale": 1}, {})  # of the load before
    watch.step(101.0, {"a": 7, "b": 3}, {"a": 1})  # the prompt of b isn't read yet
    watch.step(103.0, {"a": 1, "b": 4}, {"a": 1, "b": 1})
    watch.step(103.25, {"a": 1, "b": 1}, {"a": 1, "b": 1})
    watch.step(104.0, {"b": 1}, {"b": 1})
    assert watch.figures() == {
        "seconds": 4.0,
        "tokens": 6,
        "tokens_per_second": 1.5,
        "itl_ms": 500.0,  # the middle of 2,000 and 250 of a, 250 and 750 of b
        "ttft_ms": 2000.0,  # the middle of 1,000 and 3,000
        "mean_ttft_ms": 2000.0,
        "decode_step_ms": 500.0,  # the middle of 250 and 750
        "peak": 2,
        "mean_running": 1.6,
    }


def test_few_decode_steps_are_no_figure(gpu_check: ModuleType) -> None:
    watch = gpu_check.Watch(0.0)
    for now in range(1, 21):
        watch.step(float(now), {"a": 1}, {"a": 1})
    assert watch.figures()["decode_step_ms"] is None
    watch.step(21.0, {"a": 1}, {"a": 1})
    assert watch.figures()["decode_step_ms"] == 1000.0


def test_ratios_are_those_of_one_round(gpu_check: ModuleType) -> None:
    stock = [{"x": 1.0}, {"x": 2.0}, {"x": 10.0}]
    assert gpu_check.middle([{"x": 2.0}, {"x": 2.0}, {"x": 30.0}], stock, "x") == (2.0, 2.0)
    assert gpu_check.middle([{"x": 3.0}], stock, "x") == (3.0, 3.0)
    assert gpu_check.middle([{"x": None}], stock, "x") == (None, None)
    assert gpu_check.middle([{"x": None}, {"x": 4.0}], stock, "x") == (4.0, 2.0)
    assert gpu_check.middle(stock, (), "x") == (2.0, None)


class FakeSide:
    """Runs nothing; notes whose turn it was. One that breaks gives figures ``good`` times."""

    def __init__(self, side: str, turns: list[str], good: int = 99) -> None:
        self.side, self.turns, self.good = side, turns, good

    def run(self, load: Any) -> dict[str, Any] | None:
        self.turns.append(f"{load.name} {self.side}")
        self.good -= 1
        return {"turn": len(self.turns)} if self.good >= 0 else None


def test_sides_take_turns_in_alternating_order(gpu_check: ModuleType) -> None:
    turns: list[str] = []
    sides = [FakeSide("stock", turns), FakeSide("elastic", turns, good=2)]
    figures = gpu_check.take_turns(sides, gpu_check.loads("single"), 2, None)
    assert [turn.split()[1] for turn in turns] == ["elastic", "stock", "stock", "elastic", "elastic", "stock"]
    assert figures == {"single": {"stock": [{"turn": 3}, {"turn": 6}], "elastic": [{"turn": 4}]}}


@pytest.mark.parametrize(("seconds", "kept"), [(0.0, 1), (1e9, 5), (None, 5)])
def test_no_round_begins_after_the_time_but_one_is_kept(
    gpu_check: ModuleType, seconds: float | None, kept: int
) -> None:
    figures = gpu_check.take_turns([FakeSide("stock", [])], gpu_check.loads("mixed"), 5, seconds)
    assert len(figures["mixed"]["stock"]) == kept


def test_loads_are_chosen_by_how_their_names_begin(gpu_check: ModuleType) -> None:
    def names(text: str) -> list[str]:
        return [load.name for load in gpu_check.loads(text)]

    assert names("mixed,single") == ["single", "mixed"]
    assert names("decode") == ["decode-64", "decode-8k"]
    with pytest.raises(argparse.ArgumentTypeError, match="no load is named 'slow'"):
        names("mixed,slow")


def test_figures_without_a_value_leave_their_columns_empty(
    gpu_check: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    def round_of(seconds: float, step: float | None) -> dict[str, Any]:
        figures = {key: 100 * seconds for key, _, _ in gpu_check.COLUMNS}
        return figures | {"decode_step_ms": step, "peak": 7, "preemptions": 0}

    rounds = {"single": {"stock": [round_of(2, None)], "elastic": [round_of(1, 5.0)]}}
    made = {"model": "M", "memory": 1 << 30, "mode": "eager", "backend": "auto", "rounds": rounds}
    gpu_check.print_speed(
        made | {"engines": {"stock": {"async": True}, "fixed": None}, "failed": {"fixed": "too small"}}
    )
    text = capsys.readouterr().out
    assert "fixed: too small" in text
    stock, elastic = (line.split() for line in text.splitlines() if line.startswith("single"))
    assert stock == ["single", "stock", "1", "7", "0", *["200", "1.000"], *["200.00", "1.000"], *["200.0", "1.000"] * 2]
    assert elastic[5:] == ["100", "0.500", "100.00", "0.500", *["100.0", "0.500"] * 2, "5.00"]

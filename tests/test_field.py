"""bench/field.py: what its table says, without measuring anything."""

from __future__ import annotations

import importlib.util
import io
import sys
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture(scope="module")
def field() -> ModuleType:
    spec = importlib.util.spec_from_file_location("field", BENCH / "field.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["field"] = module
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        spec.loader.exec_module(module)
    return module


def test_every_case_has_a_name_of_its_own(field: ModuleType) -> None:
    names = [case.name for case in field.CASES]
    assert len(names) == len(set(names))
    assert all(case.checks for case in field.CASES)


def test_a_row_holds_or_not(field: ModuleType) -> None:
    checks = (field.Check("ttft", "TTFT", field.not_above), field.Check("hits", "hits", field.not_below))
    cases = [field.Case("worse", dict, checks), field.Case("broken", dict, checks)]
    figures = {("worse", "stock"): {"ttft": 10, "hits": 5}, ("worse", "elastic"): {"ttft": 11, "hits": 5}}
    rows = field.rows_of(cases, figures, {"broken": "elastic: NotServedError: tidepool falls back."})
    assert [(row["case"], row["holds"]) for row in rows] == [("worse", False), ("worse", True), ("broken", False)]
    text = io.StringIO()
    field.print_rows(rows, Console(file=text, width=120))
    assert "1 of 3 rows hold." in text.getvalue()
    assert "falls back" in text.getvalue()


@pytest.mark.parametrize(
    ("bound", "stock", "good", "bad"),
    [
        (("not_above",), 5, 5, 6),
        (("not_below",), 5, 5, 4),
        (("within_steps", 2), 5, 7, 8),
        (("at_least", 4), 9, 4, 3),
        (("at_most", 4), 1, 4, 5),
        (("near_all",), 9, 1.05, 0.5),
    ],
)
def test_bounds(field: ModuleType, bound: tuple[str, *tuple[int, ...]], stock: float, good: float, bad: float) -> None:
    holds = getattr(field, bound[0])
    if len(bound) > 1:
        holds = holds(*bound[1:])
    assert holds(stock, good)
    assert not holds(stock, bad)

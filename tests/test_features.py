"""docs/supported.md is true: the tests that it names exist, and every gate has a row with its own sentence."""

from __future__ import annotations

import subprocess
import sys

import pytest

from features import BY_CERTIFICATE, DOCUMENT, LEFT_TO_VLLM, README, ROOT, SERVED, document, with_summary
from tidepool.vllm_plugin.gates import GATES


def test_the_documents_are_as_the_tables() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == document()
    text = README.read_text(encoding="utf-8")
    assert with_summary(text) == text


def test_every_gate_has_a_row() -> None:
    assert sorted(row.gate for row in LEFT_TO_VLLM) == sorted(gate.name for gate in GATES)


def test_whatever_is_served_names_its_tests() -> None:
    rows = (*SERVED, *BY_CERTIFICATE)
    assert all(row.tests for row in rows)
    assert len({row.name for row in (*rows, *LEFT_TO_VLLM)}) == len(rows) + len(LEFT_TO_VLLM)


@pytest.mark.vllm
def test_every_test_that_is_named_exists() -> None:
    pytest.importorskip("vllm")
    named = sorted({test for row in (*SERVED, *BY_CERTIFICATE) for test in row.tests})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *named]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-2000:]

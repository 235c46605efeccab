"""Lets the processes that a test starts run some code before their own module."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


def run_first(monkeypatch: pytest.MonkeyPatch, folder: Path, code: str) -> None:
    """Whoever starts ``sys.executable -m MODULE`` runs ``code`` first, and the module if that doesn't end it."""
    script = folder / "python"
    script.write_text(
        f"#!{sys.executable}\nimport os, runpy, sys\nsys.argv[:] = sys.argv[2:]\nmodule = sys.argv[0]\n{code}\n"
        "runpy.run_module(module, run_name='__main__', alter_sys=True)\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))

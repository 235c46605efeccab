"""Which tests are left out where they would take hours."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

RUN_ALL = "TIDEPOOL_ALL_TESTS"


def _has_fast_bfloat16() -> bool:
    """Whether vLLM's kernels for bfloat16 take this processor; without AVX-512 its models are some ten times slower."""
    flags = Path("/proc/cpuinfo")
    return not flags.exists() or " avx2" not in (text := flags.read_text(encoding="utf-8")) or " avx512f" in text


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    if os.environ.get(RUN_ALL) or _has_fast_bfloat16():
        return
    skip = pytest.mark.skip(reason=f"takes too long on a processor without AVX-512; {RUN_ALL}=1 runs it")
    for item in items:
        if item.get_closest_marker("heavy"):
            item.add_marker(skip)

"""Which tests are left out where they would take hours."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest

from quick_kernels import is_slow

RUN_ALL = "TIDEPOOL_ALL_TESTS"


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    if os.environ.get(RUN_ALL) or not is_slow():
        return
    skip = pytest.mark.skip(reason=f"takes too long on a processor without AVX-512; {RUN_ALL}=1 runs it")
    for item in items:
        if item.get_closest_marker("heavy"):
            item.add_marker(skip)

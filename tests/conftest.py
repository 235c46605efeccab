"""Which tests are left out where they would take hours, and what goes for all."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, settings

from quick_kernels import is_slow

RUN_ALL = "TIDEPOOL_ALL_TESTS"

# How long an example takes says something about the machine and what else runs there.
settings.register_profile("tidepool", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tidepool")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--vllm", help="The version of vLLM that these tests must find; see `make test-0.33`.")


def pytest_configure(config: pytest.Config) -> None:
    if (wanted := config.getoption("--vllm")) is None:
        return
    from vllm.version import __version__

    if __version__ != wanted:
        raise pytest.UsageError(f"These tests are for vLLM {wanted}, and Python finds {__version__}.")


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    if os.environ.get(RUN_ALL) or not is_slow():
        return
    skip = pytest.mark.skip(reason=f"takes too long on a processor without AVX-512; {RUN_ALL}=1 runs it")
    for item in items:
        if item.get_closest_marker("heavy"):
            item.add_marker(skip)

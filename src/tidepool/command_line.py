"""How every command of tidepool says that it can't go on."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import NoReturn

NO_VLLM = (
    "vLLM isn't installed here: install tidepool with its extra cpu or cuda, as in pip install '.[cpu]' in a clone."
)


class UsageError(ValueError):
    """An option or a question that can't be answered; the message is one sentence for the user."""


def has_vllm() -> bool:
    """Whether vLLM can be imported, without importing it."""
    return find_spec("vllm") is not None


def fail(message: str, code: int) -> NoReturn:
    """End the process with a sentence on standard error: code 2 for what the user typed, 1 for all else."""
    print(message, file=sys.stderr)
    raise SystemExit(code)


def cannot_write(error: OSError) -> str:
    """What to tell of a file that can't be written."""
    return f"Can't write {error.filename}: {error.strerror}."

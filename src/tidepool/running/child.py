"""A process that runs vLLM, as it sees itself: it reads JSON lines from standard input and answers with others."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tidepool.vllm_plugin.served import NotServedError

ALIVE = {"alive": True}
"""Answered after each step of an engine, so that a slow machine isn't taken for one that hangs."""
_MOST_LETTERS = 300
"""Of an error."""

Answer = Callable[[Mapping[str, Any]], None]


def run(work: Callable[[Iterator[dict[str, Any]], Answer], None]) -> None:
    """Do this process's work; where it raises an error, that is the last answer.

    Args:
        work: given the messages that come, until standard input ends, and what answers them.
    """
    # vLLM and its libraries print to standard output; the answers get a descriptor of their own.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

    def answer(content: Mapping[str, Any]) -> None:
        print(json.dumps(content), file=answers, flush=True)

    try:
        work(map(json.loads, sys.stdin), answer)
    except Exception as error:
        traceback.print_exc()
        kind = "" if isinstance(error, NotServedError) else f"{type(error).__name__}: "
        words = " ".join(f"{kind}{error}".split()).rstrip(".")
        answer({"error": words if len(words) <= _MOST_LETTERS else words[:_MOST_LETTERS] + "..."})
        sys.exit(1)

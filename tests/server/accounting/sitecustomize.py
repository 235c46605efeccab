"""In every process of a server: whenever the engine takes samples, writes down the arena's own account.

Python runs this when it starts, because the test names this folder. Each line is what the memory holds, found block by
block; see account.py.
"""

from __future__ import annotations

import gc
import json
import os
from functools import cache
from typing import Any

from account import account

from tidepool.metrics import Collector

_take = Collector.take


def take(collector: Collector) -> Any:
    """As it was; the account is written first."""
    arena = collector.engine.arena
    memory = [[*key, count] for key, count in account(_pool_over(arena)).items()]
    line = {"allocated": arena.bytes_allocated, "memory": memory, "moves": arena.moves}
    with open(os.environ["ACCOUNT"], "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    return _take(collector)


@cache
def _pool_over(arena: Any) -> Any:
    """vLLM's side of it, which the collector has no need of."""
    return next(
        each
        for each in gc.get_objects()
        if type(each).__name__ == "ArenaBlockPool" and getattr(each, "arena", None) is arena
    )


Collector.take = take  # type: ignore[method-assign]

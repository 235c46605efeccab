"""In every process of a server: whenever the engine takes samples, writes down the arena's own account.

Python runs this when it starts, because the test names this folder. Each line is what the memory holds, found block by
block; see account.py.
"""

from __future__ import annotations

import json
import os
from typing import Any

from account import account
from tidepool.metrics import Collector

_take = Collector.take


def take(collector: Collector) -> Any:
    """As it was; the account is written first."""
    arena = collector.engine.arena
    pool: Any = getattr(arena._on_evict, "__self__")  # noqa: B009  # vLLM's side of the memory
    memory = [[*key, count] for key, count in account(pool).items()]
    line = {"allocated": arena.bytes_allocated, "memory": memory, "moves": arena.moves}
    with open(os.environ["ACCOUNT"], "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    return _take(collector)


Collector.take = take  # type: ignore[method-assign, assignment]

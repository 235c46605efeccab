"""What engines allocate on several budgets, written to the file that the job names; run by test_engine.py."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from typing import Any

from tidepool.cache import OutOfBlocksError
from tidepool.replay.engine import EngineShape, make_engine


def fill(engine: Any) -> list[int]:
    """By group of packed states, how many of them the engine's memory takes before it refuses one."""
    memory = engine.scheduler.kv_cache_manager.block_pool
    counts = []
    for group in range(len(memory.pools), memory.groups):
        count = 0
        with suppress(OutOfBlocksError):
            while memory.get_new_blocks(group, 1):
                count += 1
        counts.append(count)
    return counts


def main() -> None:
    work = json.load(sys.stdin)
    reports = []
    for job in work["jobs"]:
        engine = make_engine(EngineShape(**job))
        config = engine.scheduler.kv_cache_config
        pools = engine.scheduler.kv_cache_manager.block_pool.arena.pools
        usable = []
        for pool in pools:
            extents = config.num_blocks - 1 if config.geometry else len(pool.extents)
            usable.append(extents * pool.blocks_per_extent)
        reports.append(
            {
                "extents": config.num_blocks,
                "blocks": usable,
                "arena_bytes": config.arena_bytes,
                "cached_states": fill(engine),
            }
        )
        engine.shutdown()
    with open(work["answer"], "w", encoding="utf-8") as file:
        json.dump(reports, file)


main()

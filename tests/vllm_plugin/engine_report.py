"""Prints what engines allocate on several budgets; run by test_engine.py."""

from __future__ import annotations

import json
import sys
from typing import Any

from tidepool.replay.engine import EngineShape, make_engine


def main() -> None:
    jobs: list[dict[str, Any]] = json.load(sys.stdin)
    reports = []
    for job in jobs:
        engine = make_engine(EngineShape(**job))
        config = engine.scheduler.kv_cache_config
        pools = engine.scheduler.kv_cache_manager.block_pool.arena.pools
        usable = []
        for pool in pools:
            extents = config.num_blocks - 1 if config.geometry else len(pool.extents)
            usable.append(extents * pool.slots)
        reports.append({"extents": config.num_blocks, "blocks": usable, "arena_bytes": config.arena_bytes})
        engine.shutdown()
    print("REPORT " + json.dumps(reports))


main()

"""Prints the whole KVCacheConfig that an engine core plans for a model; run by test_untouched.py."""

from __future__ import annotations

import json
import sys
from typing import Any

from tidepool.replay.engine import EngineShape, make_engine


def main() -> None:
    shapes: dict[str, Any] = json.load(sys.stdin)
    described = {}
    for name, (hf_config, side, caching) in shapes.items():
        shape = EngineShape(hf_config, 1 << 30, side, max_num_seqs=16, max_model_len=4096, prefix_caching=caching)
        engine = make_engine(shape)
        config = engine.scheduler.kv_cache_config
        described[name] = [type(config).__name__, repr(config), type(engine.scheduler.kv_cache_manager).__name__]
        engine.shutdown()
    print("CONFIGS " + json.dumps(described))


main()

"""What tidepool notes in vLLM's configuration survives whatever vLLM does with configurations."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest

from tidepool.testing.tiny import make_checkpoint

pytestmark = pytest.mark.vllm


def test_notes_travel_with_copies_and_to_other_processes(tmp_path: Path) -> None:
    from vllm.config.utils import replace
    from vllm.engine.arg_utils import EngineArgs

    from tidepool.vllm_plugin.notes import read_note
    from tidepool.vllm_plugin.serving_plan import (
        ServingPlan,
        StockBlocks,
        fall_back,
        fallback_reason,
        note_plan,
        plan_of,
    )
    from tidepool.vllm_plugin.settings import Settings

    plan = ServingPlan("fixed", "returns", StockBlocks(640, None), 512, (3, 4), ((1, 20), (21, 5)))
    given = {"tidepool": {"partition": "fixed"}}
    config = EngineArgs(model=str(make_checkpoint("qwen3.5", tmp_path)), additional_config=given).create_engine_config()
    hashed = config.compute_hash()
    note_plan(config, plan)
    fall_back(config, Settings(), "device: not here")
    for copied in (replace(config), pickle.loads(pickle.dumps(config))):
        read = plan_of(copied)
        assert read == plan
        assert isinstance(read.stock, StockBlocks)
        assert fallback_reason(copied) == "device: not here"
    assert given == {"tidepool": {"partition": "fixed"}}, "the user's own table"
    # vLLM copies parts of a configuration too, field by field: a field of ours would break it.
    replace(config.cache_config, cache_dtype="auto")
    assert config.compute_hash() != hashed
    assert read_note(config, "something else") is None


def test_a_table_of_somebody_elses_is_left_alone() -> None:
    from tidepool.vllm_plugin.gates import GATES
    from tidepool.vllm_plugin.notes import read_note, write_note

    config = SimpleNamespace(additional_config=SimpleNamespace(compute_hash=lambda: "a"))
    write_note(config, "plan", 1)
    assert read_note(config, "plan") is None
    (gate,) = (gate for gate in GATES if gate.name == "additional-config")
    assert gate.in_use(config)
    assert not gate.in_use(SimpleNamespace(additional_config={}))

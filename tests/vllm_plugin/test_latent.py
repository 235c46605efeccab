"""Latent attention beside states: planning, geometry and scheduling of Kimi Linear, by its specs.

vLLM has no kernels for it on a CPU, so the engine core runs with the model left out, its layers in the place of
another model's. The gate stays closed until a real run has been.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from tidepool.cache import State
from tidepool.models import CacheOptions, entry
from tidepool.plan.planner import PlanOptions, divide

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm")
MEMORY, MAX_LEN = 3 << 29, 8_192
STATES, LATENT = 20, 7
"""Layers of each kind."""
TOKEN = (512 + 64) * 2
"""Bytes that a layer keeps of a token: the latent and the rotary part in bfloat16."""
PAGE = 3 * 3 * 32 * 128 * 2 + 32 * 128 * 128 * 4
"""Bytes of a state: three columns of queries, keys and values, and a matrix for each head in float32."""

STOCK_TOKENS = 1_888
"""The fewest blocks of 16 tokens that are as large as a state."""


def of_kimi_linear(specs: dict[str, Any]) -> dict[str, Any]:
    """Kimi Linear's layers, where these specs are of another model with states."""
    import torch
    from vllm.v1.kv_cache_interface import MambaSpec, MLAAttentionSpec

    state = next(spec for spec in specs.values() if isinstance(spec, MambaSpec))
    attention = next(spec for spec in specs.values() if not isinstance(spec, MambaSpec))
    delta = replace(
        state, shapes=((3, 3 * 32 * 128), (32, 128, 128)), dtypes=(torch.bfloat16, torch.float32), page_size_padded=None
    )
    latent = MLAAttentionSpec(block_size=attention.block_size, num_kv_heads=1, head_size=576, dtype=torch.bfloat16)
    layers = {f"states.{index}": delta for index in range(STATES)}
    return layers | {f"latent.{index}": latent for index in range(LATENT)}


@pytest.fixture(scope="module", params=["elastic", "fixed"])
def engine(request: pytest.FixtureRequest) -> Iterator[Any]:
    from tidepool.replay.engine import EngineShape, make_checked_engine
    from tidepool.vllm_plugin.serving_plan import StockBlocks

    shape = EngineShape(
        entry("Qwen3.5-4B").config,
        MEMORY,
        request.param,
        max_num_seqs=8,
        max_model_len=MAX_LEN,
        change_specs=of_kimi_linear,
    )
    with pytest.MonkeyPatch.context() as patch:
        # What stock vLLM would set for these layers, not for those of the model that they replace.
        stock = StockBlocks(STOCK_TOKENS, STOCK_TOKENS * TOKEN)
        patch.setattr("tidepool.vllm_plugin.deciding._stock_blocks", lambda *_: stock)
        yield make_checked_engine(shape)


def test_what_plan_predicts_is_allocated_to_the_block(engine: Any) -> None:
    config = engine.scheduler.kv_cache_config
    assert config.block_bytes == (STATES * PAGE, LATENT * TOKEN * 16)
    model = entry("Kimi-Linear-48B-A3B").model()
    kinds = [isinstance(cache, State) for cache in model.layer_caches(CacheOptions()).values()]
    assert (sum(kinds), len(kinds)) == (STATES, STATES + LATENT)
    options = PlanOptions(MEMORY, prefix_caching=True, max_num_seqs=8, max_model_len=MAX_LEN)
    memory = divide(config.partition, model, model.stages(1, options.cache_options()), options, MAX_LEN)
    planned = {group.label: group for group in memory.groups}
    assert config.block_bytes == (planned["state"].natural_bytes, planned["attention"].natural_bytes)
    parts = config.geometry.layouts if config.geometry else config.shares
    counts = [(config.num_blocks - 1) * part.blocks_per_extent if config.geometry else part.blocks for part in parts]
    assert counts == [planned["state"].blocks, planned["attention"].blocks]


def test_prompts_hit_and_are_evicted(engine: Any) -> None:
    from tidepool.replay.engine import add_request
    from tidepool.replay.step import take_step

    rng = random.Random(1)
    prompts = [[rng.randrange(5, 30_000) for _ in range(3_000)] for _ in range(30)]
    hits: dict[str, int] = {}

    def ask(name: str, prompt: list[int]) -> None:
        add_request(engine, name, prompt, 4)
        while engine.scheduler.has_unfinished_requests():
            new = take_step(engine).output.scheduled_new_reqs
            hits.update({request.req_id: request.num_computed_tokens for request in new})

    for name in ("first", "again"):
        ask(name, prompts[0])
    for turn in ("once", "twice"):
        for number, prompt in enumerate(prompts[1:]):
            ask(f"{number}, {turn}", prompt)
    assert (hits["first"], hits["again"]) == (0, 2_560), "the last multiple of the checkpoint spacing"
    assert 0 in {hit for name, hit in hits.items() if name.endswith("twice")}, "nothing was evicted"
    assert engine.scheduler.kv_cache_manager.block_pool.arena.usage().in_use == 0, "blocks leaked"

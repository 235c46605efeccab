"""How much a prompt hits that is asked again, beside drafts: vLLM's real engine core, with the model left out."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from tidepool.testing.tiny import make_checkpoint
from tidepool.vllm_plugin.versions import series_here

pytestmark = pytest.mark.vllm
UNIT = 16
"""Tokens of an attention block, as on a GPU."""
SPACING = 512
LONG = 2048
"""Tokens from which on prompts leave no state at their very end."""
SPECULATIVE = {
    "ngram": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4, "prompt_lookup_min": 2},
    "mtp": {"method": "mtp", "num_speculative_tokens": 3},
}


@pytest.fixture(scope="module", params=["mtp", "ngram"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from tidepool.replay.engine import EngineShape, make_engine

    os.environ["HF_HUB_OFFLINE"] = "1"
    model = make_checkpoint("qwen3.5", tmp_path_factory.mktemp("models"), mtp=True)
    config = json.loads(Path(model, "config.json").read_text())
    shape = EngineShape(
        config,
        2_000_000_000,
        "elastic",
        max_num_seqs=8,
        max_model_len=8192,
        options={"speculative_config": dict(SPECULATIVE[request.param])},
    )
    made = make_engine(shape)
    # From 0.33 on hashes look one token ahead, in place of lookups that find a block more.
    drafter, hashes_look_ahead = request.param == "mtp", series_here() != "0.32"
    made.ahead = UNIT if drafter and not hashes_look_ahead else 0
    made.hashed_ahead = int(drafter and hashes_look_ahead)
    return made


def ask(engine: Any, prompt: list[int], *, answer: int = 2) -> int:
    """Serve a prompt to its end. Returns the tokens of it that were hit."""
    from tidepool.replay.engine import add_request

    ask.asked = getattr(ask, "asked", 0) + 1  # type: ignore[attr-defined]
    add_request(engine, str(ask.asked), prompt, answer)  # type: ignore[attr-defined]
    hits = []
    while engine.scheduler.has_requests():
        output = engine.scheduler.schedule()
        hits += [new.num_computed_tokens for new in output.scheduled_new_reqs]
        engine.scheduler.update_from_output(output, engine.model_executor.execute_model(output))
    assert len(hits) == 1
    return int(hits[0])


def due(tokens: int, ahead: int) -> int:
    """The longest place where a state may lie for which a lookup finds ``ahead`` tokens of attention more."""
    found = tokens // UNIT * UNIT if ahead else tokens - 1
    places = range(0, tokens, SPACING if tokens >= LONG else UNIT)
    return max(place for place in places if place == 0 or place + ahead <= found)


def some(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(5, 500) for _ in range(count)]


def test_prompts_of_every_length_hit_their_last_checkpoint(engine: Any) -> None:
    rng = random.Random(0)
    edges = [
        checkpoint + step
        for checkpoint in (2048, 2560, 4096)
        for step in (-1, 0, 1, UNIT - 1, UNIT, UNIT + 1, 2 * UNIT - 1, 2 * UNIT, 2 * UNIT + 1)
    ]
    # Shorter ones leave a state where their like are continued, see tests/cache/test_checkpoints.py.
    for tokens in [
        each for each in (*edges, 2100, 3000, *(rng.randrange(LONG, 6000) for _ in range(40))) if each >= LONG
    ]:
        prompt = some(rng, tokens)
        assert ask(engine, prompt) == 0
        assert ask(engine, prompt) == due(tokens, engine.ahead), tokens
        longer = ask(engine, prompt + some(rng, 40))
        assert longer >= due(tokens, engine.ahead), "a prompt that goes on hits as much"


def test_prompts_that_part_hit_up_to_the_place(engine: Any) -> None:
    """The second leaves a state right where it parts from the first, as far as the third can find that."""
    rng = random.Random(1)
    for shared in (700, 1000, 1008, 1030, 1500):
        beginning = some(rng, shared)
        hits = [ask(engine, beginning + some(rng, 400)) for _ in range(3)]
        assert hits[2] == (shared - engine.hashed_ahead) // UNIT * UNIT - engine.ahead, (shared, hits)


def test_a_conversation_goes_on_from_its_last_checkpoint(engine: Any) -> None:
    rng = random.Random(2)
    chat = some(rng, 2300)
    last = 0
    for _ in range(6):
        before = len(chat)
        hit = ask(engine, chat, answer=30)
        assert hit == last
        last = due(before, engine.ahead)
        chat = chat + some(rng, 300)

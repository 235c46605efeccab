"""What an engine core sends of its memory, against what was asked of it and the arena's own account."""

from __future__ import annotations

import os
import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pytest

from tidepool.models import entry

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm")

from account import account  # noqa: E402
from tidepool.metrics import METRICS, Kind  # noqa: E402

MEMORY = 2 << 30


class Watched:
    """An engine core, and what its stats have told so far."""

    def __init__(self, **shape: Any) -> None:
        from tidepool.replay.engine import EngineShape, make_engine

        os.environ["HF_HUB_OFFLINE"] = "1"
        options = {"max_num_seqs": 64, "max_model_len": 16_384, "max_num_batched_tokens": 8_192} | shape
        memory, side = options.pop("memory", MEMORY), options.pop("side", "elastic")
        self.core: Any = make_engine(EngineShape(entry("Qwen3.5-4B").config, memory, side, **options))
        self.told: defaultdict[str, defaultdict[tuple[str, ...], Any]] = defaultdict(lambda: defaultdict(int))
        self.observed: defaultdict[str, list[float]] = defaultdict(list)
        self.names = 0
        self.lookups = 0

    @property
    def manager(self) -> Any:
        return self.core.scheduler.kv_cache_manager

    def ask(self, prompt: Sequence[int], output_tokens: int = 2, **more: Any) -> str:
        from vllm import SamplingParams
        from vllm.v1.engine import EngineCoreRequest

        self.names += 1
        name = str(self.names)
        self.core.model_executor.answers[name] = iter(())
        request = EngineCoreRequest(
            request_id=name,
            prompt_token_ids=list(prompt),
            mm_features=None,
            sampling_params=SamplingParams(max_tokens=output_tokens, ignore_eos=True),
            pooling_params=None,
            arrival_time=0.0,
            lora_request=None,
            data_parallel_rank=None,
            **{"cache_salt": None} | more,
        )
        self.core.add_request(*self.core.preprocess_add_request(request))
        return name

    def step(self, *, look: bool = True) -> None:
        if look and self.manager.reporter:
            self.manager.reporter._next = 0.0
        assert self.read(self.core.step()[0]) == look
        if look:
            self.agree()

    def read(self, outputs: Any) -> bool:
        """Take what a step told. Returns whether it told anything."""
        stats = [each.scheduler_stats for each in outputs.values() if each.scheduler_stats]
        samples = [each.kv_connector_stats["tidepool"]["samples"] for each in stats if each.kv_connector_stats]
        for each in samples:
            for name, values in each.items():
                kind = next(metric.kind for metric in METRICS if metric.name == name)
                for labels, value in values:
                    if kind == Kind.COUNTER:
                        self.told[name][labels] += value
                    elif kind == Kind.GAUGE:
                        self.told[name][labels] = value
                    else:
                        self.observed[name] += value
        return bool(samples)

    def agree(self) -> None:
        told = {
            (group, use): value
            for (tier, group, _, use), value in self.told["tidepool_memory_bytes"].items()
            if tier == "device"
        }
        assert told == account(self.manager.block_pool)
        assert sum(told.values()) == self.manager.block_pool.arena.total_bytes

    def run(self) -> None:
        while self.core.scheduler.has_unfinished_requests():
            self.step()

    def serve(self, prompt: Sequence[int], output_tokens: int = 2, **more: Any) -> dict[str, float]:
        """Serve one request. Returns by how much results of lookups, and of tokens, have grown."""
        before = self.counts()
        self.ask(prompt, output_tokens, **more)
        self.run()
        return {key: grown for key, value in self.counts().items() if (grown := value - before.get(key, 0))}

    def counts(self) -> dict[str, float]:
        return {
            **{f"{result} requests": value for (result,), value in self.told["tidepool_prefix_lookups_total"].items()},
            **{f"{result} tokens": value for (result,), value in self.told["tidepool_prefix_tokens_total"].items()},
            **{f"{event} branch": v for (event,), v in self.told["tidepool_branch_checkpoints_total"].items()},
        }


@pytest.fixture(scope="module")
def caching() -> Watched:
    return Watched(prefix_caching=True)


def text(seed: int, tokens: int) -> list[int]:
    return random.Random(seed).choices(range(5, 30_000), k=tokens)


def test_a_prompt_nobody_knows_and_its_return(caching: Watched) -> None:
    assert caching.serve(text(1, 2_000)) == {"new requests": 1, "new tokens": 2_000}
    grown = caching.serve([*text(1, 2_000), *text(2, 300)])
    # Nothing behind the last checkpoint was kept.
    assert grown == {"hit requests": 1, "hit_device tokens": 1_536, "new tokens": 764}
    assert caching.observed["tidepool_return_age_ratio"][-1] == pytest.approx(0, abs=0.1)


def test_a_prompt_shorter_than_a_block(caching: Watched) -> None:
    assert caching.serve(text(3, 16)) == {"short requests": 1, "new tokens": 16}


def test_the_same_prompt_under_another_salt(caching: Watched) -> None:
    assert caching.serve(text(4, 1_000), cache_salt="a") == {"new requests": 1, "new tokens": 1_000}
    assert caching.serve(text(4, 1_000), cache_salt="b") == {"other_key requests": 1, "new tokens": 1_000}


def test_attention_without_a_state_and_the_checkpoint_that_it_gets(caching: Watched) -> None:
    """Two prompts share their first 1,040 tokens; the second leaves a state there, which the third hits."""
    shared = text(5, 1_040)
    caching.serve([*shared, *text(6, 2_000)])
    grown = caching.serve([*shared, *text(7, 2_000)])
    assert grown["no_state requests"] == 1
    assert grown["no_state tokens"] == 1_040
    assert grown["left branch"] == 1
    grown = caching.serve([*shared, *text(8, 2_000)])
    assert grown["hit_device tokens"] == 1_040
    assert grown["used branch"] == 1


def test_what_was_evicted_before_the_return(caching: Watched) -> None:
    first = text(9, 2_000)
    caching.serve(first)
    arena = caching.manager.block_pool.arena
    for number in range(60):
        caching.serve(text(1_000 + number, 8_000))
    grown = caching.serve([*first, *text(10, 100)])
    assert grown["evicted requests"] == 1
    assert grown["evicted tokens"] in (1_536, 1_984), "up to one of its states"
    assert sum(caching.told["tidepool_evicted_prefixes_total"].values()) == sum(arena.evictions.values()) > 0
    assert len(caching.observed["tidepool_eviction_age_ratio"]) == sum(
        value
        for (_, priority), value in caching.told["tidepool_evicted_prefixes_total"].items()
        if priority not in ("low", "running")
    )


def test_stats_carry_samples_now_and_then_and_when_nothing_runs_any_more(caching: Watched) -> None:
    caching.ask(text(11, 100), 20)
    caching.manager.reporter._next = float("inf")
    for _ in range(19):
        caching.step(look=False)
    assert caching.told["tidepool_memory_bytes"]["device", "1", "attention", "in_use"] == 0
    caching.manager.reporter._next = float("inf")
    assert caching.read(caching.core.step()[0])
    caching.agree()
    assert caching.told["tidepool_allocated_bytes_total"][()] == caching.manager.block_pool.arena.bytes_allocated


def test_under_load_every_number_agrees(caching: Watched) -> None:
    """Many requests at once, over prompts that share beginnings; `Watched.agree` looks after each step."""
    chance = random.Random(0)
    for _ in range(300):
        if chance.random() < 0.4:
            shared = text(2_000 + chance.randrange(12), chance.choice([40, 700, 3_000]))
            caching.ask(
                [*shared, *text(chance.randrange(10**6), chance.choice([30, 500, 4_000]))], chance.randrange(2, 60)
            )
        if caching.core.scheduler.has_unfinished_requests():
            caching.step()
    caching.run()
    arena, retention = caching.manager.block_pool.arena, caching.manager._retention
    told = caching.told
    assert told["tidepool_allocated_bytes_total"][()] == arena.bytes_allocated
    assert {kind: moves for (_, kind), moves in told["tidepool_extent_moves_total"].items()} == {
        "states": arena.pools[0].moves,
        "attention": arena.pools[1].moves,
    }
    assert sum(told["tidepool_extent_moves_total"].values()) == arena.moves > 0
    assert told["tidepool_evicted_blocks_total"]["device", "1", "attention"] == arena.pools[1].evictions > 0
    lookups = {result: count for (result,), count in told["tidepool_prefix_lookups_total"].items()}
    assert lookups == {result.value: count for result, count in retention.lookups.requests.items()}
    assert sum(lookups.values()) == caching.names
    assert lookups["hit"] > 10


def test_refusals_are_counted_once_by_who_was_short() -> None:
    """Without prefix caching: long prompts lack attention, many short ones lack states, and where there is memory that
    running requests will need, that is what refuses."""
    engine = Watched(memory=1 << 30, max_num_seqs=256)

    def refused(lengths: Sequence[int], output_tokens: int) -> dict[str, float]:
        before = dict(engine.told["tidepool_refused_requests_total"])
        names = [engine.ask(text(number, length), output_tokens) for number, length in enumerate(lengths)]
        for _ in range(30):
            engine.step()
        engine.core.abort_requests(names)
        engine.ask([7], 2)
        engine.run()
        after = engine.told["tidepool_refused_requests_total"]
        return {kind: grown for (_, kind), value in after.items() if (grown := value - before.get((_, kind), 0))}

    assert refused([15_000] * 4, 500) == {"attention": 1}
    short = refused([20] * 100, 30)
    assert short["states"] > 0
    assert "attention" not in short
    assert refused([4_000] * 12, 8_000)["reserve"] > 0

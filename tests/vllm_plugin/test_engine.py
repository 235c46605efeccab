"""The plugin in vLLM's real engine core, with the model left out."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engines import run_child
from managers import ask_for, make_manager, make_request
from tidepool.cache import StateFormat
from tidepool.capacity import Partition
from tidepool.models import model_from_config
from tidepool.plan.planner import PlanOptions, divide
from tidepool.testing.tiny import Family, make_checkpoint

pytestmark = pytest.mark.vllm
FAMILIES: tuple[Family, ...] = ("qwen3.5", "nemotron-h")
BUDGETS = (64 << 20, 100_000_000, 333_333_333)


def config_of(family: Family, path: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((make_checkpoint(family, path / family) / "config.json").read_text())
    return config


def test_what_plan_predicts_is_allocated_to_the_block(tmp_path: Path) -> None:
    """Both small models of `make run`, several budgets, both partitions, prefix caching off and on, packed states."""
    jobs, predictions = [], []
    for family in FAMILIES:
        config = config_of(family, tmp_path)
        model = model_from_config(config)
        for budget in BUDGETS:
            formats: tuple[tuple[Partition, StateFormat], ...] = (
                ("elastic", "same"),
                ("fixed", "same"),
                *((("elastic", "int8"), ("elastic", "bfloat16")) if budget == BUDGETS[0] else ()),
            )
            for kind, state_format in formats:
                caching = budget == BUDGETS[0]
                options = PlanOptions(
                    budget,
                    prefix_caching=caching,
                    max_num_seqs=8,
                    max_model_len=4096,
                    checkpoint_states=state_format,
                )
                memory = divide(kind, model, model.stages(1, options.cache_options()), options, 4096)
                predictions.append((memory.units, {group.label: group.blocks for group in memory.groups}))
                jobs.append(
                    {
                        "hf_config": config,
                        "kv_bytes": budget,
                        "side": kind,
                        "max_num_seqs": 8,
                        "max_model_len": 4096,
                        "prefix_caching": caching,
                        "checkpoint_states": state_format,
                    }
                )
    reports = run_child(Path(__file__).with_name("engine_report.py"), {"jobs": jobs}, timeout=400)
    for job, report, (units, blocks) in zip(jobs, reports, predictions, strict=True):
        if job["side"] == "elastic":
            assert report["extents"] == units
        # Groups come in the order in which their first layer does: states before attention in both models.
        assert report["blocks"] == [blocks["state"], blocks["attention"], *packed_of(blocks)], job
        # As many states fit into a cache that holds nothing else, to the block.
        assert report["cached_states"] == [blocks["packed"]] if "packed" in blocks else not report["cached_states"], job


def packed_of(blocks: dict[str, int]) -> list[int]:
    """Blocks of packed states, if there are any."""
    return [blocks["packed"]] if "packed" in blocks else []


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from tidepool.replay.engine import EngineShape, make_engine

    os.environ["HF_HUB_OFFLINE"] = "1"
    config = config_of("qwen3.5", tmp_path_factory.mktemp("models"))
    return make_engine(EngineShape(config, 100_000_000, "elastic", max_num_seqs=8, max_model_len=4096))


def read_prompt(manager: Any, request: Any) -> int:
    """Allocate for a whole prompt as the scheduler would. Returns the tokens that were hit."""
    hit, tokens, request.shared_prefix_boundary = manager.get_computed_blocks(request)
    computed = tokens
    while computed < request.num_tokens:
        end = manager.step_end(request, computed, request.num_tokens, request.num_tokens)
        first = computed == tokens
        given = manager.allocate_slots(request, end - computed, tokens if first else 0, hit if first else None)
        assert given is not None
        request.num_computed_tokens = computed = end
        manager.new_step_starts()
    return int(tokens)


def test_a_hit_needs_every_groups_blocks(engine: Any) -> None:
    manager = make_manager(engine)
    state, attention = manager.coordinator.block_pool.pools
    prompt = list(range(2000))
    first = make_request(engine, "first", prompt)
    assert read_prompt(manager, first) == 0
    manager.free(first)
    again = make_request(engine, "again", prompt)
    _, tokens, _ = manager.get_computed_blocks(again)
    assert tokens == 1536, "the last checkpoint before the prompt's end"

    states = [block.block_id for block in state.blocks if block.block_hash is not None]
    before = {block.block_id for block in attention.blocks if block.block_hash is not None}
    state.evict_blocks(set(states))
    assert {block.block_id for block in attention.blocks if block.block_hash is not None} == before
    _, tokens, _ = manager.get_computed_blocks(again)
    assert tokens == 0, "attention blocks alone are no hit"


def ends(pool: Any) -> list[int]:
    """Tokens up to the end of each cached block of a group, in order."""
    return sorted(block.block_hash_num_tokens for block in pool.blocks if block.block_hash is not None)


@pytest.mark.parametrize("lost", [None, 0, 63, 64, 70, 124])
@pytest.mark.parametrize("most", [0, 15, 16, 1_024, 1_040, 2_000])
def test_a_run_of_blocks_is_found_as_single_ones_are(engine: Any, lost: int | None, most: int) -> None:
    """Up to the first that isn't cached, and no further than asked for; of prompts longer than a run."""
    from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

    manager = make_manager(engine)
    request = make_request(engine, "request", list(range(2_000)))
    read_prompt(manager, request)
    ours = manager.coordinator.single_type_managers[1]
    assert isinstance(ours, FullAttentionManager)
    assert type(ours) is not FullAttentionManager
    pool, spec = ours.block_pool, ours.kv_cache_spec
    if lost is not None:
        pool.evict_blocks({ours.req_to_blocks["request"][lost].block_id})
    arguments = (request.block_hashes, most, [1], pool, spec, False, 16)
    found, tokens = ours.find_longest_cache_hit(*arguments)
    assert (found, tokens) == FullAttentionManager.find_longest_cache_hit(*arguments)
    assert tokens == min(most // 16, 125 if lost is None else lost) * 16


@pytest.mark.parametrize("drafter", [False, True])
def test_attention_behind_the_last_state_is_dropped(engine: Any, drafter: bool) -> None:
    """No hit can end there, so it is clean at once, and whoever listens to events is told. With a drafter a lookup has
    to find one block more."""
    manager = make_manager(engine, use_eagle=drafter)
    state, attention = manager.coordinator.block_pool.pools
    request = make_request(engine, "request", list(range(2000)))
    read_prompt(manager, request)
    tokens = ends(attention)
    assert tokens[-1] == 2000 // 16 * 16
    manager.take_events()
    manager.free(request)
    last = ends(state)[-1]
    assert last == 1536
    kept = [end for end in tokens if end <= last + 16 * drafter]
    assert ends(attention) == kept
    assert len(manager.take_events()) == len(tokens) - len(kept) > 0
    assert manager.block_pool.retention.requests["request"].last_checkpoint is None


def test_one_question_after_another_about_a_document(engine: Any) -> None:
    """Each continues from the state at the document's end and leaves no later one, so that state isn't of low priority,
    and the question's attention is of no use."""
    manager = make_manager(engine)
    state, attention = manager.coordinator.block_pool.pools
    document = list(range(2048))
    for question in range(4):
        request = make_request(engine, str(question), document + [3000 + question] * 300)
        assert read_prompt(manager, request) == (2048 if question else 0)
        assert not state.superseded
        finish(manager, request)
        assert ends(state)[-1] == ends(attention)[-1] == 2048


def test_reset_is_for_all_groups_or_none(engine: Any) -> None:
    manager = make_manager(engine)
    pool = manager.block_pool
    request = make_request(engine, "request", list(range(1500)))
    read_prompt(manager, request)
    manager.take_events()
    assert not manager.reset_prefix_cache(), "blocks are in use"
    assert manager.take_events() == []
    manager.free(request)
    manager.take_events()
    assert pool.arena.usage().cached > 0
    assert manager.reset_prefix_cache()
    usage = pool.arena.usage()
    assert (usage.cached, usage.in_use, usage.free) == (0, 0, 0)
    assert [type(event).__name__ for event in manager.take_events()] == ["AllBlocksCleared"]
    assert manager.get_computed_blocks(make_request(engine, "after", list(range(1500))))[1] == 0


def test_a_reset_tells_nobody_where_events_are_off(engine: Any) -> None:
    manager = make_manager(engine, enable_kv_cache_events=False)
    finish_after(manager, make_request(engine, "request", list(range(1500))))
    assert manager.reset_prefix_cache()
    assert manager.take_events() == []


def test_what_is_dropped_from_the_cache_is_free_but_for_what_is_in_use(engine: Any) -> None:
    manager = make_manager(engine)
    state, _ = manager.block_pool.pools
    books = manager.block_pool.arena.pools[0]
    finish_after(manager, make_request(engine, "done", list(range(1500))))
    running = make_request(engine, "running", list(range(5000, 6500)))
    read_prompt(manager, running)
    in_use = books.in_use
    assert books.cached > 0
    state.evict_blocks({block.block_id for block in state.blocks if block.block_hash is not None})
    assert (books.cached, books.in_use) == (0, in_use)
    finish(manager, running)
    assert (books.cached, books.in_use) == (0, 0)


@pytest.mark.parametrize("group", [0, 1])
def test_a_group_gets_as_many_blocks_as_it_says_are_free(engine: Any, group: int) -> None:
    manager = make_manager(engine)
    finish_after(manager, make_request(engine, "request", list(range(1500))))
    pool = manager.block_pool.pools[group]
    free = pool.get_num_free_blocks()
    got = pool.get_new_blocks(free)
    assert len({block.block_id for block in got}) == free
    assert (pool.get_num_free_blocks(), manager.block_pool.arena.available) == (0, 0)


def finish_after(manager: Any, request: Any) -> None:
    """Let a request read its prompt and end."""
    read_prompt(manager, request)
    finish(manager, request)


def test_workers_are_told_to_poison_nothing_unless_it_is_asked_for(engine: Any) -> None:
    from tidepool.vllm_plugin.worker import encode

    manager = make_manager(engine)
    pool = manager.block_pool
    plain = {encode(group, block, 2) for group in range(2) for block in range(len(pool.pools[group].blocks))}
    for number in range(80):
        finish_after(manager, make_request(engine, str(number), list(range(2000 * number, 2000 * number + 1500))))
        assert plain.issuperset(manager.take_new_block_ids())
    assert sum(pool.arena.evictions.values()) > 0


def test_events_name_their_group(engine: Any) -> None:
    from vllm.distributed.kv_events import BlockStored

    manager = make_manager(engine)
    request = make_request(engine, "request", list(range(1500)))
    read_prompt(manager, request)
    manager.free(request)
    stored = manager.take_events()
    assert {event.group_idx for event in stored} == {0, 1}
    of_attention = [event for event in stored if event.group_idx == 1 and isinstance(event, BlockStored)]
    assert [len(event.block_hashes) for event in of_attention] == [64, 29], "one for what each step has stored"
    state = manager.block_pool.pools[0]
    state.evict_blocks({block.block_id for block in state.blocks if block.block_hash is not None})
    removed = manager.take_events()
    assert removed
    assert {event.group_idx for event in removed} == {0}


@pytest.mark.parametrize(("tokens", "hit"), [(1_500, 1_024), (1_025, 1_024), (900, 0)])
def test_who_asks_is_told_of_all_that_a_lookup_found(engine: Any, tokens: int, hit: int) -> None:
    manager = make_manager(engine)
    read_prompt(manager, make_request(engine, "first", list(range(1_500))))
    manager.take_events()
    request = make_request(engine, "again", list(range(tokens)))
    found, found_tokens, _ = manager.get_computed_blocks(request)
    assert found_tokens == hit
    manager.coordinator.emit_cached_block_events(request, found.blocks)
    told = [(event.group_idx, len(event.block_hashes), event.block_size) for event in manager.take_events()]
    assert sorted(told) == ([(0, 1, 16), (1, hit // 16, 16)] if hit else [])


def test_a_refused_request_is_looked_up_again_when_a_block_came_free(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = make_manager(engine)
    lookups: list[int] = []
    find = manager.coordinator.find_longest_cache_hit

    def counted(*args: Any) -> Any:
        lookups.append(1)
        return find(*args)

    monkeypatch.setattr(manager.coordinator, "find_longest_cache_hit", counted)

    def ask(request: Any) -> bool:
        hit, tokens, _ = manager.get_computed_blocks(request)
        asked = manager.allocate_slots(request, 1500 - tokens, tokens, hit, full_sequence_must_fit=True)
        return asked is not None

    running = []
    waiting = make_request(engine, "0", list(range(1500)))
    while ask(waiting):
        running.append(waiting)
        assert len(running) < 100
        waiting = make_request(engine, str(len(running)), list(range(1500 * len(running), 1500 * len(running) + 1500)))
    assert running
    lookups.clear()
    assert not any(ask(waiting) for _ in range(5))
    assert not lookups, "nothing has come free: the answer is known"
    other = make_request(engine, "other", list(range(1500)))
    assert not ask(other)
    assert lookups, "this one hasn't been looked up yet"
    lookups.clear()
    manager.free(running.pop())
    assert ask(waiting)
    assert lookups


def first_runner(runner: Any) -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    GPUModelRunner._init_minimal_kv_cache_for_profiling(runner)


def second_runner(runner: Any) -> None:
    from vllm.v1.worker.gpu.cudagraph_utils import _init_minimal_kv_cache_for_profiling

    _init_minimal_kv_cache_for_profiling(runner)


@pytest.mark.parametrize("measure", [first_runner, second_runner])
@pytest.mark.parametrize("partition", ["elastic", "fixed"])
def test_memory_to_measure_graphs_with_is_small(engine: Any, partition: str, measure: Any) -> None:
    """Both runners ask for a block for each request that may run, which are extents here, before memory is planned."""
    from tidepool.vllm_plugin.planning import PROFILING_EXTENTS
    from tidepool.vllm_plugin.serving_plan import note_plan, plan_of
    from tidepool.vllm_plugin.worker import limit_requests

    vllm_config = copy.copy(engine.vllm_config)
    vllm_config.cache_config = copy.copy(engine.vllm_config.cache_config)
    vllm_config.scheduler_config = copy.copy(engine.vllm_config.scheduler_config)
    vllm_config.scheduler_config.max_num_seqs = 512
    plan = plan_of(vllm_config)
    assert plan is not None
    assert plan.memory_bytes == 100_000_000
    note_plan(vllm_config, plan._replace(partition=partition, memory_bytes=None))  # type: ignore[arg-type]
    made: list[Any] = []
    runner = SimpleNamespace(
        vllm_config=vllm_config,
        cache_config=vllm_config.cache_config,
        compilation_config=SimpleNamespace(max_cudagraph_capture_size=1024),
        max_num_reqs=512,
        get_kv_cache_spec=lambda: dict(engine.model_executor.specs),
        initialize_kv_cache=lambda config, is_profiling: made.append(config),
    )
    measure(runner)
    (config,) = made
    assert config.geometry is not None
    assert config.arena_bytes == PROFILING_EXTENTS * config.geometry.extent_bytes
    assert vllm_config.cache_config.num_gpu_blocks == PROFILING_EXTENTS
    # Not more requests than there are states: vLLM's kernels would read past the memory.
    limit_requests(runner, config)
    states = PROFILING_EXTENTS * config.geometry.layouts[0].blocks_per_extent - 1
    assert vllm_config.scheduler_config.max_num_seqs == states < 512
    # What was asked for counts again once the real memory is there.
    limit_requests(runner, replace(config, num_blocks=1000))
    assert vllm_config.scheduler_config.max_num_seqs == 512


@pytest.mark.parametrize("partition", ["elastic", "fixed"])
@pytest.mark.parametrize("override", [None, 300])
def test_every_group_has_the_ids_below_num_blocks(engine: Any, partition: str, override: int | None) -> None:
    """vLLM warms kernels up with made-up requests, whose ids are any below num_blocks, the same in all groups."""
    from tidepool.vllm_plugin import planning
    from tidepool.vllm_plugin.serving_plan import plan_of

    vllm_config = copy.copy(engine.vllm_config)
    vllm_config.cache_config = copy.copy(engine.vllm_config.cache_config)
    vllm_config.cache_config.num_gpu_blocks_override = override
    groups = engine.scheduler.kv_cache_config.kv_cache_groups
    plan = plan_of(vllm_config)
    assert plan is not None
    plan = plan._replace(partition=partition, memory_bytes=1_000_000_000)  # type: ignore[arg-type]
    config = planning.make_kv_cache_config(vllm_config, plan, groups, 300)
    assert config.num_blocks <= min(config.pool_blocks)
    for tensor in config.kv_cache_tensors:
        group = next(i for i, each in enumerate(groups) if tensor.layers[0] in each.layer_names)
        last = (config.num_blocks - 1) * config.strides[group] + config.block_bytes[group]
        assert last <= config.arena_bytes == tensor.size
    if partition == "fixed":
        assert config.num_blocks == config.pool_blocks[0] < 300, "states: one each for max_num_seqs, and the null block"
        extents = 300 * planning.extent_bytes(vllm_config, groups)
        assert config.arena_bytes == (extents if override else plan.memory_bytes)


def test_an_id_without_its_group_is_refused(engine: Any) -> None:
    manager = make_manager(engine)
    with pytest.raises(NotImplementedError, match="a block id alone doesn't name a block"):
        manager.evict_blocks({5})


def test_ids_for_workers_are_unique_over_groups() -> None:
    from tidepool.vllm_plugin.worker import decode, encode

    ids = {encode(group, block, 3): (group, block) for group in range(3) for block in range(50)}
    assert len(ids) == 150
    assert all(decode(unique, 3) == named for unique, named in ids.items())


def test_workers_zero_poison_and_copy_one_groups_block_only() -> None:
    import torch

    from tidepool.cache import ExtentLayout, Geometry
    from tidepool.vllm_plugin.worker import ArenaBytes, encode, encode_poison, encode_poison_extent

    arena = ArenaBytes.__new__(ArenaBytes)
    geometry = Geometry(120, (ExtentLayout(40, 40, 3), ExtentLayout(22, 24, 5)))
    arena.arena = torch.full((600,), 7, dtype=torch.uint8)
    arena.strides, arena.block_bytes, arena.extent_bytes = (40, 24), (40, 22), geometry.extent_bytes
    arena.poison = [0x7F, 0xFF]

    def changed() -> list[int]:
        return list(torch.nonzero(arena.arena != 7).flatten().tolist())

    arena.apply([encode(1, 7, 2)])
    assert changed() == list(range(168, 190))
    arena.arena.fill_(7)
    arena.apply([encode_poison(0, 4, 2), encode(0, 4, 2)])
    assert changed() == list(range(160, 200))
    assert set(arena.arena[160:200].tolist()) == {0}, "in the order given"
    arena.arena.fill_(7)
    arena.apply([encode_poison_extent(1, 2, 2)])
    assert changed() == list(range(240, 360))
    arena.arena.fill_(7)
    arena.arena[40:80] = 9
    arena.copy([(encode(0, 1, 2), encode(0, 5, 2))])
    assert changed() == [*range(40, 80), *range(200, 240)]


def test_what_is_refused_for_one_step_is_had_in_the_next(engine: Any) -> None:
    """A state can't be read in the step that computes it, which has nothing to do with memory."""
    manager = make_manager(engine)
    prompt = list(range(700))
    first = make_request(engine, "first", prompt)
    manager.new_step_starts()
    assert ask_for(manager, first, 512) is not None
    again = make_request(engine, "again", prompt)
    assert ask_for(manager, again, 700) is None
    released = manager.block_pool.arena.released
    manager.new_step_starts()
    assert manager.block_pool.arena.released == released, "not because something came free"
    assert ask_for(manager, again, 700) is not None


@pytest.mark.parametrize("deferred", [False, True])
def test_nothing_is_known_of_a_request_that_is_aborted_while_it_waits(engine: Any, deferred: bool) -> None:
    from vllm.v1.request import RequestStatus

    manager = make_manager(engine)
    requests = [make_request(engine, str(n), list(range(1500 * n, 1500 * n + 1500))) for n in range(100)]
    refused = next(request for request in requests if ask_for(manager, request, 1500) is None)
    assert manager._lookups[refused.request_id].released >= 0
    refused.status = RequestStatus.FINISHED_ABORTED
    assert not (manager.pop_blocks_for_free if deferred else manager.free)(refused)
    assert refused.request_id not in manager._lookups
    assert refused.request_id not in manager.block_pool.retention.requests
    assert refused.request_id not in manager.block_pool.arena._prefixes


@pytest.fixture(scope="module")
def uncached(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An engine without prefix caching."""
    from tidepool.replay.engine import EngineShape, make_engine

    config = config_of("qwen3.5", tmp_path_factory.mktemp("models"))
    shape = EngineShape(config, 100_000_000, "elastic", max_num_seqs=8, max_model_len=4096, prefix_caching=False)
    return make_engine(shape)


def test_without_prefix_caching_nothing_is_found_and_all_comes_back(uncached: Any) -> None:
    manager = make_manager(uncached, enable_caching=False)
    arena = manager.block_pool.arena
    for name in ("first", "again"):
        request = make_request(uncached, name, list(range(1500)))
        assert manager.get_computed_blocks(request)[1] == 0
        assert ask_for(manager, request, 1500) is not None
        assert arena.usage().in_use > 0
        finish(manager, request)
        assert (arena.usage().in_use, arena.usage().cached) == (0, 0)


def test_a_request_grows_in_the_extent_where_it_has_its_last_block(uncached: Any) -> None:
    """Though another is fuller, which is where new requests begin: so that extents come free when requests end."""
    manager = make_manager(uncached, enable_caching=False)
    per_extent = uncached.scheduler.kv_cache_config.geometry.layouts[1].blocks_per_extent

    def extents(request: Any) -> set[int]:
        return {block.block_id // per_extent for block in manager.get_blocks(request.request_id).blocks[1]}

    first, second, third, new = (make_request(uncached, name, list(range(2000))) for name in ("1", "2", "3", "4"))
    for request, blocks in ((first, per_extent - 5), (second, 5), (third, 50)):
        assert ask_for(manager, request, blocks * 16) is not None
        request.num_computed_tokens = blocks * 16
    assert extents(first) == extents(second) != extents(third)
    finish(manager, first)
    before = extents(second)
    assert manager.allocate_slots(second, 32) is not None
    assert extents(second) == before
    assert ask_for(manager, new, 16) is not None
    assert extents(new) == extents(third)


@pytest.mark.parametrize("deferred", [False, True])
def test_nobody_comes_back_to_a_request_that_left_no_state(engine: Any, deferred: bool) -> None:
    from vllm.v1.request import RequestStatus

    manager = make_manager(engine)
    for tokens in (300, 1536):
        request = make_request(engine, str(tokens), list(range(2000)))
        assert ask_for(manager, request, tokens) is not None
        request.status = RequestStatus.FINISHED_ABORTED
        (manager.pop_blocks_for_free if deferred else manager.free)(request)
        assert not manager.block_pool.retention.requests
        assert bool(manager.block_pool.reuse._waits) == (tokens == 1536)


def test_a_superseded_state_is_forgotten_with_it(engine: Any) -> None:
    """Else the next request that gets the block would leave a state of low priority there."""
    manager = make_manager(engine)
    state = manager.block_pool.pools[0]
    prompt = list(range(700))
    first = make_request(engine, "first", prompt)
    read_prompt(manager, first)
    finish(manager, first)
    longer = make_request(engine, "longer", list(range(1200)))
    hit, tokens, _ = manager.get_computed_blocks(longer)
    assert tokens == 512
    assert manager.allocate_slots(longer, 512, tokens, hit) is not None
    for block_hash in longer.block_hashes:
        manager.block_pool.retention.remember_branch_point(block_hash)
    assert state.superseded
    finish(manager, longer)
    assert not state.superseded


def test_where_a_request_leaves_states_is_known_until_it_ends(engine: Any) -> None:
    manager = make_manager(engine)
    pool = manager.block_pool
    for _ in range(200):
        pool.retention.branches.saw(512)
    request = make_request(engine, "request", list(range(4000)))
    read_prompt(manager, request)
    assert pool.retention.checkpoints("request").cuts == (3072, 3584)
    finish(manager, request)
    assert not pool.retention.requests
    assert {3072, 3584} <= set(ends(pool.pools[0]))
    parted = make_request(engine, "parted", [*range(3500), *range(5000, 5500)])
    assert read_prompt(manager, parted) == 3072
    assert pool.retention.requests["parted"].match.distance == 512


def finish(manager: Any, request: Any) -> None:
    from vllm.v1.request import RequestStatus

    request.status = RequestStatus.FINISHED_STOPPED
    manager.free(request)


def test_memory_is_planned_for_the_requests_that_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one process a worker lowers the same configuration's, for the small cache that graphs are measured on."""
    from tidepool.vllm_plugin import wrappers
    from tidepool.vllm_plugin.asked import Asked

    monkeypatch.setattr(wrappers, "plan_of", lambda config: object() if config.served else None)
    monkeypatch.setattr(wrappers, "asked_of", lambda config: Asked(max_num_seqs=64))
    monkeypatch.setattr(wrappers, "own_connector", lambda config: None)
    planned_for: list[int] = []
    monkeypatch.setattr(wrappers, "settle", lambda config, *_: planned_for.append(config.scheduler_config.max_num_seqs))
    for served in (True, False):
        config = SimpleNamespace(served=served, scheduler_config=SimpleNamespace(max_num_seqs=7))
        wrappers.plan_memory(lambda *_: None, config, None, None)
    assert planned_for == [64, 7]


def test_a_relocated_state_keeps_its_own_priority(tmp_path: Path) -> None:
    """What lay where it comes to may have been of low priority."""
    from tidepool.replay.engine import EngineShape, make_engine

    config = config_of("qwen3.5", tmp_path)
    shape = EngineShape(config, 100_000_000, "elastic", max_num_seqs=8, max_model_len=4096, checkpoint_states="int8")
    memory = make_engine(shape).scheduler.kv_cache_manager.block_pool
    group = len(memory.pools)
    states = memory.first_states
    low, plain, gap = (memory.at(group, index) for index in (1, 2, 3))
    states.low |= {low.block_id, gap.block_id}
    memory._on_relocate(group, 2, 3)
    assert gap.block_id not in states.low
    memory._on_relocate(group, 1, 2)
    assert plain.block_id in states.low
    assert low.block_id not in states.low


def test_caching_when_a_step_has_ended_keeps_no_state(engine: Any) -> None:
    """As vLLM 0.33 does with async scheduling: the next step, which writes over the state, may be under way by then."""
    from tidepool.replay.engine import add_request
    from tidepool.replay.step import take_step

    scheduler = engine.scheduler
    manager = scheduler.kv_cache_manager
    retention = manager.coordinator.retention
    add_request(engine, "answers", list(range(10, 110)), 200)
    states = set()
    while scheduler.has_requests():
        take_step(engine)
        for request in scheduler.running:
            before = retention.requests[request.request_id].answer_state
            manager.cache_blocks(request, request.num_computed_tokens)
            assert retention.requests[request.request_id].answer_state == before
            states.add(before)
    assert len(states) > 3, "states of the answer are kept while steps are scheduled"


@pytest.mark.parametrize("others", [0, 1])
def test_an_answers_state_takes_the_place_of_its_prompts_unless_others_have_found_that(
    others: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tidepool.cache import PromptEnds
    from tidepool.replay.engine import EngineShape, add_request, make_engine
    from tidepool.replay.step import take_step

    monkeypatch.setattr(PromptEnds, "answer_pays", lambda *_: True)
    config = config_of("qwen3.5", tmp_path)
    core = make_engine(EngineShape(config, 100_000_000, "elastic", max_num_seqs=8, max_model_len=4096))
    manager = core.scheduler.kv_cache_manager
    prompt = list(range(700))
    add_request(core, "answers", prompt, 300)
    take_step(core)
    take_step(core)
    for number in range(others):
        add_request(core, str(number), [*prompt[:600], *range(1000, 1100)], 2)
    while core.scheduler.has_requests():
        take_step(core)
    states = ends(manager.block_pool.pools[0])
    assert max(states) > 700
    assert (512 in states) == (others > 0)

"""Where memory is short, no request waits for a checkpoint's sake, and none is preempted for it.

Managers of real engine cores, with the model left out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from managers import ask_for, make_manager, make_request
from tidepool.testing.tiny import Family, make_checkpoint

pytestmark = pytest.mark.vllm
STATES, ATTENTION = 0, 1
"""Groups, in the order of their first layers."""
FAMILIES: tuple[Family, ...] = ("qwen3.5", "nemotron-h")
PROMPT = list(range(700))


def engine_of(family: Family, folder: Path, **options: Any) -> Any:
    from tidepool.replay.engine import EngineShape, make_engine

    os.environ["HF_HUB_OFFLINE"] = "1"
    config = json.loads((make_checkpoint(family, folder / family) / "config.json").read_text(encoding="utf-8"))
    return make_engine(EngineShape(config, 100_000_000, "elastic", max_num_seqs=8, max_model_len=4096, **options))


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[Family, Any]:
    return {family: engine_of(family, tmp_path_factory.mktemp("models")) for family in FAMILIES}


def begin(manager: Any, request: Any, tokens: int) -> bool:
    """Offer memory for the first tokens of a waiting request, as the scheduler does. Returns whether it got it."""
    if ask_for(manager, request, tokens) is None:
        return False
    go_on(manager, request, tokens)
    return True


def go_on(manager: Any, request: Any, tokens: int) -> None:
    """A step has ended after so many tokens of a request."""
    from vllm.v1.request import RequestStatus

    request.status = RequestStatus.RUNNING
    request.num_computed_tokens = tokens
    manager.new_step_starts()


def leave_states(manager: Any, count: int) -> None:
    """Let somebody else hold all memory but an extent of attention and so many blocks of states."""
    arena = manager.block_pool.arena
    arena.allocate(ATTENTION, 1)
    pool = arena.pools[STATES]
    arena.allocate(STATES, pool.usable + arena.available * pool.blocks_per_extent - count)


def hit_tokens(manager: Any, engine: Any, prompt: Sequence[int] = PROMPT) -> int:
    """What a prompt would hit if it came again."""
    return int(manager.get_computed_blocks(make_request(engine, "again", prompt))[1])


def states_of(manager: Any) -> list[int]:
    """The blocks of states of the request."""
    return [block.block_id for block in manager.get_blocks("request").blocks[STATES] if not block.is_null]


def removed(manager: Any) -> int:
    from vllm.distributed.kv_events import BlockRemoved

    return sum(len(event.block_hashes) for event in manager.take_events() if isinstance(event, BlockRemoved))


@pytest.mark.parametrize("place", [512, 192])
@pytest.mark.parametrize("left", [0, 1, 2])
def test_a_running_request_gives_up_the_state_that_it_left_in_its_block(
    engines: dict[Family, Any], left: int, place: int
) -> None:
    """Unless there is a block for it to go on in. One state is at a multiple of what a column of the block table stands
    for, and one where prompts branch, inside a column."""
    engine = engines["qwen3.5"]
    manager = make_manager(engine)
    prompt = PROMPT
    if place == 192:
        assert begin(manager, make_request(engine, "first", PROMPT), 512)
        prompt = [*PROMPT[:192], *range(1_000, 1_508)]
    request = make_request(engine, "request", prompt)
    hit, tokens, _ = manager.get_computed_blocks(request)
    assert (tokens, manager.step_end(request, 0, 700, 700)) == (0, place)
    assert manager.allocate_slots(request, place, 0, hit) is not None
    go_on(manager, request, place)
    assert hit_tokens(manager, engine, prompt) == place
    (before, *_) = states_of(manager)
    leave_states(manager, left)
    short = left == 0
    removed(manager)
    assert manager.allocate_slots(request, 700 - place) is not None
    (*_, after) = states_of(manager)
    assert (after == before, removed(manager)) == (short, short), "it goes on in its block, and consumers are told"
    assert manager.coordinator.retention.given_up == short
    assert not manager.take_kv_cache_block_copies()[0] or not short, "there is nothing to copy"
    assert hit_tokens(manager, engine, prompt) == (0 if short else place)
    go_on(manager, request, 700)
    assert manager.coordinator.retention.release("request") == (None if short else place)


@pytest.mark.parametrize("left", [0, 1, 2])
def test_a_running_request_saves_no_state_inside_its_step(engines: dict[Family, Any], left: int) -> None:
    engine = engines["nemotron-h"]
    manager = make_manager(engine)
    request = make_request(engine, "request", PROMPT)
    assert begin(manager, request, 512)
    assert manager.coordinator.retention.checkpoints("request").within > 512
    leave_states(manager, left)
    assert manager.allocate_slots(request, 188) is not None
    assert manager.coordinator.retention.checkpoints("request").within == (688 if left == 2 else 0)
    go_on(manager, request, 700)
    assert hit_tokens(manager, engine) == (688 if left == 2 else 0)


def test_what_has_been_left_is_kept(engines: dict[Family, Any]) -> None:
    """Also where an answer finds no memory, and its request is preempted."""
    engine = engines["nemotron-h"]
    manager = make_manager(engine)
    request = make_request(engine, "request", PROMPT)
    assert begin(manager, request, 700)
    request.append_output_token_ids([1])
    assert manager.allocate_slots(request, 1) is not None
    go_on(manager, request, 701)
    arena = manager.block_pool.arena
    arena.touch(STATES, list(arena.pools[STATES].kept()))
    leave_states(manager, 0)
    arena.allocate(ATTENTION, arena.pools[ATTENTION].usable)
    request.append_output_token_ids([1] * 8)
    assert manager.allocate_slots(request, 8) is None
    assert manager.coordinator.retention.checkpoints("request").within == 688
    assert manager.coordinator.retention.release("request") == 688


@pytest.mark.parametrize("left", [0, 1, 2])
def test_a_waiting_request_doesnt_wait_for_the_sake_of_a_checkpoint(engines: dict[Family, Any], left: int) -> None:
    engine = engines["nemotron-h"]
    manager = make_manager(engine)
    leave_states(manager, left)
    request = make_request(engine, "request", PROMPT)
    assert begin(manager, request, 700) == (left > 0)
    if left:
        assert hit_tokens(manager, engine) == (688 if left == 2 else 0)


def test_what_is_postponed_isnt_taken_for_a_want_of_memory(engines: dict[Family, Any]) -> None:
    """Also where the state that is read in the step that computes it lies inside a column of the block table."""
    engine = engines["qwen3.5"]
    manager = make_manager(engine)
    assert begin(manager, make_request(engine, "first", PROMPT), 512)
    parted = [*PROMPT[:192], *range(1_000, 1_400)]
    request = make_request(engine, "second", parted)
    hit, tokens, _ = manager.get_computed_blocks(request)
    assert manager.step_end(request, tokens, 592, 592) == 192, "a branch point, not at a multiple of a column's 128"
    assert manager.allocate_slots(request, 192, 0, hit) is not None
    third = make_request(engine, "third", [*PROMPT[:192], *range(2_000, 2_400)])
    assert not begin(manager, third, 592)
    assert manager.coordinator.need.postponed
    assert not manager.refused_before("third")


@pytest.mark.parametrize(("answer", "begins"), [(8, True), (400, False)])
def test_room_is_left_for_no_longer_an_answer_than_a_request_may_give(
    engines: dict[Family, Any], answer: int, begins: bool
) -> None:
    """Two long answers don't fit beside each other, one whose request has ended before does."""
    engine = engines["qwen3.5"]
    manager = make_manager(engine)
    assert begin(manager, make_request(engine, "running", range(5_000, 5_100), 400), 100)
    leave_states(manager, 1)
    arena = manager.block_pool.arena
    arena.allocate(ATTENTION, arena.pools[ATTENTION].usable - 700 // 16 - 3)
    assert begin(manager, make_request(engine, "request", PROMPT, answer), 700) == begins


def test_a_packed_state_is_unpacked_into_the_block_that_the_request_goes_on_in(tmp_path: Path) -> None:
    """So it begins where there is one block of states, and not where there is none."""
    from vllm.v1.request import RequestStatus

    engine = engine_of("qwen3.5", tmp_path, checkpoint_states="int8")
    for left in (0, 1):
        manager = make_manager(engine)
        first = make_request(engine, f"first {left}", PROMPT)
        assert begin(manager, first, 512)
        assert manager.allocate_slots(first, 188) is not None
        go_on(manager, first, 700)
        first.status = RequestStatus.FINISHED_STOPPED
        manager.free(first)
        found, tokens, _ = manager.get_computed_blocks(make_request(engine, "holds", PROMPT))
        assert tokens == 512
        for pool, blocks in zip(manager.block_pool.pools, found.blocks, strict=True):
            pool.touch(blocks)
        assert manager.block_pool.arena.pools[-1].in_use == 1, "nobody else may have it"
        leave_states(manager, left)
        request = make_request(engine, "request", [*PROMPT[:600], *range(1_000, 1_100)])
        assert begin(manager, request, 700) == (left > 0)
    assert len(set(states_of(manager))) == 1

"""Packed states in a worker: what rounding does to them, and that everything is in its place."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from tidepool.cache import StateFormat

pytestmark = pytest.mark.vllm
torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

from tidepool.vllm_plugin.state_parts import StatePacker, StateParts, state_parts  # noqa: E402
from tidepool.vllm_plugin.worker import HUGE_BYTE, ArenaBytes, encode, encode_copy, encode_poison  # noqa: E402

LAYERS = 3
PARTS = StateParts(before=96, rows=10, numbers=16, dtype=torch.float32, after=8)


def spec_of(shapes: Any, dtypes: Any) -> Any:
    return SimpleNamespace(shapes=shapes, dtypes=dtypes)


@pytest.mark.parametrize(
    ("shapes", "dtypes", "parts"),
    [
        # A convolution and the heads' matrices, as in Gated DeltaNet and Mamba2.
        (((3, 32), (4, 8, 16)), (torch.bfloat16, torch.float32), StateParts(192, 32, 16, torch.float32, 0)),
        # Mamba1: a row of numbers for each channel.
        (((3, 32), (32, 16)), (torch.bfloat16, torch.float32), StateParts(192, 32, 16, torch.float32, 0)),
        # What drafts are recovered from lies behind.
        (
            ((3, 32), (4, 8, 16), (4, 8)),
            (torch.bfloat16, torch.bfloat16, torch.float32),
            StateParts(192, 32, 16, torch.bfloat16, 128),
        ),
        # Linear attention has matrices alone, a short convolution has none.
        (((4, 8, 16),), (torch.float32,), StateParts(0, 32, 16, torch.float32, 0)),
        (((3, 32),), (torch.bfloat16,), StateParts(192, 0, 0, torch.bfloat16, 0)),
    ],
)
def test_parts_of_a_state(shapes: Any, dtypes: Any, parts: StateParts) -> None:
    found = state_parts(spec_of(shapes, dtypes))
    assert found == parts
    assert bool(found.packed_page_bytes("int8")) == bool(parts.rows)


def make_state(seed: int = 0) -> Any:
    """A block of states: matrices whose rows differ in size by orders of magnitude, one row all zeros."""
    made = torch.Generator().manual_seed(seed)
    block = torch.randint(0, 256, (LAYERS, PARTS.page_bytes), dtype=torch.uint8, generator=made)
    matrices = torch.randn((LAYERS, PARTS.rows, PARTS.numbers), generator=made)
    matrices *= 10.0 ** torch.randint(-4, 4, (LAYERS, PARTS.rows, 1), generator=made)
    matrices[1, 2] = 0
    block[:, PARTS.before : PARTS.before + PARTS.matrix_bytes] = matrices.view(torch.uint8).view(LAYERS, -1)
    return block.flatten()


def matrices_of(block: Any) -> Any:
    pages = block.view(LAYERS, PARTS.page_bytes)[:, PARTS.before : PARTS.before + PARTS.matrix_bytes]
    return pages.view(torch.float32).view(LAYERS, PARTS.rows, PARTS.numbers)


def round_trip(state: Any, state_format: StateFormat) -> Any:
    packer = StatePacker(PARTS, LAYERS, state_format)
    packed = torch.full((LAYERS * PARTS.packed_page_bytes(state_format),), HUGE_BYTE, dtype=torch.uint8)
    again = torch.full_like(state, HUGE_BYTE)
    packer.pack(state, packed)
    packer.unpack(packed, again)
    return again


def test_int8_rounds_to_half_a_step_of_the_row() -> None:
    state = make_state()
    before, after = matrices_of(state), matrices_of(round_trip(state, "int8"))
    step = before.abs().amax(-1, keepdim=True) / 127
    assert bool(((before - after).abs() <= step * 0.501).all())
    assert bool((before != after).any())
    assert bool((after[1, 2] == 0).all())


def test_bfloat16_is_torchs() -> None:
    state = make_state()
    assert torch.equal(matrices_of(round_trip(state, "bfloat16")), matrices_of(state).bfloat16().float())


@pytest.mark.parametrize("state_format", ["bfloat16", "int8"])
def test_the_rest_is_kept_to_the_bit(state_format: StateFormat) -> None:
    state = make_state(1)
    again = round_trip(state, state_format)
    for part in (slice(0, PARTS.before), slice(PARTS.before + PARTS.matrix_bytes, None)):
        assert torch.equal(state.view(LAYERS, -1)[:, part], again.view(LAYERS, -1)[:, part])


def test_packing_again_changes_nothing() -> None:
    """A state that is hit again and again is rounded once."""
    once = round_trip(make_state(2), "int8")
    assert torch.allclose(matrices_of(round_trip(once, "int8")), matrices_of(once), rtol=1e-5)


def make_arena(state_format: StateFormat = "int8") -> ArenaBytes:
    """Two states, then two packed ones, in an arena of two extents for each group."""
    spec = spec_of(((3, 16), (2, 5, 16), (1, 2)), (torch.bfloat16, torch.float32, torch.float32))
    assert state_parts(spec) == PARTS
    packed = LAYERS * PARTS.packed_page_bytes(state_format)
    state = LAYERS * PARTS.page_bytes
    config = SimpleNamespace(
        kv_cache_groups=[SimpleNamespace(kv_cache_spec=_mamba(spec), layer_names=["a", "b", "c"])],
        arena_bytes=6 * state,
        strides=(state, state // 2),
        block_bytes=(state, packed),
        geometry=SimpleNamespace(extent_bytes=state),
        packed=(0,),
        checkpoint_states=state_format,
    )
    return ArenaBytes(cast(Any, config), torch.zeros(6 * state, dtype=torch.uint8))


def _mamba(spec: Any) -> Any:
    from vllm.v1.kv_cache_interface import MambaSpec

    return MambaSpec(block_size=128, shapes=spec.shapes, dtypes=spec.dtypes)


def test_a_worker_packs_relocates_and_unpacks_in_order() -> None:
    """A state is packed although its block is poisoned right after, and the packed one is moved before it is."""
    arena, state = make_arena(), make_state(3)
    arena.block(0, 1).copy_(state)
    source, packed, moved, target = (encode(*place, 2) for place in ((0, 1), (1, 4), (1, 6), (0, 4)))
    arena.apply(
        [
            encode_copy(source, packed),
            encode_poison(0, 1, 2),
            encode_copy(packed, moved),
            encode_poison(1, 4, 2),
            encode_copy(moved, target),
        ]
    )
    assert torch.equal(arena.block(0, 4), round_trip(state, "int8"))
    assert bool((arena.block(0, 1) == HUGE_BYTE).all())
    assert bool((arena.block(1, 4) == HUGE_BYTE).all())


def test_copies_of_whole_states_stay_exact() -> None:
    arena, state = make_arena(), make_state(4)
    arena.block(0, 1).copy_(state)
    arena.copy([(encode(0, 1, 2), encode(0, 2, 2))])
    assert torch.equal(arena.block(0, 2), state)

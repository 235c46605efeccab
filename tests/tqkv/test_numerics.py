"""The numerics of tqkv, without vLLM: codebooks, packing, rotation, codes."""

from __future__ import annotations

from math import ceil, sqrt

import pytest
import torch
from hypothesis import given, settings, strategies as st

from tidepool.tqkv.codebook import lloyd_max
from tidepool.tqkv.codec import HeadCodec, VectorCodec, rotation
from tidepool.tqkv.formats import BITS, FORMATS, Format, packed_bytes
from tidepool.tqkv.packing import pack, unpack

DISTORTION = {2: 0.1175, 3: 0.03454, 4: 0.009497, 8: 4.1e-5}
"""Max (1960), table I, and for 8 bits Panter and Dite's pi sqrt(3) / 2 / 4**8."""
SIZES = (16, 64, 80, 96, 128, 256)

bits = st.sampled_from(BITS)
sizes = st.sampled_from(SIZES)


def vectors(seed: int, count: int, size: int) -> torch.Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


# Formats ----------------------------------------------------------------------------------------------------


def test_a_head_has_odd_bytes() -> None:
    assert len(FORMATS) == 16
    assert FORMATS["tqkv-k4v4"].head_bytes(128, 128) == 64 + 64 + 8
    assert FORMATS["tqkv-k3v2"].head_bytes(80, 80) == 30 + 20 + 8
    assert FORMATS["tqkv-k3v3"].head_bytes(5, 3) == 2 + 2 + 8


# Codebook ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", BITS)
def test_the_codebook_is_lloyd_max(width: int) -> None:
    book = lloyd_max(width)
    assert len(book.levels) == 2**width
    assert book.distortion == pytest.approx(DISTORTION[width], rel=0.01)
    assert torch.equal(book.levels, -book.levels.flip(0)), "as symmetric as the normal distribution"
    # Both conditions of the best quantizer, checked on numbers drawn at random: nearest level, and mean of the cell.
    numbers = vectors(0, 4_000_000, 1).double().flatten()
    cells = torch.bucketize(numbers, book.bounds.double())
    errors = numbers - book.levels.double()[cells]
    assert float(errors.square().mean()) == pytest.approx(book.distortion, rel=0.01)
    sums = torch.zeros(2**width, dtype=torch.float64).index_add(0, cells, errors)
    counts = cells.bincount(minlength=2**width)
    frequent = counts > 10_000
    assert frequent.sum() >= min(2**width, 64)
    assert ((sums / counts)[frequent].abs() * counts[frequent].sqrt() < 6 * errors.std() * 3).all()


@pytest.mark.parametrize("width", BITS)
def test_no_other_levels_do_better(width: int) -> None:
    """A step in any direction makes the expected distortion, integrated numerically, larger."""
    book = lloyd_max(width)
    grid = torch.linspace(-8, 8, 400_001, dtype=torch.float64)
    density = torch.exp(-(grid**2) / 2)

    def distortion(levels: torch.Tensor) -> float:
        cells = torch.bucketize(grid, (levels[1:] + levels[:-1]) / 2)
        return float(((grid - levels[cells]).square() * density).sum() / density.sum())

    levels = book.levels.double()
    least = distortion(levels)
    assert least == pytest.approx(book.distortion, rel=1e-3)
    for seed in range(5):
        step = vectors(seed, 1, 2**width).double().flatten() * levels.diff().min() / 10
        assert distortion(levels + step) > least


# Packing ----------------------------------------------------------------------------------------------------


@given(bits, st.lists(st.integers(0, 255), min_size=1, max_size=70), st.integers(1, 3))
def test_packing_loses_nothing_and_wastes_nothing(width: int, numbers: list[int], rows: int) -> None:
    codes = (torch.tensor([numbers] * rows) + torch.arange(rows).unsqueeze(1)) % 2**width
    packed = pack(codes, width)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, ceil(len(numbers) * width / 8)) == (rows, packed_bytes(len(numbers), width))
    assert torch.equal(unpack(packed, width, len(numbers)).long(), codes)


def test_the_first_code_has_the_lowest_bits() -> None:
    assert pack(torch.tensor([1, 2, 3, 0, 1]), 2).tolist() == [0b00_11_10_01, 1]
    assert pack(torch.tensor([1, 7, 4]), 3).tolist() == [0b00_111_001, 0b1]


# Rotation and codes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_the_rotation_is_orthogonal_and_mixes(size: int) -> None:
    matrix = rotation(size)
    assert torch.allclose(matrix @ matrix.T, torch.eye(size), atol=1e-5)
    assert not torch.equal(matrix, rotation(size, seed=1))
    assert torch.equal(matrix, rotation.__wrapped__(size)), "seeded"
    if size & (size - 1) == 0:
        assert torch.allclose(matrix.abs(), torch.full((size, size), 1 / sqrt(size)))
    else:
        assert matrix.abs().max() < 0.7


def test_the_rotation_does_not_depend_on_what_torch_makes_by_default() -> None:
    """vLLM makes its layers with bfloat16, and sometimes the meta device, for a default."""
    expected = rotation(32)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            made, book = rotation.__wrapped__(32), lloyd_max.__wrapped__(3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(made, expected)
    assert torch.equal(book.levels, lloyd_max(3).levels)


@settings(max_examples=40)
@given(sizes, bits, st.integers(0, 10**6), st.sampled_from([1e-6, 1.0, 3e4]))
def test_vectors_lose_what_theory_says(size: int, width: int, seed: int, length: float) -> None:
    """And not more on average: a norm of their own helps short vectors a little."""
    codec = VectorCodec(size, width)
    given_vectors = vectors(seed, 4096, size) * length
    codes, norms = codec.encode(given_vectors)
    errors = given_vectors - norms.unsqueeze(-1) * codec.levels(codes)
    lost = float(errors.square().sum() / given_vectors.square().sum())
    assert (1 - 5 / size) * 0.95 < lost / codec.book.noise < 1.1


@settings(max_examples=40)
@given(st.sampled_from(list(FORMATS.values())), sizes, st.integers(0, 10**6))
def test_dot_products_survive_the_whole_codec(form: Format, size: int, seed: int) -> None:
    """Whatever the vectors: far from normal ones too, in which a few numbers are much larger than the others."""
    codec = HeadCodec(form, size)
    key, value, query = vectors(seed, 96, size).square().mul(torch.linspace(0, 3, size)).view(3, 32, size)
    coded = codec.encode(key, value)
    assert coded.shape == (32, codec.bytes)
    assert coded.dtype == torch.uint8
    key_norms, value_norms = codec.norms(coded)
    scores = (query @ codec.rotation) @ (key_norms.unsqueeze(-1) * codec.key_levels(coded)).T
    distances = (scores - query @ key.T).square().mean()
    expected = query.square().sum(-1).mean() * key.square().sum(-1).mean() * codec.keys.book.noise / size
    assert distances < 4 * expected, "some directions are unlucky, but not all"
    own = torch.einsum("nd,nd->n", key @ codec.rotation, key_norms.unsqueeze(-1) * codec.key_levels(coded))
    assert torch.allclose(own, key.square().sum(-1), rtol=1e-4), "a query along a key gets its whole score"
    back = value_norms.unsqueeze(-1) * codec.value_levels(coded) @ codec.rotation.T
    assert (back - value).square().sum() < 1.5 * codec.values.book.noise * value.square().sum()


def test_zeros_stay_zeros_and_axes_are_exact() -> None:
    """A vector along an axis is rotated to numbers of one size, which one norm can meet."""
    codec = HeadCodec(FORMATS["tqkv-k2v2"], 64)
    axes = torch.cat([torch.zeros(1, 64), torch.eye(64) * 100])
    coded = codec.encode(axes.bfloat16(), axes.bfloat16())
    key_norms, value_norms = codec.norms(coded)
    assert key_norms[0] == value_norms[0] == 0
    back = key_norms.unsqueeze(-1) * codec.key_levels(coded) @ codec.rotation.T
    assert torch.allclose(back, axes, atol=1e-3)

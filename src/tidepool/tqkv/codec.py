"""Keys and values to bytes and back: a random rotation, scalar codes of its numbers, one norm.

The numbers of a rotated vector are close to normally distributed whatever the vector (TurboQuant, arXiv 2504.19874), so
one codebook fits all. Dot products don't change when both sides are rotated: attention is computed between rotated
vectors, and only queries and outputs are ever turned.
"""

from __future__ import annotations

from functools import cache
from math import sqrt

import torch

from tidepool.tqkv.codebook import lloyd_max
from tidepool.tqkv.formats import NORM_BYTES, Format, packed_bytes
from tidepool.tqkv.packing import pack, unpack

SEED = 0
"""Of the rotation: caches are never exchanged between processes, but equal runs should give equal outputs."""

_TINY = torch.finfo(torch.float32).tiny


@cache
def rotation(size: int, seed: int = SEED) -> torch.Tensor:
    """A random orthogonal matrix, ``[size, size]`` float32; ``x @ rotation`` is x rotated.

    Random signs and a Walsh-Hadamard matrix where ``size`` is a power of two, else the Q of a normal random matrix.
    """
    # vLLM makes layers with other types and devices for a default.
    random = torch.Generator("cpu").manual_seed(seed)
    if size & (size - 1):
        normal = torch.randn(size, size, generator=random, dtype=torch.float64, device="cpu")
        return torch.linalg.qr(normal).Q.float()
    matrix = torch.ones(1, 1, dtype=torch.float32, device="cpu")
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    signs = torch.randint(2, (size, 1), generator=random, device="cpu") * 2 - 1
    return signs * matrix / sqrt(size)


class VectorCodec:
    """Rotated vectors of ``size`` numbers as codes of ``bits`` bits and a norm."""

    def __init__(self, size: int, bits: int) -> None:
        self.size, self.bits = size, bits
        self.book = lloyd_max(bits)
        self.bytes = packed_bytes(size, bits)

    def encode(self, rotated: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Code vectors.

        Args:
            rotated: ``[..., size]`` float32.

        Returns:
            Packed codes, ``[..., bytes]`` uint8, and norms, ``[...]`` float32: what to multiply the levels by so that
            the error is at right angles to the vector. Plain lengths would make every score and every output smaller
            by the distortion; this makes them right on average, as in RaBitQ (arXiv 2405.12497). A vector of zeros
            has norm 0.
        """
        spread = rotated.norm(dim=-1, keepdim=True) / sqrt(self.size)
        codes = torch.bucketize(rotated / spread.clamp_min(_TINY), self.book.bounds)
        levels = self.book.levels[codes]
        along = (rotated * levels).sum(-1).clamp_min(_TINY)  # no product is negative
        return pack(codes, self.bits), rotated.square().sum(-1) / along

    def levels(self, packed: torch.Tensor) -> torch.Tensor:
        """The coded vectors before their norms: ``[..., size]`` float32."""
        codes = unpack(packed, self.bits, self.size)
        return self.book.levels.index_select(0, codes.flatten()).view(codes.shape)


class HeadCodec:
    """What one KV head keeps for one token: key codes, value codes, key norm, value norm; ``bytes`` in all."""

    def __init__(self, form: Format, size: int) -> None:
        self.keys, self.values = VectorCodec(size, form.key_bits), VectorCodec(size, form.value_bits)
        self.bytes = form.head_bytes(size, size)
        self.rotation = rotation(size)

    def encode(self, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Keys and values ``[..., size]`` of any float type to ``[..., bytes]`` uint8."""
        key_codes, key_norms = self.keys.encode(key.float() @ self.rotation)
        value_codes, value_norms = self.values.encode(value.float() @ self.rotation)
        norms = torch.stack([key_norms, value_norms], -1).view(torch.uint8)
        return torch.cat([key_codes, value_codes, norms], -1)

    def key_levels(self, packed: torch.Tensor) -> torch.Tensor:
        """The rotated keys before their norms: ``[..., bytes]`` to ``[..., size]`` float32."""
        return self.keys.levels(packed[..., : self.keys.bytes])

    def value_levels(self, packed: torch.Tensor) -> torch.Tensor:
        """The rotated values before their norms: ``[..., bytes]`` to ``[..., size]`` float32."""
        return self.values.levels(packed[..., self.keys.bytes : -2 * NORM_BYTES])

    def norms(self, packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Norms of keys and of values, ``[...]`` float32 each. In a page they lie at any byte, so they are copied."""
        whole = packed[..., -2 * NORM_BYTES :].clone(memory_format=torch.contiguous_format)
        keys, values = whole.view(torch.float32).unbind(-1)
        return keys, values

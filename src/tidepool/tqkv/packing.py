"""Codes of a few bits side by side in bytes, with no waste beyond whole bytes."""

from __future__ import annotations

import torch

from tidepool.tqkv.formats import packed_bytes

_GROUP = 8
"""So many codes fill whole bytes, as many as a code has bits."""


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes.

    Args:
        codes: ``[..., n]`` integers below ``2**bits``.
        bits: 1 to 4, or 8.

    Returns:
        ``[..., ceil(n * bits / 8)]`` uint8; the first code is in the lowest bits of the first byte.
    """
    if bits == 8:
        return codes.to(torch.uint8)
    count = codes.shape[-1]
    groups = torch.nn.functional.pad(codes.int(), (0, -count % _GROUP)).unflatten(-1, (-1, _GROUP))
    words = (groups << (bits * torch.arange(_GROUP, dtype=torch.int32))).sum(-1, dtype=torch.int32)
    filled = words.unsqueeze(-1) >> (8 * torch.arange(bits, dtype=torch.int32)) & 0xFF
    return filled.flatten(-2)[..., : packed_bytes(count, bits)].to(torch.uint8)


def unpack(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The first ``count`` codes of ``packed``, as `pack` made it: ``[..., count]`` int32."""
    if bits == 8:
        return packed.int()
    filled = torch.nn.functional.pad(packed.int(), (0, -packed.shape[-1] % bits)).unflatten(-1, (-1, bits))
    words = (filled << (8 * torch.arange(bits, dtype=torch.int32))).sum(-1, dtype=torch.int32)
    codes = words.unsqueeze(-1) >> (bits * torch.arange(_GROUP, dtype=torch.int32)) & ((1 << bits) - 1)
    return codes.flatten(-2)[..., :count]

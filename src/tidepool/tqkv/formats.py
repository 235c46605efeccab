"""The formats and their sizes; needs neither torch nor vLLM."""

from __future__ import annotations

from dataclasses import dataclass

BITS = (2, 3, 4, 8)
"""Bits of one number that keys and values can have, apart from each other."""
NORM_BYTES = 4
"""A norm is an fp32 number."""


@dataclass(frozen=True)
class Format:
    """How a KV head keeps one token."""

    key_bits: int
    value_bits: int

    @property
    def name(self) -> str:
        """As users write it: ``tqkv-k4v4``."""
        return f"tqkv-k{self.key_bits}v{self.value_bits}"

    def head_bytes(self, key_size: int, value_size: int) -> int:
        """Bytes that one KV head keeps for one token: codes of the key, codes of the value, two norms."""
        return packed_bytes(key_size, self.key_bits) + packed_bytes(value_size, self.value_bits) + 2 * NORM_BYTES


def packed_bytes(numbers: int, bits: int) -> int:
    """Bytes of ``numbers`` codes of ``bits`` bits side by side."""
    return -(-numbers * bits // 8)


FORMATS = {each.name: each for each in (Format(key, value) for key in BITS for value in BITS)}
"""Name to format."""

"""Where the parts of a layer's state lie in its page, and in its page once packed.

A page holds the tensors that vLLM's MambaSpec names, one behind the other: the convolution's inputs, then the recurrent
matrices of all heads, and with some ways to draft more behind them. A packed page holds the matrices first, all rows of
them, then the scales of the rows if there are any, then everything else as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch

from tidepool.cache import SCALE_BYTES, StateFormat, packed_page_bytes

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import MambaSpec


@dataclass(frozen=True)
class StateParts:
    """One layer's state. Sizes are bytes, but for rows and numbers."""

    before: int
    """Bytes before the recurrent matrices."""
    rows: int
    """Rows of all heads' matrices; 0 where there are none, as in a short convolution."""
    numbers: int
    """Numbers in a row."""
    dtype: torch.dtype
    """Of these."""
    after: int
    """Bytes behind them."""

    @property
    def matrix_bytes(self) -> int:
        """Of the recurrent matrices."""
        return self.rows * self.numbers * self.dtype.itemsize

    @property
    def page_bytes(self) -> int:
        """Of the state as it runs."""
        return self.before + self.matrix_bytes + self.after

    def packed_page_bytes(self, state_format: StateFormat) -> int:
        """Of the state as it is cached; 0 where the format doesn't make it smaller."""
        return packed_page_bytes(
            state_format,
            rest=self.before + self.after,
            rows=self.rows,
            numbers=self.numbers,
            number_bytes=self.dtype.itemsize,
        )


def state_parts(spec: MambaSpec) -> StateParts:
    """The parts of the state of one layer with this spec."""
    sizes = [prod(shape) * dtype.itemsize for shape, dtype in zip(spec.shapes, spec.dtypes, strict=True)]
    # The matrices are what follows a convolution, or all of it in linear attention; a short convolution has none.
    index = 1 if len(spec.shapes) > 1 else 0
    shape, dtype = spec.shapes[index], spec.dtypes[index]
    if not dtype.is_floating_point or (index == 0 and len(shape) < 3):
        return StateParts(sum(sizes), 0, 0, dtype, 0)
    return StateParts(sum(sizes[:index]), prod(shape[:-1]), shape[-1], dtype, sum(sizes[index + 1 :]))


class StatePacker:
    """Packs and unpacks the states of one group's blocks.

    Args:
        parts: of one layer; all layers of the group are alike.
        layers: how many there are.
        state_format: of packed states; not ``same``.
    """

    def __init__(self, parts: StateParts, layers: int, state_format: StateFormat) -> None:
        self._parts = parts
        self._layers = layers
        self._format = state_format
        self._packed_page = parts.packed_page_bytes(state_format)

    def pack(self, state: torch.Tensor, packed: torch.Tensor) -> None:
        """Round a state.

        Args:
            state: a block of the group as bytes, ``layers x page_bytes``.
            packed: a block of its packed states as bytes; filled.
        """
        matrices, *rest = self._state(state)
        codes, scales, *packed_rest = self._packed(packed)
        if scales is None:
            codes.copy_(matrices)
        else:
            rows = matrices.to(torch.float32)
            largest = rows.abs().amax(-1, keepdim=True)
            scales.copy_(largest / 127)
            # A row of zeros has no scale, and no codes.
            codes.copy_((rows * (127 / largest.clamp(min=torch.finfo(torch.float32).tiny))).round_().clamp_(-127, 127))
        for target, source in zip(packed_rest, rest, strict=True):
            target.copy_(source)

    def unpack(self, packed: torch.Tensor, state: torch.Tensor) -> None:
        """Make a state that kernels can read of a packed one; arguments as for `pack`."""
        matrices, *rest = self._state(state)
        codes, scales, *packed_rest = self._packed(packed)
        matrices.copy_(codes if scales is None else codes * scales)
        for target, source in zip(rest, packed_rest, strict=True):
            target.copy_(source)

    def _state(self, block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(matrices of shape ``layers, rows, numbers``, bytes before them, bytes behind them) of a block."""
        parts = self._parts
        pages = block.view(self._layers, parts.page_bytes)
        before, matrices, after = pages.split((parts.before, parts.matrix_bytes, parts.after), dim=1)
        shape = self._layers, parts.rows, parts.numbers
        return matrices.view(parts.dtype).view(shape), before, after

    def _packed(self, block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """(numbers of shape ``layers, rows, numbers``, scales of shape ``layers, rows, 1`` if there are any, bytes from
        before the matrices, bytes from behind them) of a packed block."""
        parts = self._parts
        dtype = torch.int8 if self._format == "int8" else torch.bfloat16
        scales = parts.rows * SCALE_BYTES if self._format == "int8" else 0
        sizes = [parts.rows * parts.numbers * dtype.itemsize, scales, parts.before, parts.after]
        pages = block.view(self._layers, self._packed_page)
        codes, row_scales, before, after, _ = pages.split((*sizes, self._packed_page - sum(sizes)), dim=1)
        shape = self._layers, parts.rows
        return (
            codes.view(dtype).view(*shape, parts.numbers),
            row_scales.view(torch.float32).view(*shape, 1) if scales else None,
            before,
            after,
        )

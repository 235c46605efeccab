"""In which format states are kept that are only cached.

A running state is mostly matrices of 32-bit numbers, and the cache holds many states for each that runs. What a cached
one loses by rounding is lost once, when it is packed; kernels only see it unpacked.
"""

from __future__ import annotations

from typing import Literal, get_args

StateFormat = Literal["same", "bfloat16", "int8"]
"""``same`` as running states; their matrices in ``bfloat16``; or in ``int8`` with a scale for each row. The
convolution's part, which is small, is always kept as it is."""
STATE_FORMATS: tuple[StateFormat, ...] = get_args(StateFormat)
SCALE_BYTES = 4
"""Of a row's scale, a 32-bit float."""
PAGE_ALIGN = 16
"""A packed page is a multiple of so many bytes, so that its parts lie well for loads."""


def packed_page_bytes(state_format: StateFormat, *, rest: int, rows: int, numbers: int, number_bytes: int) -> int:
    """Bytes of one layer's packed state; 0 where it isn't packed.

    That is where the format saves less than an eighth, which isn't worth a group, and where the numbers end at a place
    where scales can't begin.

    ``rows x numbers x 1 + rows x 4`` for int8, ``rows x numbers x 2`` for bfloat16, and the rest as it is, rounded up
    to 16 bytes.

    Args:
        state_format: the format.
        rest: bytes of what isn't packed.
        rows: rows of the recurrent matrices of all heads.
        numbers: numbers in a row.
        number_bytes: bytes of one as it runs.
    """
    if rows * numbers % SCALE_BYTES:
        return 0
    row_bytes = {"same": numbers * number_bytes, "bfloat16": 2 * numbers, "int8": numbers + SCALE_BYTES}[state_format]
    packed = -(-(rest + rows * row_bytes) // PAGE_ALIGN) * PAGE_ALIGN
    return packed if 8 * packed <= 7 * (rest + rows * numbers * number_bytes) else 0

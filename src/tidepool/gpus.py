"""The cards that plans and clocks know by name."""

from __future__ import annotations

from dataclasses import dataclass

from tidepool.command_line import UsageError


@dataclass(frozen=True)
class Gpu:
    """A card: its memory as its driver reports it, and its published peaks."""

    mib: int
    flops: float
    """Dense bfloat16 operations a second."""
    bandwidth: float
    """Bytes of its memory a second."""

    @property
    def total_bytes(self) -> int:
        """Its memory."""
        return self.mib << 20


GPUS = {
    "4090": Gpu(24_564, 165.2e12, 1_008e9),
    "5090": Gpu(32_607, 209.5e12, 1_792e9),
    "L40S": Gpu(46_068, 362.1e12, 864e9),
    "A100-80": Gpu(81_920, 312e12, 2_039e9),
    "H100": Gpu(81_559, 989.4e12, 3_350e9),
    "H200": Gpu(143_771, 989.4e12, 4_800e9),
    "B200": Gpu(183_359, 2_250e12, 7_700e9),
}


def find_gpu(name: str, hint: str = "") -> tuple[str, Gpu]:
    """A card by name, in any case, and its name as `GPUS` has it.

    Args:
        name: as a user wrote it.
        hint: what else there is to do, for the message of the error.

    Raises:
        UsageError: the card is unknown.
    """
    for known, gpu in GPUS.items():
        if known.lower() == name.lower():
            return known, gpu
    raise UsageError(f"There is no GPU {name!r} in the list: choose from {', '.join(GPUS)}{hint}.")

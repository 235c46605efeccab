"""The cards that plans and clocks know by name."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tidepool.command_line import UsageError


@dataclass(frozen=True)
class Gpu:
    """A card: what its runtime says that programs may use of its memory, and its published peaks."""

    gib: float
    """GiB that ``cudaMemGetInfo`` tells as the total, which is what vLLM starts from; less than the driver tells."""
    flops: float
    """Dense bfloat16 operations a second."""
    bandwidth: float
    """Bytes of its memory a second."""
    unified: bool = False
    """Whether processor and card share this memory."""
    many: bool = False
    """Whether vLLM takes it for one that serves many: more requests at once and longer steps by default."""
    graph_tokens: int = 512
    """Tokens of the largest CUDA graph that vLLM captures by default."""
    blackwell: bool = False
    """Whether vLLM runs experts with FlashInfer's CUTLASS kernels there."""

    @property
    def total_bytes(self) -> int:
        """Its memory."""
        return int(self.gib * (1 << 30))


GPUS = {
    "3090": Gpu(23.56, 71e12, 936e9),
    "4080": Gpu(15.58, 97.5e12, 717e9),
    "4090": Gpu(23.52, 165.2e12, 1_008e9),
    "5090": Gpu(31.36, 209.5e12, 1_792e9, blackwell=True),
    "L4": Gpu(22.04, 121e12, 300e9),
    "L40S": Gpu(44.39, 362.1e12, 864e9),
    "A6000": Gpu(47.41, 154.8e12, 768e9),
    "RTX-PRO-6000": Gpu(94.97, 503.8e12, 1_792e9, many=True, blackwell=True),
    "A100-40": Gpu(39.49, 312e12, 1_555e9),
    "A100-80": Gpu(79.25, 312e12, 2_039e9),
    "A800": Gpu(79.25, 312e12, 2_039e9, many=True),
    "H100": Gpu(79.19, 989.4e12, 3_350e9, many=True),
    "H100-NVL": Gpu(93.10, 835e12, 3_900e9, many=True),
    "H200": Gpu(139.81, 989.4e12, 4_800e9, many=True),
    "B200": Gpu(178.35, 2_250e12, 7_700e9, many=True, graph_tokens=1024, blackwell=True),
    "B300": Gpu(267.69, 2_250e12, 8_000e9, many=True, graph_tokens=1024, blackwell=True),
    "GB10": Gpu(121.69, 125e12, 273e9, unified=True, many=True, blackwell=True),
    "MI300X": Gpu(191.69, 1_307.4e12, 5_300e9, many=True),
    "MI355X": Gpu(287.98, 2_516.6e12, 8_000e9, many=True),
}

_OTHER_NAMES = {
    "a100": "A100-80",
    "spark": "GB10",
    "dgxspark": "GB10",
    "mi355": "MI355X",
    "pro6000": "RTX-PRO-6000",
    "6000pro": "RTX-PRO-6000",
    "rtx6000pro": "RTX-PRO-6000",
    "pro6000blackwell": "RTX-PRO-6000",
}
_DECORATION = re.compile(
    r"nvidia|geforce|amd|instinct|tesla|rtx|sxm\d?|pcie|hbm\d?e?|blackwell|workstationedition|edition"
)
_SIZE = re.compile(r"(?<=\d)(gib|gb|g)$")


def find_gpu(name: str, hint: str = "") -> tuple[str, Gpu]:
    """A card by name, and its name as `GPUS` has it.

    Spellings in use are known: in any case, with or without maker, series, socket and ``GB`` (``NVIDIA GeForce RTX
    4090``, ``h100-sxm``, ``A100 80GB PCIe``).

    Args:
        name: as a user wrote it.
        hint: what else there is to do, for the message of the error.

    Raises:
        UsageError: the card is unknown.
    """
    wanted = _plain(name)
    for known, gpu in GPUS.items():
        if wanted and wanted in (_plain(known), f"{_plain(known)}{_nominal(gpu)}"):
            return known, gpu
    if wanted in _OTHER_NAMES:
        known = _OTHER_NAMES[wanted]
        return known, GPUS[known]
    raise UsageError(f"There is no GPU {name!r} in the list: choose from {', '.join(GPUS)}{hint}.")


def _plain(name: str) -> str:
    letters = re.sub(r"[^a-z0-9]", "", name.lower())
    return _SIZE.sub("", _DECORATION.sub("", letters)) or letters


def _nominal(gpu: Gpu) -> int:
    """The size that it is sold by, in GB, as far as its name may carry it."""
    sizes = (16, 24, 32, 40, 48, 80, 94, 96, 128, 141, 180, 192, 288)
    return min((size for size in sizes if size >= gpu.gib), default=0)

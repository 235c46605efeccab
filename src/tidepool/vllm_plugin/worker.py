"""Seam 3: what workers do to whole blocks between steps, and how they are told.

The scheduler's lists of block ids (to zero, to copy) don't say which group an id is of. Here an id is unique over the
groups, ``block x groups + group``, and negative numbers stand for poisoning. Workers see the arena as bytes, so one
operation covers a block with all its layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from tidepool.vllm_plugin.planning import TidepoolKVCacheConfig

# Both are bytes repeated: 0xff.. is NaN in every float format, 0x7f7f.. the largest finite bfloat16 and
# a huge float32. A NaN in a state would turn every output into NaN, huge values show which part was read.
NAN_BYTE, HUGE_BYTE = 0xFF, 0x7F


def encode(group: int, block: int, groups: int) -> int:
    """The id of a block that is unique over all groups."""
    return block * groups + group


def decode(unique: int, groups: int) -> tuple[int, int]:
    """(group, block) of a unique id."""
    block, group = divmod(unique, groups)
    return group, block


def encode_poison(group: int, block: int, groups: int) -> int:
    """The order to poison a block."""
    return -1 - 2 * encode(group, block, groups)


def encode_poison_extent(group: int, extent: int, groups: int) -> int:
    """The order to poison an extent with the poison of the group that receives it."""
    return -2 - 2 * encode(group, extent, groups)


class ArenaBytes:
    """The whole arena of one worker as a flat byte tensor, and where blocks lie in it.

    Args:
        config: the worker's KV cache configuration.
        any_view: the KV cache of any layer; all views share the arena's storage.
    """

    def __init__(self, config: TidepoolKVCacheConfig, any_view: torch.Tensor) -> None:
        from vllm.v1.kv_cache_interface import MambaSpec

        arena = torch.empty(0, dtype=torch.uint8, device=any_view.device).set_(any_view.untyped_storage())
        self.arena = arena[: config.arena_bytes]
        self.strides = config.strides
        self.block_bytes = config.block_bytes
        self.extent_bytes = config.geometry.extent_bytes if config.geometry else 0
        self.poison = [
            HUGE_BYTE if isinstance(group.kv_cache_spec, MambaSpec) else NAN_BYTE for group in config.kv_cache_groups
        ]

    def block(self, group: int, block: int) -> torch.Tensor:
        """A block's bytes, all layers."""
        start = block * self.strides[group]
        return self.arena[start : start + self.block_bytes[group]]

    def apply(self, operations: Iterable[int]) -> None:
        """Zero and poison blocks in the order given."""
        groups = len(self.strides)
        for operation in operations:
            if operation >= 0:
                self.block(*decode(operation, groups)).zero_()
            elif operation % 2:
                group, block = decode((-1 - operation) // 2, groups)
                self.block(group, block).fill_(self.poison[group])
            else:
                group, extent = decode((-2 - operation) // 2, groups)
                start = extent * self.extent_bytes
                self.arena[start : start + self.extent_bytes].fill_(self.poison[group])

    def copy(self, copies: Iterable[Sequence[int]]) -> None:
        """Copy blocks; each pair (source, target) of unique ids is of one group. No target is a source."""
        groups = len(self.strides)
        for source, target in copies:
            self.block(*decode(target, groups)).copy_(self.block(*decode(source, groups)))


def arena_bytes_of(runner: Any) -> ArenaBytes | None:
    """The arena of a model runner that tidepool serves, else None. Made anew when the runner's KV cache is."""
    from tidepool.vllm_plugin.planning import TidepoolKVCacheConfig

    config = runner.kv_cache_config
    if not isinstance(config, TidepoolKVCacheConfig):
        return None
    cached = getattr(runner, "_tidepool_arena", None)
    if cached is None or cached[0] is not config:
        cached = runner._tidepool_arena = (config, ArenaBytes(config, runner.kv_caches[0]))
    arena: ArenaBytes = cached[1]
    return arena

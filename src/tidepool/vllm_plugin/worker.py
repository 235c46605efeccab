"""Seam 3: what workers do to whole blocks between steps, and how they are told.

The scheduler's lists of block ids (to zero, to copy) don't say which group an id is of. Here an id is unique over the
groups, ``block x groups + group``. In the list of ids to zero, which workers go through before anything else in a step,
negative numbers stand for poisoning and huge ones for copies. Workers see the arena as bytes, so one operation covers a
block with all its layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from tidepool.vllm_plugin.state_parts import StatePacker, state_parts

if TYPE_CHECKING:
    from tidepool.vllm_plugin.planning import TidepoolKVCacheConfig
    from tidepool.vllm_plugin.serving_plan import ServingPlan

# Both are bytes repeated: 0xff.. is NaN in every float format, 0x7f7f.. the largest finite bfloat16 and
# a huge float32. A NaN in a state would turn every output into NaN, huge values show which part was read.
NAN_BYTE, HUGE_BYTE = 0xFF, 0x7F
_ID_BITS = 30
_COPY = 1 << 2 * _ID_BITS
"""Added to orders to copy, which makes them larger than any id."""


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


def encode_copy(source: int, target: int) -> int:
    """The order to copy a block to another one of its group, or to pack or unpack a state: the ids of both."""
    assert max(source, target) < 1 << _ID_BITS
    return _COPY | source << _ID_BITS | target


def _source_and_target(operation: int) -> tuple[int, int]:
    """The ids in an order to copy."""
    return (operation ^ _COPY) >> _ID_BITS, operation & ((1 << _ID_BITS) - 1)


def _kind(operation: int, groups: int) -> tuple[bool, bool, int]:
    """(whether it poisons, whether it is on a whole extent, the group) of an order."""
    poison, whole_extent = operation < 0, operation < 0 and operation % 2 == 0
    return poison, whole_extent, decode(_unique(operation), groups)[0]


def _index(operation: int, groups: int) -> int:
    """The block or the extent that an order names."""
    return decode(_unique(operation), groups)[1]


def _unique(operation: int) -> int:
    return operation if operation >= 0 else (-1 - operation) // 2


def _indices(numbers: list[int], device: torch.device) -> torch.Tensor:
    """The numbers on a device, sent there without waiting for it."""
    from vllm.utils.torch_utils import async_tensor_h2d

    return async_tensor_h2d(numbers, device=device, dtype=torch.int64)


class ArenaBytes:
    """The whole arena of one worker as a flat byte tensor, and where blocks lie in it.

    Args:
        config: the worker's KV cache configuration.
        any_view: the KV cache of any layer; all views share the arena's storage. None on a pipeline stage without any.
    """

    def __init__(self, config: TidepoolKVCacheConfig, any_view: torch.Tensor | None) -> None:
        from vllm.v1.kv_cache_interface import MambaSpec

        self.arena = torch.empty(0, dtype=torch.uint8)
        if any_view is not None:
            arena = torch.empty(0, dtype=torch.uint8, device=any_view.device).set_(any_view.untyped_storage())
            self.arena = arena[: config.arena_bytes]
        self.strides = config.strides
        self.block_bytes = config.block_bytes
        self.extent_bytes = config.geometry.extent_bytes if config.geometry else 0
        specs = [group.kv_cache_spec for group in config.kv_cache_groups]
        self.poison = [HUGE_BYTE if isinstance(spec, MambaSpec) else NAN_BYTE for spec in specs]
        self.poison += [HUGE_BYTE] * len(config.packed)
        self.packers = {
            (group, number): StatePacker(
                state_parts(specs[group]), len(config.kv_cache_groups[group].layer_names), config.checkpoint_states
            )
            for number, group in enumerate(config.packed, len(specs))
        }
        """By (group of states, group of its packed states)."""

    def block(self, group: int, block: int) -> torch.Tensor:
        """A block's bytes, all layers."""
        start = block * self.strides[group]
        return self.arena[start : start + self.block_bytes[group]]

    def apply(self, operations: Iterable[int]) -> None:
        """Zero, poison, copy, pack and unpack blocks in the order given.

        Neighbours of one kind and group are zeroed or poisoned at once: on a GPU every operation costs a launch, and a
        long prompt brings hundreds of new blocks.
        """
        for is_copy, some in groupby(operations, lambda each: each >= _COPY):
            if is_copy:
                self.copy(_source_and_target(each) for each in some)
            else:
                self._fill(some)

    def _fill(self, operations: Iterable[int]) -> None:
        """Zero and poison blocks in the order given."""
        groups = len(self.strides)
        for (poison, whole_extents, group), same in groupby(operations, lambda each: _kind(each, groups)):
            if not self.block_bytes[group]:
                continue  # a pipeline stage without the group's layers
            if whole_extents:
                rows = self._rows(self.extent_bytes, self.extent_bytes)
            else:
                rows = self._rows(self.strides[group], self.block_bytes[group])
            byte = self.poison[group] if poison else 0
            word = int.from_bytes(bytes([byte]) * rows.itemsize, "little", signed=rows.dtype.is_signed)
            rows.index_fill_(0, _indices([_index(each, groups) for each in same], rows.device), word)

    def zero_block_ids(self, block_ids: list[int]) -> None:
        """`apply`, by the name that vLLM's second model runner calls its zeroing kernel by."""
        self.apply(block_ids)

    def warmup(self, num_kv_blocks: int) -> None:
        """Nothing to compile; vLLM's second model runner asks."""

    def _rows(self, stride: int, length: int) -> torch.Tensor:
        """The first ``length`` bytes of every ``stride`` bytes, in integers as wide as both allow."""
        dtype = torch.uint8 if (stride | length) % 8 else torch.int64
        words = self.arena[: self.arena.numel() // dtype.itemsize * dtype.itemsize].view(dtype)
        stride, length = stride // dtype.itemsize, length // dtype.itemsize
        return words.as_strided(((words.numel() - length) // stride + 1, length), (stride, 1))

    def copy(self, copies: Iterable[Sequence[int]]) -> None:
        """Copy blocks, in this order; each pair (source, target) of unique ids is of one group, or packs or unpacks a
        state."""
        groups = len(self.strides)
        for source, target in ((decode(each[0], groups), decode(each[1], groups)) for each in copies):
            if not self.block_bytes[source[0]]:
                continue  # a pipeline stage without the group's layers
            blocks = self.block(*source), self.block(*target)
            if source[0] == target[0]:
                blocks[1].copy_(blocks[0])
            elif packer := self.packers.get((source[0], target[0])):
                packer.pack(*blocks)
            else:
                self.packers[target[0], source[0]].unpack(*blocks)


def arena_bytes_of(runner: Any) -> ArenaBytes | None:
    """The arena of a model runner that tidepool serves, else None. Made anew when the runner's KV cache is."""
    from tidepool.vllm_plugin.planning import TidepoolKVCacheConfig

    config = runner.kv_cache_config
    if not isinstance(config, TidepoolKVCacheConfig):
        return None
    cached = getattr(runner, "_tidepool_arena", None)
    if cached is None or cached[0] is not config:
        cached = runner._tidepool_arena = (config, ArenaBytes(config, next(iter(runner.kv_caches), None)))
    arena: ArenaBytes = cached[1]
    return arena


def states_within_steps(vllm_config: Any, plan: ServingPlan, spec: Any, batch: Any, rows: list[int]) -> Any:
    """Where this step saves states inside prompts that it reads to the end, as the scheduler has it.

    Args:
        vllm_config: vLLM's configuration of the engine.
        plan: the engine's plan.
        spec: the MambaSpec of the group.
        batch: vLLM's CommonAttentionMetadata of the step.
        rows: those of its requests whose prompts are being read.

    Returns:
        vLLM's MambaPrefillCheckpointMetadata; None if no state is saved.
    """
    from vllm.utils.torch_utils import async_tensor_h2d
    from vllm.v1.attention.backends.utils import NULL_BLOCK_ID

    from tidepool.vllm_plugin.planning import checkpoint_rules
    from tidepool.vllm_plugin.versions import checkpoint_metadata, hash_lookahead_of

    cache_config, speculative = vllm_config.cache_config, vllm_config.speculative_config
    unit = cache_config.cache_hit_alignment_tokens
    if cache_config.mamba_cache_mode != "align" or not spec.num_prefill_checkpoint_blocks or unit is None:
        return None
    drafter = speculative is not None and speculative.use_eagle_block_drop() and not hash_lookahead_of(vllm_config)
    rules = checkpoint_rules([spec], unit=unit, spacing=plan.checkpoint_tokens, drafter=drafter)
    lengths = batch.query_start_loc_cpu.diff().tolist()
    ends = batch.seq_lens_cpu_upper_bound.tolist()
    places = [rules.place_within(ends[row] - lengths[row], ends[row]) for row in rows]
    if not any(places):
        return None
    offsets = [place and place - (ends[row] - lengths[row]) for place, row in zip(places, rows, strict=True)]
    columns = [-(-ends[row] // spec.block_size) - 2 if place else -1 for place, row in zip(places, rows, strict=True)]
    device = batch.query_start_loc.device
    row_indices, column_indices = _indices(rows, device), _indices(columns, device)
    blocks = batch.block_table_tensor[row_indices, column_indices]
    return checkpoint_metadata(
        async_tensor_h2d(offsets, dtype=torch.int32, device=device),
        torch.where(column_indices >= 0, blocks, NULL_BLOCK_ID),
        offsets=offsets,
        query_lens=[lengths[row] for row in rows],
        request_rows=row_indices,
        block_cols=column_indices,
    )


def limit_requests(runner: Any, config: TidepoolKVCacheConfig) -> None:
    """Lower max_num_seqs to the requests whose states fit in the memory; the log block at start says so.

    More requests can't run at once. vLLM captures CUDA graphs of decode steps for up to max_num_seqs of them, and its
    kernels take no batch larger than the states that there are.
    """
    from tidepool.vllm_plugin.planning import requests_with_states

    scheduler_config = runner.vllm_config.scheduler_config
    # vLLM calls this for a small KV cache first, to measure what CUDA graphs take.
    asked = runner.__dict__.setdefault("_tidepool_max_num_seqs", scheduler_config.max_num_seqs)
    scheduler_config.max_num_seqs = max(1, min(asked, requests_with_states(config)))

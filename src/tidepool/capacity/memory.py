"""KV memory, divided: how many blocks of which group fit, whoever divides it.

`Memory` answers every question about capacity from one test, "do these blocks fit?", which each way of
dividing the memory answers exactly as its allocator would: whole extents (elastic), a share for each group
(fixed), one pool of equal blocks (stock vLLM).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from tidepool.cache import FullAttention, LayerCache, State
from tidepool.sides import Side


@dataclass(frozen=True)
class PlannedGroup:
    """A group and its block, in bytes on one device: ``natural + page_padding + group_padding = stride``."""

    label: str
    """``state``, ``attention`` or ``window``."""
    cache: LayerCache
    layers: int
    block_tokens: int
    """Tokens of a block of attention."""
    token_bytes: int
    """Bytes of one token in all layers together; 0 for a state."""
    natural_bytes: int
    """Bytes of a block that holds nothing but its tokens or its state."""
    page_padding: int
    """Bytes of a block that only make its page larger."""
    group_padding: int
    """Bytes of a block that belong to layers that the group doesn't have."""
    blocks: int
    """Blocks that the group may hold if every other group is empty."""

    @property
    def stride(self) -> int:
        """Bytes that a block takes."""
        return self.natural_bytes + self.page_padding + self.group_padding

    @property
    def padding(self) -> float:
        """Share of the block that holds nothing, 0 to 1."""
        return 1 - self.natural_bytes / self.stride if self.stride else 0.0

    def blocks_for(self, tokens: int) -> int:
        """Blocks that a request of ``tokens`` tokens holds."""
        return self.cache.blocks_for(tokens, self.block_tokens)


@dataclass(frozen=True)
class Memory(ABC):
    """One device's KV memory, divided."""

    budget_bytes: int
    groups: tuple[PlannedGroup, ...]
    max_num_seqs: int
    max_model_len: int

    @property
    @abstractmethod
    def kind(self) -> Side:
        """Who divides it."""

    @property
    @abstractmethod
    def unit_bytes(self) -> int:
        """Bytes of what changes hands: an extent, or a block of the pool; 0 where nothing does."""

    @property
    @abstractmethod
    def units(self) -> int:
        """How many of them there are, the null one included."""

    @property
    @abstractmethod
    def overhead_bytes(self) -> int:
        """Bytes that no request can have: the null block or extent, and what is left over from the budget."""

    @abstractmethod
    def fits(self, blocks: Sequence[int]) -> bool:
        """Whether ``blocks[g]`` blocks of every group g fit together."""

    @abstractmethod
    def held_idle_bytes(self, blocks: Sequence[int]) -> int:
        """Bytes without a block in them that no other group can have."""

    def needs(self, lengths: Iterable[tuple[int, int]]) -> list[int]:
        """Blocks of every group for requests, given as pairs (how many, tokens of each)."""
        pairs = list(lengths)
        return [sum(count * group.blocks_for(tokens) for count, tokens in pairs) for group in self.groups]

    def holds(self, lengths: Iterable[tuple[int, int]]) -> bool:
        """Whether these requests run at once; never more than ``max_num_seqs``."""
        pairs = list(lengths)
        return sum(count for count, _ in pairs) <= self.max_num_seqs and self.fits(self.needs(pairs))

    @property
    def token_step(self) -> int | None:
        """Tokens of an attention block; None in a model without full attention."""
        return min((g.block_tokens for g in self.groups if isinstance(g.cache, FullAttention)), default=None)

    def tokens_with(self, requests: int) -> int | None:
        """The most tokens that so many running requests hold together, as equal in length as blocks allow.

        The longest sequence of the model doesn't limit it: with one request this is what it and the prefix
        cache hold. 0 where so many requests don't fit at all; None where nothing grows with the tokens.
        """
        step = self.token_step
        if step is None:
            return None if self.holds([(requests, 1)]) else 0

        def fit(blocks: int) -> bool:
            each, longer = divmod(blocks, requests)
            return self.holds([(longer, (each + 1) * step), (requests - longer, each * step)])

        return _largest(requests, self.budget_bytes // step + requests, fit) * step

    def requests_of(self, tokens: int) -> int:
        """The most requests of ``tokens`` tokens that run at once; never more than ``max_num_seqs``."""
        return _largest(1, self.max_num_seqs, lambda requests: self.holds([(requests, tokens)]))

    def most(self, wanted: int, tokens: int, beside: Sequence[tuple[int, int]]) -> int:
        """How many of ``wanted`` requests of ``tokens`` tokens run beside others, given as pairs (how many, tokens)."""
        return _largest(1, wanted, lambda requests: self.holds([*beside, (requests, tokens)]))

    def pinned_by(self, tokens: int) -> int:
        """Bytes of the blocks that a request of ``tokens`` tokens holds, padding included."""
        return sum(group.blocks_for(tokens) * group.stride for group in self.groups)


@dataclass(frozen=True)
class ElasticMemory(Memory):
    """Extents that move between groups; extent 0 is the null extent and belongs to nobody."""

    extent_bytes: int
    extents: int
    """The null extent included."""
    blocks_per_extent: tuple[int, ...]
    """Blocks of each group in an extent."""

    @property
    def kind(self) -> Side:
        """Who divides it."""
        return "elastic"

    @property
    def unit_bytes(self) -> int:
        """An extent."""
        return self.extent_bytes

    @property
    def units(self) -> int:
        """Extents, the null one included."""
        return self.extents

    @property
    def overhead_bytes(self) -> int:
        """The null extent, and what is too little for another one."""
        return self.budget_bytes - max(0, self.extents - 1) * self.extent_bytes

    def extents_for(self, blocks: Sequence[int]) -> int:
        """Extents that hold so many blocks, no extent shared by two groups."""
        return sum(
            -(-need // blocks_per_extent)
            for need, blocks_per_extent in zip(blocks, self.blocks_per_extent, strict=True)
        )

    def fits(self, blocks: Sequence[int]) -> bool:
        """Whole extents, all but the null one."""
        return self.extents_for(blocks) <= self.extents - 1

    def held_idle_bytes(self, blocks: Sequence[int]) -> int:
        """Slots without a block in extents that a group owns."""
        return sum(
            (-need % count) * group.stride
            for need, count, group in zip(blocks, self.blocks_per_extent, self.groups, strict=True)
        )


@dataclass(frozen=True)
class FixedMemory(Memory):
    """A share for each group, set once: states for ``max_num_seqs`` requests, attention what is left."""

    null_bytes: int
    """Where the null blocks of all groups lie, at the start."""

    @property
    def kind(self) -> Side:
        """Who divides it."""
        return "fixed"

    @property
    def unit_bytes(self) -> int:
        """Nothing changes hands."""
        return 0

    @property
    def units(self) -> int:
        """Nothing changes hands."""
        return 0

    @property
    def overhead_bytes(self) -> int:
        """The null blocks, and what is too little for another block."""
        return self.budget_bytes - sum(group.blocks * group.stride for group in self.groups)

    def fits(self, blocks: Sequence[int]) -> bool:
        """Each group within its share."""
        return all(need <= group.blocks for need, group in zip(blocks, self.groups, strict=True))

    def held_idle_bytes(self, blocks: Sequence[int]) -> int:
        """States that are set aside and not in use."""
        return sum(
            (group.blocks - need) * group.stride
            for need, group in zip(blocks, self.groups, strict=True)
            if isinstance(group.cache, State)
        )


@dataclass(frozen=True)
class StockMemory(Memory):
    """vLLM's one pool of equal blocks; block 0 is the null block."""

    block_bytes: int
    pool_blocks: int
    """The null block included."""

    @property
    def kind(self) -> Side:
        """Who divides it."""
        return "stock"

    @property
    def unit_bytes(self) -> int:
        """A block of the pool."""
        return self.block_bytes

    @property
    def units(self) -> int:
        """Blocks, the null one included."""
        return self.pool_blocks

    @property
    def overhead_bytes(self) -> int:
        """The null block, and what is too little for another one."""
        return self.budget_bytes - max(0, self.pool_blocks - 1) * self.block_bytes

    def fits(self, blocks: Sequence[int]) -> bool:
        """All blocks from the one pool."""
        return sum(blocks) <= self.pool_blocks - 1

    def held_idle_bytes(self, blocks: Sequence[int]) -> int:
        """Nothing: any group can have any free block."""
        return 0


def _largest(first: int, last: int, fit: Callable[[int], bool]) -> int:
    """The largest number from ``first`` to ``last`` that fits, as all smaller ones do; 0 if none does."""
    if last < first or not fit(first):
        return 0
    while first < last:
        middle = (first + last + 1) // 2
        if fit(middle):
            first = middle
        else:
            last = middle - 1
    return first

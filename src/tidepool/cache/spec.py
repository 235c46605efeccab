"""What layers keep, and how layers form groups.

Sizes are bytes and counts are tokens or blocks throughout. A *page* is one layer's part of a block, at its
natural size: exactly the bytes that the block's tokens (or the one state) take, nothing added. A *block* is one
page for every layer of the group, side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, gcd


class CacheConfigError(ValueError):
    """A cache configuration that can't work; the message says what is wrong and what to do."""


@dataclass(frozen=True)
class FullAttention:
    """A layer that keeps ``bytes_per_token`` for every token of the sequence. Any size, odd ones included."""

    bytes_per_token: int

    def __post_init__(self) -> None:
        _require_positive("bytes_per_token", self.bytes_per_token)

    def page_bytes(self, block_tokens: int) -> int:
        """Bytes of ``block_tokens`` tokens."""
        return self.bytes_per_token * block_tokens

    def blocks_for(self, tokens: int, block_tokens: int) -> int:
        """Blocks that a sequence of ``tokens`` tokens holds."""
        return ceil(tokens / block_tokens)


@dataclass(frozen=True)
class SlidingWindow:
    """A layer that keeps ``bytes_per_token`` for the last ``window`` tokens.

    ``step_tokens`` is how many tokens one step computes at most: they are held beside the window until it has ended.
    """

    bytes_per_token: int
    window: int
    step_tokens: int = 1

    def __post_init__(self) -> None:
        _require_positive("bytes_per_token", self.bytes_per_token)
        _require_positive("window", self.window)
        _require_positive("step_tokens", self.step_tokens)

    def page_bytes(self, block_tokens: int) -> int:
        """Bytes of ``block_tokens`` tokens."""
        return self.bytes_per_token * block_tokens

    def blocks_for(self, tokens: int, block_tokens: int) -> int:
        """Blocks that a sequence of ``tokens`` tokens holds at most: they may straddle one block boundary more."""
        return min(ceil(tokens / block_tokens), ceil((self.window - 1 + self.step_tokens) / block_tokens) + 1)


@dataclass(frozen=True)
class State:
    """A layer that keeps one fixed state of ``bytes`` for a sequence of any length.

    ``copies`` is how many state blocks a running request may hold at once: 1 without prefix caching, 2 where
    states are copied on at checkpoints, more with speculative decoding.
    """

    bytes: int
    copies: int = 1
    packed_bytes: int = 0
    """Bytes of a state that is only cached, where those are kept in a smaller format; else 0."""

    def __post_init__(self) -> None:
        _require_positive("bytes", self.bytes)
        _require_positive("copies", self.copies)
        if not 0 <= self.packed_bytes < self.bytes:
            raise CacheConfigError(f"A packed state of {self.packed_bytes:,} bytes isn't smaller than {self.bytes:,}.")

    def page_bytes(self, block_tokens: int) -> int:
        """Bytes of one state, however many tokens lie behind it."""
        return self.bytes

    def blocks_for(self, tokens: int, block_tokens: int) -> int:
        """State blocks that a running request holds."""
        return self.copies


@dataclass(frozen=True)
class PackedState:
    """A layer's states that are only cached, ``bytes`` each, in a smaller format than running ones.

    No running request holds any: what one continues from is unpacked into a block of its own first.
    """

    bytes: int

    def __post_init__(self) -> None:
        _require_positive("bytes", self.bytes)

    def page_bytes(self, block_tokens: int) -> int:
        """Bytes of one state, however many tokens lie behind it."""
        return self.bytes

    def blocks_for(self, tokens: int, block_tokens: int) -> int:
        """None."""
        return 0


LayerCache = FullAttention | SlidingWindow | State | PackedState


@dataclass(frozen=True)
class Group:
    """Layers with the same layer cache; they share one block table.

    Invariant: the bytes that a kernel addresses in one page, ``cache.page_bytes(block_tokens)``, never exceed
    ``page_bytes``. A page may be declared larger than natural (a kernel's own padding), never smaller: that is
    how a block forced up to 16 or 32 tokens would write into its neighbour.
    """

    cache: LayerCache
    layers: tuple[str, ...]
    """None on a pipeline stage that has none of the group's; its blocks then take no bytes there."""
    block_tokens: int
    """Tokens a block covers. For a state: how far apart checkpoints lie; it doesn't change the page."""
    align: int = 1
    """Bytes that the distance between blocks must be a multiple of."""
    page_bytes: int = 0
    """Bytes of one page; 0 asks for the natural size."""

    def __post_init__(self) -> None:
        _require_positive("block_tokens", self.block_tokens)
        _require_positive("align", self.align)
        natural = self.cache.page_bytes(self.block_tokens)
        if self.page_bytes == 0:
            object.__setattr__(self, "page_bytes", natural)
        elif natural > self.page_bytes:
            raise CacheConfigError(
                f"A block of {self.block_tokens} tokens needs {natural:,} bytes in each layer, but the page of "
                f"group {next(iter(self.layers), None)!r} has {self.page_bytes:,}: use smaller blocks or a larger page."
            )

    @property
    def block_bytes(self) -> int:
        """Bytes of one block: one page for every layer."""
        return self.page_bytes * len(self.layers)

    @property
    def constant(self) -> bool:
        """Whether a request's need doesn't grow with its length (an O(1) group)."""
        return isinstance(self.cache, State | PackedState)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that a request of ``tokens`` tokens holds in this group."""
        return self.cache.blocks_for(tokens, self.block_tokens)

    def with_kernel_block(self, kernel_tokens: int) -> Group:
        """Round the block up to whole kernel blocks of ``kernel_tokens``.

        Raises:
            CacheConfigError: the larger block doesn't fit a page whose size was declared.
        """
        _require_positive("kernel_tokens", kernel_tokens)
        if self.constant:
            return self
        tokens = ceil(self.block_tokens / kernel_tokens) * kernel_tokens
        was_natural = self.page_bytes == self.cache.page_bytes(self.block_tokens)
        return replace(self, block_tokens=tokens, page_bytes=0 if was_natural else self.page_bytes)


def group_layers(
    layers: Mapping[str, LayerCache],
    block_tokens: int,
    *,
    align: int = 1,
    state_block_tokens: int | None = None,
) -> tuple[Group, ...]:
    """Group layers by their layer cache, in the order in which each first appears.

    Args:
        layers: layer name to layer cache.
        block_tokens: tokens in a block of attention.
        align: bytes that block strides are a multiple of.
        state_block_tokens: tokens between two checkpoints of a state; ``block_tokens`` where not given.
    """
    members: dict[LayerCache, list[str]] = {}
    for name, cache in layers.items():
        members.setdefault(cache, []).append(name)
    return tuple(
        Group(
            cache=cache,
            layers=tuple(names),
            block_tokens=(state_block_tokens or block_tokens) if isinstance(cache, State) else block_tokens,
            align=align,
        )
        for cache, names in members.items()
    )


def packed_groups(groups: Sequence[Group]) -> tuple[Group, ...]:
    """A group of packed states for each group of states that has them, in the order of the groups.

    They come behind all others in an arena, since engines know nothing of them.
    """
    return tuple(
        Group(
            cache=PackedState(group.cache.packed_bytes),
            layers=group.layers,
            block_tokens=group.block_tokens,
            align=block_align(group.cache.packed_bytes),
        )
        for group in groups
        if isinstance(group.cache, State) and group.cache.packed_bytes
    )


def block_align(page_bytes: int) -> int:
    """Bytes that the distance of blocks is a multiple of: 64, 32 or 16, the largest that divides a page, or 16.

    64 bytes are a cache line. Layers lie a page apart within a block, so blocks needn't lie better than pages do; 16
    bytes are the widest load that kernels do.
    """
    return max(16, gcd(64, page_bytes))


def _require_positive(name: str, value: int) -> None:
    if value <= 0:
        raise CacheConfigError(f"{name} must be positive, not {value}.")

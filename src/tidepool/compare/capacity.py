"""How many tokens one request alone could fill the KV memory with.

The longest request, in tokens, whose blocks fit, whatever length the model itself allows. A request of n tokens
holds ceil(n / block) blocks in a group of attention and a fixed number in a group of states. They fit

* in stock vLLM, if their sum over all groups is at most ``num_blocks - 1`` (one is the null block), so that

      tokens = floor((num_blocks - 1 - blocks of states) / attention groups) x block;

* in the elastic partition, if the whole extents that each group needs add up to at most ``extents - 1``;
* in the fixed partition, if each group's blocks fit in its share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class GroupNeed:
    """What a request holds in one group."""

    block_tokens: int
    """Tokens in a block of attention."""
    fixed_blocks: int | None = None
    """Blocks of a group of states, whatever the length; None in a group of attention."""

    def blocks(self, tokens: int) -> int:
        """Blocks of a request of so many tokens."""
        return -(-tokens // self.block_tokens) if self.fixed_blocks is None else self.fixed_blocks


def capacity_tokens(needs: Sequence[GroupNeed], fits: Callable[[list[int]], bool]) -> int:
    """The longest request whose blocks fit, in tokens; 0 if none does.

    Args:
        needs: for each group; at least one of attention.
        fits: whether so many blocks of each group fit in the memory.
    """
    step = min(need.block_tokens for need in needs if need.fixed_blocks is None)

    def holds(steps: int) -> bool:
        return fits([need.blocks(steps * step) for need in needs])

    if not holds(1):
        return 0
    low, high = 1, 2
    while holds(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low * step

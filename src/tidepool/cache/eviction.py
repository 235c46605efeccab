"""Which cached bytes go first.

The one place where the worth of cached memory is judged. The rule is least recently used over all pools: a pool that
needs a block gives up its own coldest cached block, unless a whole idle extent of another group has lain untouched
for longer.
"""

from __future__ import annotations

from collections.abc import Sequence

from tidepool.cache.pool import Pool


def coldest_idle_extent(pools: Sequence[Pool], asking: int) -> tuple[int, int, int] | None:
    """The idle extent of a group other than ``asking`` that was last used the longest ago.

    Costs O(groups): each pool keeps its idle extents in order.

    Returns:
        (time of last use, group, extent), or None where no other group has an idle extent.
    """
    heads = (
        (last_used, group, extent)
        for group, pool in enumerate(pools)
        if group != asking
        for extent, last_used in _head(pool.idle)
    )
    return min(heads, default=None)


def prefers_own(own_last_used: int | None, idle: tuple[int, int, int] | None) -> bool:
    """Whether a pool should evict its own coldest block rather than take another group's idle extent."""
    return own_last_used is not None and (idle is None or own_last_used <= idle[0])


def _head(ordered: dict[int, int]) -> Sequence[tuple[int, int]]:
    return (next(iter(ordered.items())),) if ordered else ()

"""Which cached bytes go first.

The one place where the worth of cached memory is judged. The rule is least recently used, by whole extents and over
all groups. Whole extents, because a group that evicted single blocks would soon have blocks of many requests in every
extent, and then no extent would ever come free for another group.
"""

from __future__ import annotations

from collections.abc import Sequence

from tidepool.cache.pool import Pool


def coldest_idle_extent(pools: Sequence[Pool]) -> tuple[int, int] | None:
    """The idle extent of any group that was last used the longest ago.

    Costs O(groups): each pool keeps its idle extents in order.

    Returns:
        (group, extent), or None where no group has an idle extent.
    """
    coldest: tuple[int, int, int] | None = None
    for group, pool in enumerate(pools):
        if pool.idle:
            extent, last_used = next(iter(pool.idle.items()))
            if coldest is None or last_used < coldest[0]:
                coldest = (last_used, group, extent)
    return coldest and coldest[1:]

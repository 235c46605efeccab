"""The core: block pools of natural page size over one elastic memory. Integers in, integers out.

Read in this order: `spec` (what layers keep), `geometry` (how the memory is cut), `pool` (one group's blocks),
`arena` (who owns which extent), `eviction` (which cached bytes go first).
"""

from tidepool.cache.arena import Arena, OutOfBlocksError, Usage
from tidepool.cache.geometry import Cut, Geometry, Share, choose_geometry, fixed_shares
from tidepool.cache.spec import (
    CacheConfigError,
    FullAttention,
    Group,
    LayerCache,
    SlidingWindow,
    State,
    group_layers,
)

__all__ = [
    "Arena",
    "CacheConfigError",
    "Cut",
    "FullAttention",
    "Geometry",
    "Group",
    "LayerCache",
    "OutOfBlocksError",
    "Share",
    "SlidingWindow",
    "State",
    "Usage",
    "choose_geometry",
    "fixed_shares",
    "group_layers",
]

"""The core: block pools of natural page size over one elastic memory. Integers in, integers out.

Read in this order: `spec` (what layers keep), `geometry` (how the memory is cut), `pool` (one group's blocks),
`arena` (who owns which extent), `eviction` (which cached memory goes first), `returns` (when people come back),
`partings` (where a prompt leaves a second state), `retention` (where it leaves states, and is cut for them),
`growth` (what running requests will still need).
"""

from tidepool.cache.arena import Arena, Keep, OutOfBlocksError, Usage
from tidepool.cache.eviction import ExpectedReturn, Leaf, LeastRecentlyUsed, Policy, Standing
from tidepool.cache.geometry import (
    Cut,
    Geometry,
    Share,
    choose_geometry,
    choose_stage_geometries,
    cut_by_slots,
    fixed_shares,
    fixed_stage_shares,
)
from tidepool.cache.growth import AnswerLengths, Growth, Outlook
from tidepool.cache.partings import Partings
from tidepool.cache.retention import (
    LARGE_STEP,
    LONG_PROMPT,
    CheckpointRules,
    Checkpoints,
    FarPlaces,
    PromptEnds,
    Resumed,
    plan_checkpoints,
    spacing_within,
)
from tidepool.cache.returns import Arrival, Place, Returns, Turn
from tidepool.cache.spec import (
    CacheConfigError,
    FullAttention,
    Group,
    LayerCache,
    SlidingWindow,
    State,
    block_align,
    group_layers,
)

__all__ = [
    "LARGE_STEP",
    "LONG_PROMPT",
    "AnswerLengths",
    "Arena",
    "Arrival",
    "CacheConfigError",
    "CheckpointRules",
    "Checkpoints",
    "Cut",
    "ExpectedReturn",
    "FarPlaces",
    "FullAttention",
    "Geometry",
    "Group",
    "Growth",
    "Keep",
    "LayerCache",
    "Leaf",
    "LeastRecentlyUsed",
    "OutOfBlocksError",
    "Outlook",
    "Partings",
    "Place",
    "Policy",
    "PromptEnds",
    "Resumed",
    "Returns",
    "Share",
    "SlidingWindow",
    "Standing",
    "State",
    "Turn",
    "Usage",
    "block_align",
    "choose_geometry",
    "choose_stage_geometries",
    "cut_by_slots",
    "fixed_shares",
    "fixed_stage_shares",
    "group_layers",
    "plan_checkpoints",
    "spacing_within",
]

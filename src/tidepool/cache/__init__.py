"""The core: block pools of natural page size over one elastic memory. Integers in, integers out.

Read in this order: `spec` (what layers keep), `state_format` (how cached states may be packed), `geometry` (how memory
is divided), `pool` (one group's blocks), `arena` (who owns which extent), `eviction` (which cached memory goes first;
`published`: by other policies), `reuse` (when prompts are continued), `prompt_ends` and `branches` (from where),
`checkpoints` (where a prompt leaves states), `retention` (what requests leave, and what of it is kept), `waiting` (what
requests that wait will find), `lookups` (why prompts hit or miss), `growth` (what running requests will still need),
`host` (what lies in host memory behind it) and `speeds` (whether that is worth loading).
"""

from tidepool.cache.arena import Arena, GroupUsage, OutOfBlocksError, Retention, Usage
from tidepool.cache.branches import BranchCheckpoints, BranchStatistics
from tidepool.cache.checkpoints import (
    LARGE_STEP,
    LONG_PROMPT,
    NO_CHECKPOINTS,
    CheckpointRules,
    Checkpoints,
    FarPlaces,
    plan_checkpoints,
    spacing_within,
)
from tidepool.cache.eviction import CachedPrefix, ExpectedReturn, LeastRecentlyUsed, Policy, PriorityClass
from tidepool.cache.geometry import (
    ExtentLayout,
    Geometry,
    Share,
    choose_geometry,
    choose_stage_geometries,
    fixed_shares,
    fixed_stage_shares,
    geometry_by_counts,
)
from tidepool.cache.growth import AnswerLengths, GroupGrowth, Growth, Outlook, headroom
from tidepool.cache.host import BlockCopy, Copy, Held, HostTier, Left
from tidepool.cache.lookups import Lookup, LookupResult, LookupStatistics, TokenResult
from tidepool.cache.prompt_ends import PromptEnds, Resumed
from tidepool.cache.published import Marconi, PrefixSizes, seglen, tail_optimized
from tidepool.cache.retention import NO_ANSWER_STATE, AnswerState, RequestRecord, RetentionPolicy
from tidepool.cache.reuse import PrefixMatch, ResumePoint, ReuseModel, TurnClass
from tidepool.cache.spec import (
    CacheConfigError,
    FullAttention,
    Group,
    LayerCache,
    PackedState,
    SlidingWindow,
    State,
    block_align,
    group_layers,
    packed_groups,
)
from tidepool.cache.speeds import Speeds
from tidepool.cache.state_format import SCALE_BYTES, STATE_FORMATS, StateFormat, packed_page_bytes
from tidepool.cache.waiting import Waiting

__all__ = [
    "LARGE_STEP",
    "LONG_PROMPT",
    "NO_ANSWER_STATE",
    "NO_CHECKPOINTS",
    "SCALE_BYTES",
    "STATE_FORMATS",
    "AnswerLengths",
    "AnswerState",
    "Arena",
    "BlockCopy",
    "BranchCheckpoints",
    "BranchStatistics",
    "CacheConfigError",
    "CachedPrefix",
    "CheckpointRules",
    "Checkpoints",
    "Copy",
    "ExpectedReturn",
    "ExtentLayout",
    "FarPlaces",
    "FullAttention",
    "Geometry",
    "Group",
    "GroupGrowth",
    "GroupUsage",
    "Growth",
    "Held",
    "HostTier",
    "LayerCache",
    "LeastRecentlyUsed",
    "Left",
    "Lookup",
    "LookupResult",
    "LookupStatistics",
    "Marconi",
    "OutOfBlocksError",
    "Outlook",
    "PackedState",
    "Policy",
    "PrefixMatch",
    "PrefixSizes",
    "PriorityClass",
    "PromptEnds",
    "RequestRecord",
    "ResumePoint",
    "Resumed",
    "Retention",
    "RetentionPolicy",
    "ReuseModel",
    "Share",
    "SlidingWindow",
    "Speeds",
    "State",
    "StateFormat",
    "TokenResult",
    "TurnClass",
    "Usage",
    "Waiting",
    "block_align",
    "choose_geometry",
    "choose_stage_geometries",
    "fixed_shares",
    "fixed_stage_shares",
    "geometry_by_counts",
    "group_layers",
    "headroom",
    "packed_groups",
    "packed_page_bytes",
    "plan_checkpoints",
    "seglen",
    "spacing_within",
    "tail_optimized",
]

"""What vLLM makes of the same layers: its planning in closed form, without vLLM.

A test holds this together with vLLM's own functions for the whole catalogue. vLLM

1. inflates the attention block of a model with states, in steps of what the kernels take, until one layer's
   page is at least as large as the largest state (`attention_block`);
2. pads every state to that page;
3. puts layers of one kind into groups of equal size, so that all blocks of the one pool are equal: group
   padding is the room for layers that the last groups of a kind don't have.

In 0.33 it does so, with prefix caching, in steps that the layers which save states inside a step take as well
(`export_tokens`).

Pages that still differ (a small index beside latent attention) are packed side by side in a block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, lcm

from tidepool.cache import FullAttention, LayerCache, SlidingWindow, State
from tidepool.capacity.memory import PlannedGroup, StockMemory
from tidepool.capacity.predict import label

LATENT_STEP = 128
"""Tokens in steps of which vLLM inflates the block of latent attention."""
EXPORT_TOKENS = 64
"""FlashInfer's prefill of Gated DeltaNet, which vLLM takes on Hopper and Blackwell, gives states at multiples of it."""
VLLM_VERSIONS = ("0.32", "0.33")
"""Series of versions whose planning is known here."""


@dataclass(frozen=True)
class StockGroup:
    """Layers that share a block table."""

    layers: tuple[str, ...]
    block_tokens: int


@dataclass(frozen=True)
class StockLayout:
    """Groups, and the bytes of one layer's page in each layer."""

    groups: tuple[StockGroup, ...]
    pages: Mapping[str, int]

    def block_bytes(self, layers: Mapping[str, LayerCache]) -> int:
        """Bytes of a block of the pool on a device that has ``layers``: those of the largest group there."""
        return max(sum(self.pages[name] for name in group.layers if name in layers) for group in self.groups)


def export_tokens(family: str, vllm_version: str, prefix_caching: bool) -> int:
    """Tokens at multiples of which a model's layers save states inside a step, and vLLM's blocks of attention end.

    Args:
        family: the model's.
        vllm_version: one of `VLLM_VERSIONS`. In 0.32 such layers set nothing.
        prefix_caching: whether it is on.
    """
    exports = vllm_version != "0.32" and prefix_caching and family.startswith("Gated DeltaNet")
    return EXPORT_TOKENS if exports else 1


def attention_block(
    layers: Mapping[str, LayerCache],
    block_tokens: int,
    latent: bool,
    token_bytes: int | None = None,
    export_tokens: int = 1,
) -> int:
    """Tokens of a block of attention after inflation.

    Args:
        layers: all layers of the model.
        block_tokens: what was asked for, also the step of inflation.
        latent: whether attention is latent, whose step is 128 tokens at least.
        token_bytes: what an attention layer keeps for a token, as vLLM thinks before it asks the layers; by default
            what the one that keeps the most does.
        export_tokens: see `export_tokens`.
    """
    state = max((cache.bytes for cache in layers.values() if isinstance(cache, State)), default=0)
    token = token_bytes or _largest_token(layers)
    if not state or not token:
        return block_tokens
    step = lcm(max(block_tokens, LATENT_STEP) if latent else block_tokens, export_tokens)
    return max(block_tokens, step * ceil(state / (step * token)))


def stock_layout(
    layers: Mapping[str, LayerCache],
    block_tokens: int,
    latent: bool,
    token_bytes: int | None = None,
    export_tokens: int = 1,
) -> StockLayout:
    """Group all layers of the model as vLLM does; arguments as of `attention_block`."""
    inflated = attention_block(layers, block_tokens, latent, token_bytes, export_tokens)
    hybrid = inflated != block_tokens or any(isinstance(cache, FullAttention) for cache in layers.values())
    token = token_bytes or _largest_token(layers)
    largest = max((cache.bytes for cache in layers.values() if isinstance(cache, State)), default=0)
    pages = {}
    for name, cache in layers.items():
        natural = cache.page_bytes(inflated)
        # Only the states that set the page are padded to it; a small ring keeps its own size.
        pages[name] = inflated * token if hybrid and natural == largest and isinstance(cache, State) else natural
    groups = _packed(layers, pages) if len(set(pages.values())) > 1 else _equal(layers)
    return StockLayout(tuple(StockGroup(tuple(names), inflated) for names in groups), pages)


def stock_memory(
    stages: Sequence[Mapping[str, LayerCache]],
    budget_bytes: int,
    max_num_seqs: int,
    max_model_len: int,
    *,
    block_tokens: int,
    latent: bool,
    token_bytes: int | None = None,
    export_tokens: int = 1,
) -> StockMemory:
    """Divide ``budget_bytes`` on every pipeline stage as vLLM does; the fewest blocks decide. See `attention_block`."""
    everything = {name: cache for stage in stages for name, cache in stage.items()}
    layout = stock_layout(everything, block_tokens, latent, token_bytes, export_tokens)
    stage = max(stages, key=layout.block_bytes)
    block_bytes = layout.block_bytes(stage)
    blocks = budget_bytes // block_bytes
    return StockMemory(
        budget_bytes=budget_bytes,
        groups=tuple(_planned(group, layout, everything, stage, block_bytes, blocks - 1) for group in layout.groups),
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        block_bytes=block_bytes,
        pool_blocks=blocks,
    )


def startup_lines(memory: StockMemory, in_flight_tokens: int) -> list[str]:
    """What vLLM logs of its KV cache at start, as one could compare it with a server's own log.

    Args:
        memory: as it was divided.
        in_flight_tokens: tokens under way at once at most, which windows hold beside them.
    """
    longest = memory.max_model_len
    each = sum(_longest_request(group, longest, in_flight_tokens) for group in memory.groups)
    requests = memory.pool_blocks / each
    return [
        f"GPU KV cache size: {int(requests * longest):,} tokens",
        f"Maximum concurrency for {longest:,} tokens per request: {requests:.2f}x",
    ]


def graph_refusal(memory: StockMemory) -> str:
    """What vLLM says instead of starting where blocks are fewer than requests, as CUDA graphs take one for each."""
    states = any(isinstance(group.cache, State) for group in memory.groups)
    if not states or memory.max_num_seqs <= memory.pool_blocks:
        return ""
    return f"max_num_seqs ({memory.max_num_seqs}) exceeds available Mamba cache blocks ({memory.pool_blocks})"


def _longest_request(group: PlannedGroup, tokens: int, in_flight_tokens: int) -> int:
    """Blocks of a group that vLLM reckons for the longest request."""
    if isinstance(group.cache, SlidingWindow):
        return ceil(min(group.cache.window - 1 + in_flight_tokens, tokens) / group.block_tokens) + 1
    return group.blocks_for(tokens)


def _largest_token(layers: Mapping[str, LayerCache]) -> int:
    return max((cache.bytes_per_token for cache in layers.values() if isinstance(cache, FullAttention)), default=0)


def _planned(
    group: StockGroup,
    layout: StockLayout,
    everything: Mapping[str, LayerCache],
    stage: Mapping[str, LayerCache],
    block_bytes: int,
    blocks: int,
) -> PlannedGroup:
    here = [name for name in group.layers if name in stage]
    caches = [stage[name] for name in here]
    natural = sum(cache.page_bytes(group.block_tokens) for cache in caches)
    pages = sum(layout.pages[name] for name in here)
    first = everything[group.layers[0]]
    return PlannedGroup(
        label=label(first),
        cache=first,
        layers=len(here),
        block_tokens=group.block_tokens,
        token_bytes=sum(each.bytes_per_token for each in caches if isinstance(each, FullAttention | SlidingWindow)),
        natural_bytes=natural,
        page_padding=pages - natural,
        group_padding=block_bytes - pages,
        blocks=max(0, blocks),
    )


def _equal(layers: Mapping[str, LayerCache]) -> list[list[str]]:
    """Groups of equal size, of layers with equal pages.

    The size is that of the smallest kind, or of the largest where that is less than one and a half times as
    many. A kind that is cut into n groups gives every n-th layer to each.
    """
    kinds: dict[LayerCache, list[str]] = {}
    for name, cache in layers.items():
        kinds.setdefault(cache, []).append(name)
    counts = [len(names) for names in kinds.values()]
    size = max(counts) if max(counts) < 1.5 * min(counts) else min(counts)
    return [
        names[first :: ceil(len(names) / size)] for names in kinds.values() for first in range(ceil(len(names) / size))
    ]


@dataclass(frozen=True)
class _Kind:
    """Layers of one kind, by the bytes of their pages."""

    state: bool
    by_page: Mapping[int, list[str]]

    @property
    def even(self) -> bool:
        """Whether each repeat has one layer of every page size."""
        return len(set(map(len, self.by_page.values()))) == 1

    @property
    def repeats(self) -> int:
        """Layers of the page size that has the most."""
        return max(map(len, self.by_page.values()))

    def largest_piece(self, pieces: int) -> int:
        """Bytes of the largest group where the kind is cut into so many."""
        return sum(ceil(len(names) / pieces) * page for page, names in self.by_page.items())

    def cut(self, pieces: int) -> list[list[str]]:
        """Groups of every ``pieces``-th repeat."""
        if pieces == 1:
            return [[name for names in self.by_page.values() for name in names]]
        pattern = list(zip(*self.by_page.values(), strict=True))
        return [[name for repeat in pattern[first::pieces] for name in repeat] for first in range(pieces)]


def _packed(layers: Mapping[str, LayerCache], pages: Mapping[str, int]) -> list[list[str]]:
    """Groups of layers whose pages differ and lie side by side in a block.

    A kind with one layer of each of several page sizes per repeat keeps all its repeats in one group where
    it can. Kinds of states are cut until a group fits in the block that the others need anyway.
    """
    kinds = _kinds(layers, pages)
    per_group = _repeats_in_a_group([kind for kind in kinds if kind.even])
    cuts = [ceil(kind.repeats / per_group) if kind.even and per_group else 1 for kind in kinds]
    anchor = max(
        kind.largest_piece(kind.repeats if kind.state else pieces) for kind, pieces in zip(kinds, cuts, strict=True)
    )
    groups = []
    for kind, pieces in zip(kinds, cuts, strict=True):
        fitting = max(anchor // next(iter(kind.by_page)), 1)
        groups += kind.cut(max(pieces, ceil(kind.repeats / fitting)) if kind.state else pieces)
    return groups


def _kinds(layers: Mapping[str, LayerCache], pages: Mapping[str, int]) -> list[_Kind]:
    kinds: dict[object, dict[int, list[str]]] = {}
    for name, cache in layers.items():
        kinds.setdefault(_uniform(cache), {}).setdefault(pages[name], []).append(name)
    return [_Kind(isinstance(kind, int), by_page) for kind, by_page in kinds.items()]


def _repeats_in_a_group(kinds: Sequence[_Kind]) -> int | None:
    """Repeats that fill groups of all even kinds best; none where no kind has several page sizes."""
    counts = [kind.repeats for kind in kinds]
    fewest = max((kind.repeats for kind in kinds if len(kind.by_page) > 1), default=None)
    if fewest is None:
        return None
    return min(range(fewest, max(counts) + 1), key=lambda size: (sum(-count % size for count in counts), -size))


def _uniform(cache: LayerCache) -> object:
    """What layers of one kind share: the size of a state, the length of a window, or being attention."""
    if isinstance(cache, State):
        return cache.bytes
    return ("window", cache.window) if isinstance(cache, SlidingWindow) else "attention"

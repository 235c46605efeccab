"""One look at a server's memory and requests: what `top` shows and `explain` reasons from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tidepool.cache import FullAttention, LookupResult, PackedState, State, TokenResult
from tidepool.capacity.memory import ElasticMemory, PlannedGroup
from tidepool.metrics import table
from tidepool.observe.scrape import PREEMPTIONS, RUNNING, USAGE, WAITING, Scrape

USES = (
    "states",
    "attention",
    "cached_states",
    "cached_attention",
    "free",
    "padding",
    "unowned",
    "null",
)
"""Uses of memory in the order of the map: in use, cached, and what nobody uses."""
_MANY = 1 << 40
"""More tokens than any request has."""


@dataclass(frozen=True)
class GroupLook:
    """A group, as `table.GROUP_INFO` tells it."""

    kind: str
    block_tokens: int
    block_bytes: int
    blocks_per_extent: int


@dataclass(frozen=True)
class Look:
    """What one scrape says, over all engines of the server."""

    model: str
    engines: int
    partition: str
    extent_bytes: int
    checkpoint_tokens: int
    max_num_seqs: int
    groups: tuple[GroupLook, ...]
    memory: Mapping[str, Mapping[str, int]]
    """By tier (device, host) and use (see `USES`), bytes."""
    extents: Mapping[str, int]
    """Of the device by use; empty without extents."""
    running: int
    waiting: int
    usage: float
    """As vLLM tells it: 1 when a request waits for memory."""
    preemptions: int
    moves: int
    allocated_bytes: int
    evicted: Mapping[str, int]
    """Cached prefixes by class, of the device."""
    lookups: Mapping[str, int]
    tokens: Mapping[str, int]
    """Of prompts, by what became of them."""
    refused: Mapping[str, int]
    """Requests by kind of the group that was short, and ``reserve``."""
    branch_checkpoints: Mapping[str, int]
    eviction_age: float | None
    """Median, in memories allocated; None if nothing was evicted."""
    return_age: float | None
    """The age that three of four returns don't exceed; None if there were none."""

    def bytes_of(self, tier: str) -> int:
        """All of a tier's memory."""
        return sum(self.memory.get(tier, {}).values())

    @property
    def hit_rate(self) -> float | None:
        """Share of prompt tokens that hit; None if there were none."""
        total = sum(self.tokens.values())
        hits = self.tokens.get(TokenResult.DEVICE, 0) + self.tokens.get(TokenResult.HOST, 0)
        return hits / total if total else None

    @property
    def state_bytes(self) -> int:
        """Bytes of a request's state, all groups together."""
        return sum(group.block_bytes for group in self.groups if group.kind == "states")

    @property
    def cached_state_bytes(self) -> int:
        """Bytes of a cached state, all groups together: packed, where states are."""
        packed = sum(group.block_bytes for group in self.groups if group.kind == "packed")
        return packed or self.state_bytes

    @property
    def packs(self) -> bool:
        """Whether cached states could be packed and aren't."""
        packed = any(group.kind == "packed" for group in self.groups)
        return self.partition == "elastic" and bool(self.state_bytes) and not packed

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's attention, all groups together."""
        return sum(group.block_bytes // group.block_tokens for group in self.groups if group.block_tokens)

    def planned(self, device_bytes: int) -> ElasticMemory | None:
        """The memory of one engine of such a size, as the planner divides it; None without extents.

        Windows count as attention: a request of many tokens holds less than this says.
        """
        if not self.extent_bytes:
            return None
        groups = []
        for group in self.groups:
            of_states = {"states": State, "packed": PackedState}.get(group.kind)
            groups.append(
                PlannedGroup(
                    label=group.kind,
                    cache=of_states(group.block_bytes) if of_states else FullAttention(self.token_bytes),
                    layers=1,
                    block_tokens=max(group.block_tokens, 1),
                    token_bytes=0 if of_states else group.block_bytes // group.block_tokens,
                    natural_bytes=group.block_bytes,
                    page_padding=self.extent_bytes // group.blocks_per_extent - group.block_bytes,
                    group_padding=0,
                    blocks=device_bytes // self.extent_bytes * group.blocks_per_extent,
                )
            )
        return ElasticMemory(
            budget_bytes=device_bytes,
            groups=tuple(groups),
            max_num_seqs=_MANY,
            max_model_len=_MANY,
            extent_bytes=self.extent_bytes,
            extents=device_bytes // self.extent_bytes,
            blocks_per_extent=tuple(group.blocks_per_extent for group in self.groups),
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self) | {"hit_rate": self.hit_rate}


def look_at(scrape: Scrape) -> Look:
    """Make sense of what a server with tidepool answered."""
    config = scrape.rows(table.CONFIG_INFO.name)[0][0]
    infos = sorted(
        {int(labels["group"]): labels for labels, _ in scrape.rows(table.GROUP_INFO.name)}.items(),
    )
    groups = tuple(
        GroupLook(labels["kind"], *(int(labels[name]) for name in ("block_tokens", "block_bytes", "blocks_per_extent")))
        for _, labels in infos
    )
    engines = {labels["engine"] for labels, _ in scrape.rows(table.CONFIG_INFO.name)}
    extents = scrape.by(table.EXTENTS.name, "tier", "kind", "use")

    def counts(name: str, label: str, **fixed: str) -> dict[str, int]:
        return {
            value: int(count)
            for (value, *others), count in scrape.by(name, label, *fixed).items()
            if others == list(fixed.values())
        }

    return Look(
        model=config["model_name"],
        engines=len(engines),
        partition=config["partition"],
        extent_bytes=int(config["extent_bytes"]),
        checkpoint_tokens=int(config["checkpoint_tokens"]),
        max_num_seqs=int(config["max_num_seqs"]),
        groups=groups,
        memory=_memory(scrape),
        extents={_use(kind, use): int(count) for (tier, kind, use), count in extents.items() if tier == "device"},
        running=int(scrape.total(RUNNING)),
        waiting=int(scrape.total(WAITING)),
        usage=max((value for _, value in scrape.rows(USAGE)), default=0.0),
        preemptions=int(scrape.total(PREEMPTIONS)),
        moves=int(scrape.total(table.MOVES.name)),
        allocated_bytes=int(scrape.total(table.ALLOCATED.name)),
        evicted=counts(table.EVICTED_PREFIXES.name, "priority", tier="device"),
        lookups=dict.fromkeys(LookupResult, 0) | counts(table.LOOKUPS.name, "result"),
        tokens=dict.fromkeys(TokenResult, 0) | counts(table.LOOKUP_TOKENS.name, "result"),
        refused=counts(table.REFUSED.name, "kind"),
        branch_checkpoints=counts(table.BRANCH_CHECKPOINTS.name, "event"),
        eviction_age=scrape.quantile(table.EVICTION_AGE.name, 0.5),
        return_age=scrape.quantile(table.RETURN_AGE.name, 0.75),
    )


def _memory(scrape: Scrape) -> dict[str, dict[str, int]]:
    memory: dict[str, dict[str, int]] = {}
    for (tier, kind, use), count in scrape.by(table.MEMORY.name, "tier", "kind", "use").items():
        uses = memory.setdefault(tier, dict.fromkeys(USES, 0))
        uses[_use(kind, use)] += int(count)
    return memory


def _use(kind: str, use: str) -> str:
    """In the words of `USES`: windows are attention."""
    named = "states" if kind in ("states", "packed") else "attention"
    return {"in_use": named, "cached": f"cached_{named}"}.get(use, use)

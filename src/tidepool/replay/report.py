"""What a replay reports, all modes together, and how it speaks: one row for every figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

from tidepool.replay.job import TITLES, USES, GroupLayout, Mode, Result
from tidepool.sizes import size


@dataclass(frozen=True)
class Setting:
    """What all modes had in common."""

    model: str
    gpu: str
    kv_bytes: int
    source: str
    """The trace's file name, or the generated workload."""
    rate: float
    max_num_seqs: int
    max_num_batched_tokens: int
    eviction: str = "returns"
    """What tidepool evicts by."""
    drop_reasoning: float = 0.0
    """Share of the answers that later prompts lack."""
    vllm: str | None = None
    """The version of vLLM that was asked for; None for the installed one."""


@dataclass(frozen=True)
class Report:
    """A replay."""

    setting: Setting
    results: Sequence[Result]
    """One for each mode that ran, in the order asked for; at least one."""
    failures: Mapping[Mode, str] = field(default_factory=dict)
    """Why the other modes didn't."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "setting": asdict(self.setting),
            "uses": USES,
            "failures": dict(self.failures),
            "modes": {result.mode: result.to_dict() for result in self.results},
        }


USE_TITLES = {
    "states": ("states in use", "states of running requests"),
    "attention": ("attention in use", "attention blocks of running requests, unfilled tails included"),
    "cached_states": ("cached states", "kept for later requests, evicted when needed"),
    "cached_attention": ("cached attention", "kept for later requests, evicted when needed"),
    "padding": ("padding", "parts of these blocks that can hold nothing"),
    "idle": ("idle", "clean or unowned, the null block or extent, and what is too little for a block"),
}
"""Uses of memory: a name, and what it means."""


@dataclass(frozen=True)
class Row:
    """One figure of every mode."""

    label: str
    of: Callable[[Result], str]


def _ms(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{seconds * 1e3:,.0f} ms"


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f} us"


def _share(share: float) -> str:
    return f"{share:.2%}"


ROWS = (
    Row("token hit rate", lambda r: _share(r.hit_rate)),
    Row("  hit tokens", lambda r: f"{r.hit_tokens:,}"),
    Row("TTFT mean", lambda r: _ms(r.ttft.mean)),
    Row("  p50", lambda r: _ms(r.ttft.p50)),
    Row("  p95", lambda r: _ms(r.ttft.p95)),
    Row("  p99", lambda r: _ms(r.ttft.p99)),
    Row("output tokens/s", lambda r: f"{r.output_rate:,.0f}"),
    Row("requests/s", lambda r: f"{r.request_rate:,.2f}"),
    Row("preemptions", lambda r: f"{r.preemptions:,}"),
    Row("running requests, mean", lambda r: f"{r.running_mean:,.1f}"),
    Row("  peak", lambda r: f"{r.running_peak:,}"),
    Row("extents that changed hands", lambda r: "-" if r.extents_moved is None else f"{r.extents_moved:,}"),
    Row("tokens in an attention block", lambda r: f"{r.block_tokens:,}"),
    Row("scheduler CPU a step, median", lambda r: _us(r.scheduler_median)),
    Row("  mean", lambda r: _us(r.scheduler_mean)),
    Row("steps", lambda r: f"{r.steps:,}"),
    Row("real time of the replay", lambda r: f"{r.wall_seconds:,.0f} s"),
)
"""The table."""


def mean_uses(result: Result) -> list[int]:
    """Bytes by use, averaged over virtual time; they add up to the budget."""
    samples = result.samples
    spans = [after.seconds - now.seconds for now, after in pairwise(samples)]
    total = sum(spans)
    if not total:
        return list(samples[-1].uses)
    sums = (
        sum(span * sample.uses[use] for span, sample in zip(spans, samples, strict=False)) for use in range(len(USES))
    )
    return [round(weighted / total) for weighted in sums]


def layout(result: Result) -> str:
    """The groups in words: ``3 x 8 state layers, 8 attention layers (528 tokens), blocks of 16.5 MiB``."""
    kinds: dict[tuple[str, int, int], int] = {}
    for group in result.groups:
        key = (group.kind, group.layers, group.block_bytes)
        kinds[key] = kinds.get(key, 0) + 1
    return ", ".join(_group_words(result.groups, key, count) for key, count in kinds.items())


def describe(setting: Setting) -> str:
    """The setting in one line."""
    rate = "" if setting.rate == 1 else f", arrivals {setting.rate:g} times as fast"
    dropped = f", {setting.drop_reasoning:.0%} of the answers dropped" if setting.drop_reasoning else ""
    policy = "" if setting.eviction == "returns" else f"; tidepool evicts by {setting.eviction}"
    policy += f"; vLLM {setting.vllm}" if setting.vllm else ""
    return (
        f"{setting.source}{rate}{dropped}; {size(setting.kv_bytes)} of KV memory; clock of a {setting.gpu}; at most "
        f"{setting.max_num_seqs:,} requests and {setting.max_num_batched_tokens:,} tokens a step{policy}"
    )


def missing(report: Report) -> list[str]:
    """A line for each mode that didn't run."""
    return [f"{TITLES[mode]} can't run: {reason}" for mode, reason in report.failures.items()]


def title(result: Result) -> str:
    """A mode's name."""
    return TITLES[result.mode]


def _group_words(groups: Sequence[GroupLayout], key: tuple[str, int, int], count: int) -> str:
    kind, layers, block_bytes = key
    group = next(group for group in groups if (group.kind, group.layers, group.block_bytes) == key)
    times = f"{count} x " if count > 1 else ""
    padding = 1 - group.natural_bytes / block_bytes
    padded = f", {padding:.1%} padding" if padding else ""
    return f"{times}{layers} {kind} layers ({group.block_tokens:,} tokens, {size(block_bytes)}{padded})"

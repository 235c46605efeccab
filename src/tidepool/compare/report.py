"""What a comparison shows: numbers for each side, whether everything holds, tables and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median, median_low
from typing import Any

from rich.console import Console
from rich.table import Table

from tidepool.compare.drive import Measured
from tidepool.compare.messages import Facts, Run
from tidepool.compare.workloads import Workload, describe
from tidepool.running.agreement import BFLOAT16_GAP, first_gap
from tidepool.sides import Side


@dataclass(frozen=True)
class Agreement:
    """How many requests got the same tokens as on the stock side, in every repeat."""

    requests: int
    identical: int
    rounded: int
    """Requests whose answers part where stock found both tokens as good as equal; see `tidepool.running.agreement`."""

    @property
    def wrong(self) -> int:
        """Requests whose answers differ by more than rounding accounts for."""
        return self.requests - self.identical - self.rounded


@dataclass(frozen=True)
class SideResult:
    """One side of one workload; counts are the medians of the repeats."""

    peak_requests: int
    mean_requests: float
    preemptions: int
    prompt_tokens: int
    hit_tokens: int
    output_tokens: int
    output_tokens_per_second: float
    peak_ratio: float
    """To stock's, as are the next three; 1 for stock itself."""
    speed_ratio: float
    """Output tokens for each second of computing time: the median of the ratios of neighbouring runs."""
    wall_speed_ratio: float
    """The same by the clock on the wall, which other programs on the machine disturb."""
    agreement: Agreement


@dataclass(frozen=True)
class WorkloadResult:
    """All sides of one workload on one model."""

    workload: Workload
    sides: dict[Side, SideResult]


@dataclass(frozen=True)
class ModelResult:
    """All workloads on one model."""

    model: str
    kv_bytes: int
    facts: dict[bool, dict[Side, Facts]]
    """Without and with prefix caching."""
    workloads: list[WorkloadResult]


def summarize(measured: Measured) -> ModelResult:
    """Condense the repeats."""
    return ModelResult(
        model=measured.subject.name,
        kv_bytes=measured.subject.kv_bytes,
        facts=measured.facts,
        workloads=[
            WorkloadResult(workload, {side: _side(runs, sides["stock"]) for side, runs in sides.items()})
            for workload in measured.subject.workloads
            for sides in (measured.runs[workload.name],)
        ],
    )


def failures(results: Sequence[ModelResult]) -> list[str]:
    """What should hold and doesn't, a sentence each.

    Outputs must be stock's, up to rounding. With prefix caching off, the elastic partition must never run fewer
    requests at once. The fixed partition may: that is what its walls cost.
    """
    found = []
    for result in results:
        for measured in result.workloads:
            title = f"{result.model}, {measured.workload.title}"
            stock = measured.sides["stock"]
            for side, values in measured.sides.items():
                if wrong := values.agreement.wrong:
                    found.append(f"{title}: {wrong} outputs of {side} differ from stock's.")
                promised = side == "elastic" and not measured.workload.caching
                if promised and values.peak_requests < stock.peak_requests:
                    found.append(
                        f"{title}: {side} ran {values.peak_requests} requests at once, stock {stock.peak_requests}."
                    )
    return found


def to_json(results: Sequence[ModelResult]) -> dict[str, Any]:
    """The same as plain numbers, strings, lists and dicts."""
    models = []
    for result in results:
        content = asdict(result)
        content["memory"] = {
            "caching_on" if caching else "caching_off": {side: asdict(facts) for side, facts in sides.items()}
            for caching, sides in result.facts.items()
        }
        del content["facts"]
        models.append(content)
    problems = failures(results)
    return {"holds": not problems, "failures": problems, "models": models}


def print_result(result: ModelResult, console: Console) -> None:
    """Print what a model was asked and the two tables of what came out, in 100 columns at most."""
    console.print(f"\n[bold]{result.model}[/bold] on {result.kv_bytes / 1e6:,.0f} MB of KV memory\n")
    questions = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for measured in result.workloads:
        questions.add_row(measured.workload.title, describe(measured.workload))
    console.print(questions)
    console.print()
    memory = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for heading in ("memory", "attention block", "KV cache groups", "one request could fill"):
        memory.add_column(heading, justify="left" if heading == "memory" else "right")
    for side, facts in result.facts[False].items():
        memory.add_row(
            side,
            f"{facts.attention_block_tokens:,} tokens",
            str(facts.groups),
            f"{facts.capacity_tokens:,} tokens",
        )
    console.print(memory)
    console.print()

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("workload", no_wrap=True)
    table.add_column("memory")
    for heading in (
        "most requests\nat once",
        "preempted",
        "prefix-hit\ntokens",
        "output tok/s\nto stock",
        "outputs identical\nto stock",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for measured in result.workloads:
        workload = measured.workload
        for index, (side, values) in enumerate(measured.sides.items()):
            table.add_row(
                workload.title if index == 0 else "",
                side,
                _peak(side, values),
                f"{values.preemptions:,}",
                f"{values.hit_tokens:,}" if workload.caching else "-",
                "" if side == "stock" else f"{values.speed_ratio:.2f}x",
                "" if side == "stock" else _agreement(values.agreement),
            )
    console.print(table)


def _side(runs: Sequence[Run], stock: Sequence[Run]) -> SideResult:
    peak, stock_peak = (median_low(run.peak_requests for run in side) for side in (runs, stock))
    return SideResult(
        peak_requests=peak,
        mean_requests=median(run.mean_requests for run in runs),
        preemptions=median_low(run.preemptions for run in runs),
        prompt_tokens=runs[0].prompt_tokens,
        hit_tokens=median_low(run.hit_tokens for run in runs),
        output_tokens=runs[0].output_tokens,
        output_tokens_per_second=median(run.output_tokens / run.seconds for run in runs),
        peak_ratio=peak / stock_peak,
        speed_ratio=median(b.cpu_seconds / a.cpu_seconds for a, b in zip(runs, stock, strict=True)),
        wall_speed_ratio=median(b.seconds / a.seconds for a, b in zip(runs, stock, strict=True)),
        agreement=_agree(runs, stock),
    )


def _agree(runs: Sequence[Run], stock: Sequence[Run]) -> Agreement:
    identical = rounded = 0
    for request in stock[0].outputs:
        gaps = [
            first_gap(other.outputs[request], other.logprobs[request], run.outputs.get(request, ()))
            for run, other in zip(runs, stock, strict=True)
        ]
        largest = max((gap for gap in gaps if gap is not None), default=None)
        identical += largest is None
        rounded += largest is not None and largest <= BFLOAT16_GAP
    return Agreement(len(stock[0].outputs), identical, rounded)


def _peak(side: Side, values: SideResult) -> str:
    return f"{values.peak_requests}" if side == "stock" else f"{values.peak_requests} ({values.peak_ratio:.2f}x)"


def _agreement(agreement: Agreement) -> str:
    """Whether outputs agree, and how many are the same to the last token."""
    verdict = "NO" if agreement.wrong else "yes"
    star = "*" if agreement.rounded else ""
    return f"{verdict}, {agreement.identical} of {agreement.requests}{star}"


def notes(results: Sequence[ModelResult]) -> list[str]:
    """What stands under the tables: what their columns mean, and their stars where there are any."""
    lines = ["output tok/s: per second of computing time, median of the ratios of neighbouring runs."]
    sides = [side for result in results for workload in result.workloads for side in workload.sides.values()]
    if any(side.agreement.rounded for side in sides):
        lines += [
            "* the others part where stock found both tokens as good as equal: in batches of other",
            "  sizes, or cut in other places, the same numbers round otherwise in bfloat16.",
        ]
    return lines

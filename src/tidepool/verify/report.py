"""What a verification shows: whether everything holds, a table to paste into an issue, and JSON."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from tidepool import __version__
from tidepool.running.agreement import BFLOAT16_GAP, first_gap
from tidepool.sides import SIDES
from tidepool.sizes import size
from tidepool.verify.drive import Results
from tidepool.verify.messages import Machine, Outcome
from tidepool.verify.scenarios import GPU_PARTS, SCENARIOS, Count, Part
from tidepool.verify.task import ANSWER_TOKENS, Prompt, to_text

WORDS: dict[Count, str] = {
    "cut": "prompts cut",
    "preemptions": "preemptions",
    "hit_tokens": "tokens hit",
    "evictions": "evicted",
    "aborted": "aborted",
    "accepted": "drafts accepted",
    "loads": "loads from the host",
    "unpacked": "states unpacked",
    "far": "from the start",
    "moves": "moves",
}
MISSING: dict[Count, str] = {
    "cut": "no prompt was cut",
    "preemptions": "no request was preempted",
    "hit_tokens": "no token was found in the cache",
    "evictions": "no block was evicted",
    "aborted": "no running request was aborted",
    "accepted": "no draft was accepted",
    "loads": "nothing was loaded from the host",
    "unpacked": "no state was unpacked",
    "far": "not all blocks lay far from the start",
    "moves": "no extent changed hands",
}


@dataclass(frozen=True)
class Row:
    """One part, judged."""

    part: Part
    outcome: Outcome
    right: int
    """Right answers, or those of random weights that go with stock vLLM's."""
    problems: tuple[str, ...]
    """What should hold and doesn't."""


def judge(results: Results) -> list[Row]:
    """Judge every part that was run: scenario by scenario, stock first."""
    requests = {part.scenario: part.scenario.requests() for part in results.outcomes}
    names = list(SCENARIOS)
    rows = []
    for part in sorted(
        results.outcomes,
        key=lambda part: (
            names.index(part.scenario.name),
            -part.runner,
            SIDES.index(part.side),
            part.poison,
            part.fault,
        ),
    ):
        outcome, prompts = results.outcomes[part], requests[part.scenario]
        stock = results.outcomes.get(Part(part.scenario, "stock", runner=part.runner), outcome)
        wrong = _wrong(part, outcome, prompts, stock)
        problems = tuple(_problems(part, outcome, prompts, wrong, stock))
        rows.append(Row(part, outcome, len(outcome.answers) - len(wrong), problems))
    return rows


def failures(results: Results, rows: Sequence[Row]) -> list[str]:
    """All that should hold and doesn't, a sentence each."""
    found = [f"{row.part.scenario.title}, {row.part.memory}: {problem}." for row in rows for problem in row.problems]
    return found + results.errors


def to_json(results: Results, rows: Sequence[Row]) -> dict[str, Any]:
    """Everything as numbers."""
    found = failures(results, rows)
    return {
        "holds": not found,
        "failures": found,
        "versions": versions(results.machine),
        "rows": [
            {
                "scenario": row.part.scenario.name,
                "memory": row.part.side,
                "poison": row.part.poison,
                "fault": row.part.fault,
                "runner": row.part.runner,
                "kv_bytes": row.part.scenario.kv_bytes,
                "answers": len(row.outcome.answers),
                "right": row.right,
                **asdict(row.outcome.counts),
                "usage_at_end": row.outcome.usage_at_end,
                "seconds": row.outcome.seconds,
                "problems": row.problems,
            }
            for row in rows
        ],
    }


def versions(machine: Machine | None) -> dict[str, str]:
    """What was run on what; without ``machine`` no worker came so far as to tell."""
    found = {"tidepool": __version__}
    if machine is not None:
        found |= {"vllm": machine.vllm, "torch": machine.torch}
    found["python"] = platform.python_version()
    return found if machine is None else found | {"device": machine.device}


def print_report(results: Results, rows: Sequence[Row], console: Console) -> None:
    """Print versions, the table and the verdict."""
    console.print(", ".join(f"{name} {version}" for name, version in versions(results.machine).items()), soft_wrap=True)
    console.print("A trained model answers questions about texts: the same for each kind of memory, on the same bytes.")
    console.print()
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("scenario", no_wrap=True)
    table.add_column("memory", no_wrap=True)
    table.add_column("right", no_wrap=True, justify="right")
    table.add_column("what happened")
    table.add_column("", no_wrap=True)
    before = ""
    for row in rows:
        title = row.part.scenario.title
        table.add_row(
            "" if title == before else title,
            row.part.memory,
            f"{row.right}/{len(row.outcome.answers)}",
            ", ".join(_happened(row)),
            "FAILED" if row.problems else "ok",
        )
        before = title
    for scenario in dict.fromkeys(part.scenario for part in GPU_PARTS):
        if scenario not in {row.part.scenario for row in rows}:
            table.add_row(scenario.title, "", "", "not run: needs a GPU", "")
    console.print(table)
    console.print()
    console.print(
        "evicted: cached blocks. moves: of extents, from one group to another. copies, loads or packing left out, "
        "offsets cut: controls with damage done on purpose, which have to give wrong answers.",
        style="dim",
    )
    found = failures(results, rows)
    for failure in found:
        console.print(f"FAILED: {failure}", style="red", soft_wrap=True)
    if not found:
        console.print("Holds: every answer is right and equal to stock vLLM's, and no memory is left in use.")


def _wrong(part: Part, outcome: Outcome, prompts: Sequence[Prompt], stock: Outcome) -> list[str]:
    """Numbers of the answers that aren't right: of random weights those that differ where stock vLLM was sure."""
    if part.scenario.model == "trained":
        return [n for n, answer in outcome.answers.items() if not prompts[int(n)].question.is_right(answer)]
    gaps = {
        n: first_gap(stock.answers[n], stock.logprobs.get(n, []), a)
        for n, a in outcome.answers.items()
        if n in stock.answers
    }
    return [n for n, gap in gaps.items() if gap is not None and gap > BFLOAT16_GAP]


def _happened(row: Row) -> Iterator[str]:
    """The counts that the scenario is about; extents move everywhere."""
    for name, words in WORDS.items():
        count = getattr(row.outcome.counts, name)
        if _must(row.part, name) or (count and name in (*row.part.scenario.must, "moves")):
            yield f"{size(count) if name == 'far' else f'{count:,}'} {words}"


def _problems(
    part: Part, outcome: Outcome, prompts: Sequence[Prompt], wrong: Sequence[str], stock: Outcome
) -> Iterator[str]:
    trained = part.scenario.model == "trained"
    if part.fault:
        if not wrong:
            yield "every answer is right in spite of the damage, so this proves nothing"
        return
    if wrong and not trained:
        yield f"{len(wrong)} part from stock vLLM's where that was sure of another token"
    elif wrong:
        question, answer = prompts[int(wrong[0])].question, outcome.answers[wrong[0]]
        yield (
            f"{len(wrong)} wrong, the first to {to_text(question.tokens)!r}: "
            f"{to_text(answer[:ANSWER_TOKENS])!r}, not {to_text(question.answer)!r}"
        )
    if missing := len(prompts) - len(outcome.answers) - outcome.counts.aborted:
        yield f"{missing} without an answer"
    if trained and (
        differing := sum(stock.answers.get(number, answer) != answer for number, answer in outcome.answers.items())
    ):
        yield f"{differing} different from stock vLLM's"
    for name in part.scenario.must:
        if _must(part, name) and not getattr(outcome.counts, name):
            yield f"{MISSING[name]}, so this proves nothing"
    if outcome.usage_at_end:
        yield f"{outcome.usage_at_end:.1%} of the memory is in use after the last request"


def _must(part: Part, name: Count) -> bool:
    """Whether a count has to be more than 0: only elastic has extents, and what stock vLLM caches is its own matter."""
    if part.side == "stock" and name in ("far", "hit_tokens", "evictions", "loads", "unpacked"):
        return False
    return name in part.scenario.must and (name != "moves" or part.side == "elastic")

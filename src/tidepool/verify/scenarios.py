"""What `tidepool verify` puts the memory through, made from fixed seeds: equal on every side and on every machine.

In most scenarios memory is so small that what they are named for has to happen, and `Scenario.must` names the counts
that prove it. All sides get the same bytes and requests. Texts are few and short, since two cores without AVX-512 read
400 tokens a second each. Controls are parts with damage done on purpose: they have to fail.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random
from typing import Literal

from tidepool.cache import StateFormat
from tidepool.sides import Side
from tidepool.verify.task import ANSWER_TOKENS, Prompt, make_conversation, make_prompts

Count = Literal[
    "cut", "preemptions", "moves", "hit_tokens", "evictions", "aborted", "far", "accepted", "loads", "unpacked"
]
"""Something that happens to requests or memory, see `tidepool.verify.messages.Counts`."""

Model = Literal["trained", "nemotron-h"]
"""The trained model, whose answers are right or wrong, or one of random weights (`tidepool.testing.tiny`), whose
answers are compared with stock vLLM's."""

Mode = Literal["eager", "graphs", "default"]
"""Step by step, with CUDA graphs of decode steps, or as vLLM does by default, with torch.compile and more graphs. With
torch.compile an engine takes minutes to start, as kernels are tuned anew for each, and seconds without."""

Fault = Literal["", "copies", "offsets", "loads", "packs"]
FAULTS: dict[Fault, str] = {
    "copies": "copies left out",
    "offsets": "offsets cut",
    "loads": "loads left out",
    "packs": "packing left out",
}
"""Damage that a control does on purpose: states that prefix hits continue from aren't copied, or they are copied from
and to what is left of an address when its highest bits are cut off; or nothing comes from host memory; or states aren't
packed before they are unpacked."""

RANDOM_TOKENS = 16
"""Tokens of an answer of random weights."""
MAX_NUM_SEQS = 32
"""Requests that may run at once."""


@dataclass(frozen=True)
class Scenario:
    """An engine and what it is asked."""

    name: str
    title: str
    requests: Callable[[], list[Prompt]]
    """The questions, in the order in which they are sent."""
    kv_bytes: int
    must: tuple[Count, ...] = ()
    """What has to happen at least once; extents only move in the elastic partition."""
    caching: bool = False
    """Whether prefix caching is on."""
    step_tokens: int = 16_384
    """Tokens in an engine step at most, vLLM's ``max_num_batched_tokens``: longer prompts are cut."""
    chunk_tokens: int = 0
    """Tokens of one prompt in a step at most, so that many prompts are read side by side; 0 for no limit."""
    at_once: int = 1_000
    """Requests under way at once, counting those that wait for memory."""
    fixed_seqs: int = MAX_NUM_SEQS
    """Requests that may run at once in the fixed partition, which sets their states aside."""
    aborts: bool = False
    """Whether every third request is aborted while it runs."""
    model: Model = "trained"
    far: bool = False
    """Whether blocks are handed out from the end of the memory; on a GPU of as much as vLLM would take."""
    graph_sizes: tuple[int, ...] = ()
    """Batch sizes for which CUDA graphs are captured, if not vLLM's own; only a GPU has any."""
    mode: Mode = "graphs"
    """How a GPU runs it."""
    host_gib: float = 0.0
    """GiB of host memory behind tidepool's pools; stock vLLM has none."""
    checkpoint_states: StateFormat = "same"
    """In which format the elastic partition keeps states that are only cached."""

    @property
    def answer_tokens(self) -> int:
        """Tokens of each answer."""
        return ANSWER_TOKENS if self.model == "trained" else RANDOM_TOKENS


def _plain() -> list[Prompt]:
    return [
        *make_prompts(1, length=4_000, stories=1, questions=1),
        *make_prompts(2, length=120, stories=6, questions=2),
    ]


def _cut() -> list[Prompt]:
    return make_prompts(3, length=200, stories=3, questions=4)


def _preempted() -> list[Prompt]:
    return make_prompts(4, length=700, stories=2, questions=6)


def _moves() -> list[Prompt]:
    longs = make_prompts(5, length=1_300, stories=2, questions=2)
    shorts = make_prompts(6, length=80, stories=12, questions=2)
    return [prompt for wave in range(2) for prompts in (longs, shorts) for prompt in prompts[wave::2]]


def _shared() -> list[Prompt]:
    """Visits to four stories, two by two, that come back; every visit has six new questions.

    Half of the stories end right behind 1,280 tokens, which are whole blocks and checkpoints on every side. Hits in
    the others end within a block, so that its state is copied.
    """
    lengths = (1_290, 700)
    questions = [
        iter(make_prompts(7 + story, length=lengths[story % 2], stories=1, questions=20)) for story in range(4)
    ]
    visits = [story + first for first in (0, 0, 2, 2, 0) for story in range(2)]
    return [prompt for story in visits for _, prompt in zip(range(6), questions[story], strict=False)]


def _aborts() -> list[Prompt]:
    prompts = make_prompts(11, length=650, stories=3, questions=10)
    Random(0).shuffle(prompts)
    return prompts


def _host() -> list[Prompt]:
    """Five rounds through four stories, of which the device's memory holds one or two."""
    questions = [make_prompts(41 + story, length=700, stories=1, questions=15) for story in range(4)]
    return [prompt for visit in range(5) for story in questions for prompt in story[3 * visit : 3 * visit + 3]]


def _turns() -> list[Prompt]:
    """Twenty turns of three conversations: each goes on from a state that was packed at the end of the one before."""
    conversations = [make_conversation(51 + number, length=1_500, turns=20) for number in range(3)]
    return [prompt for turn in zip(*conversations, strict=True) for prompt in turn]


def _again() -> list[Prompt]:
    """Questions about two texts, and all of them a second time when the first have been answered."""
    prompts = make_prompts(21, length=700, stories=2, questions=6)
    return [*prompts, *prompts]


def _batches() -> list[Prompt]:
    """As many as there may be at once and more, of many lengths: batches shrink one by one as they end."""
    return [
        prompt
        for length in range(60, 400, 24)
        for prompt in make_prompts(length, length=length, stories=1, questions=2)
    ]


def _drafted() -> list[Prompt]:
    return make_prompts(5, length=300, stories=4, questions=4)


MB = 1_000_000
PLAIN = Scenario("plain", "plain batch", _plain, 100 * MB)
CUT = tuple(
    Scenario(
        f"cut-{tokens}", f"steps of {tokens:,} tokens", _cut, 60 * MB, must=("cut",), step_tokens=tokens, mode="eager"
    )
    for tokens in (48, 256, 1_024)
)
PREEMPTED = Scenario(
    "preempted",
    "too little memory",
    _preempted,
    18 * MB,
    must=("preemptions",),
    chunk_tokens=128,
    at_once=16,
    mode="eager",
)
MOVES = Scenario(
    "moves",
    "long and short in turn",
    _moves,
    12 * MB,
    must=("moves",),
    chunk_tokens=256,
    at_once=16,
    mode="eager",
)
SHARED = Scenario(
    "shared",
    "shared prefixes",
    _shared,
    18 * MB,
    must=("hit_tokens", "evictions"),
    caching=True,
    at_once=4,
    fixed_seqs=2,
    mode="default",
)
ABORTS = Scenario(
    "aborts",
    "aborts",
    _aborts,
    18 * MB,
    must=("aborted",),
    caching=True,
    step_tokens=512,
    at_once=8,
    aborts=True,
    mode="eager",
)
FAR = Scenario(
    "far",
    "far from the start",
    _again,
    # Much of it stays free, though states are also kept where nothing else needs the memory.
    120 * MB,
    must=("hit_tokens", "far"),
    caching=True,
    at_once=6,
    fixed_seqs=8,
    far=True,
    graph_sizes=(1, 2, 4, 8),
)
OTHER = Scenario(
    "mamba2",
    "Mamba2, random weights",
    _again,
    30 * MB,
    must=("hit_tokens", "evictions"),
    caching=True,
    at_once=6,
    model="nemotron-h",
    mode="default",
)
OTHER_FAR = replace(FAR, name="mamba2-far", title="Mamba2, far", model="nemotron-h", kv_bytes=240 * MB)
HOST = Scenario(
    "host", "host memory", _host, 14 * MB, must=("loads",), caching=True, at_once=3, fixed_seqs=2, host_gib=0.1
)
OTHER_HOST = replace(HOST, name="mamba2-host", title="Mamba2, host memory", model="nemotron-h", kv_bytes=20 * MB)
PACKED = Scenario(
    "packed",
    "packed states, 20 turns",
    _turns,
    22 * MB,
    must=("hit_tokens", "unpacked"),
    caching=True,
    at_once=3,
    checkpoint_states="int8",
    mode="default",
)
OTHER_PACKED = replace(
    OTHER,
    name="mamba2-packed",
    title="Mamba2, packed states",
    kv_bytes=40 * MB,
    must=("hit_tokens", "unpacked"),
    checkpoint_states="int8",
    mode="eager",
)
GRAPHS = Scenario("graphs", "CUDA graphs of few sizes", _batches, 200 * MB, graph_sizes=(1, 2, 4, 8, 16), at_once=24)
DRAFTS = Scenario("drafts", "drafts", _drafted, 60 * MB, must=("hit_tokens", "accepted"), caching=True)
DRAFT_BYTES = 6 * MB
"""Of memory more for each draft token of a step but a single one."""
SCENARIOS = {
    each.name: each
    for each in (
        PLAIN,
        *CUT,
        PREEMPTED,
        MOVES,
        SHARED,
        ABORTS,
        FAR,
        HOST,
        OTHER,
        OTHER_FAR,
        OTHER_HOST,
        PACKED,
        OTHER_PACKED,
        GRAPHS,
        DRAFTS,
    )
}


@dataclass(frozen=True)
class Part:
    """A scenario on one side."""

    scenario: Scenario
    side: Side
    poison: bool = False
    """Whether freed and moved memory is filled with values that show up wherever they are read."""
    fault: Fault = ""
    """What a control damages."""
    runner: int = 0
    """vLLM's first or second model runner; 0 for the one that vLLM chooses."""

    @property
    def memory(self) -> str:
        """The side, for people."""
        words = (self.side, "poison" * self.poison, FAULTS.get(self.fault, ""), self.runner and f"runner {self.runner}")
        return ", ".join(str(word) for word in words if word)

    @property
    def engine(self) -> tuple[str, bool]:
        """Parts of one process for which this is equal run on one engine, a control after what it is a control for."""
        return self.scenario.name, self.poison


def _on(side: Side, *scenarios: Scenario, poison: bool = False, fault: Fault = "") -> tuple[Part, ...]:
    return tuple(Part(scenario, side, poison, fault) for scenario in scenarios)


def _with_control(scenario: Scenario) -> tuple[Part, ...]:
    fault = _CONTROLS.get(scenario.name)
    return (*_on("elastic", scenario), *(_on("elastic", scenario, fault=fault) if fault else ()))


_CONTROLS: dict[str, Fault] = {SHARED.name: "copies", FAR.name: "offsets", HOST.name: "loads", PACKED.name: "packs"}
_ALL = tuple(each for each in SCENARIOS.values() if each not in (GRAPHS, DRAFTS))
PARTS = (
    *(part for scenario in _ALL for part in _with_control(scenario)),
    *_on("elastic", MOVES, SHARED, HOST, PACKED, OTHER, OTHER_PACKED, poison=True),
    # What random weights answer hardly depends on a state that is merely another one.
    *_on("elastic", OTHER, poison=True, fault="copies"),
    *_on("stock", *_ALL),
    *_on("fixed", SHARED, FAR, OTHER_FAR),
)
"""All that runs everywhere, the side with most to do first."""
DRAFT_PARTS = (*_on("elastic", DRAFTS), *_on("elastic", DRAFTS, poison=True), *_on("stock", DRAFTS))
GPU_PARTS = (
    *_on("elastic", GRAPHS),
    *_on("elastic", GRAPHS, poison=True),
    *_on("stock", GRAPHS),
    *_on("fixed", GRAPHS),
)
RUNNERS = (2, 1)
"""vLLM's model runners on a GPU; the CPU has the first alone."""
QUICK_PARTS = (*_on("elastic", PREEMPTED, MOVES, SHARED), *_on("stock", PREEMPTED, MOVES, SHARED))


def choose_parts(
    *,
    quick: bool = False,
    gpu: bool = False,
    drafts: str = "",
    draft_tokens: int = 1,
    ranks: int = 1,
    checkpoint_states: StateFormat | None = None,
) -> tuple[Part, ...]:
    """What to run.

    Args:
        quick: three scenarios on stock vLLM and elastic.
        gpu: whether on a GPU, with both model runners.
        drafts: ``ngram`` or ``mtp`` where drafts are proposed, in all scenarios; only Qwen3.5 has a head for ``mtp``.
        draft_tokens: how many in a step; each takes another state of every request.
        ranks: with several, damage can't be done to workers in processes of their own.
        checkpoint_states: the format of cached states in all scenarios, in place of their own. The memory then holds
            more than it is there for, so nothing has to be evicted, and controls damage what isn't used.
    """
    parts = QUICK_PARTS if quick else PARTS + DRAFT_PARTS * bool(drafts)
    if gpu:
        chosen = parts if quick else parts + GPU_PARTS
        # Poison that reaches random weights' answers there ends the engine: they aren't tokens any more.
        chosen = tuple(part for part in chosen if part.scenario.model == "trained" or not part.fault)
        parts = tuple(replace(part, runner=runner) for runner in RUNNERS for part in chosen)
    if checkpoint_states:
        parts = tuple(replace(part, scenario=_packing(part.scenario, checkpoint_states)) for part in parts)
    if drafts:
        parts = tuple(replace(part, scenario=_drafting(part.scenario, draft_tokens)) for part in parts)
    return tuple(
        part
        for part in parts
        if not (part.fault and (ranks > 1 or checkpoint_states))
        # With drafts a state that is hit is read from where it was found.
        and not (drafts and part.fault in ("copies", "offsets"))
        and (drafts != "mtp" or part.scenario.model == "trained")
        # Drafts take as many states more, which so little memory can't set aside.
        and not (drafts and part.side == "fixed")
    )


def _packing(scenario: Scenario, checkpoint_states: StateFormat) -> Scenario:
    """A scenario with another format of cached states."""
    return replace(_without(scenario, "evictions", "loads", "unpacked"), checkpoint_states=checkpoint_states)


def _drafting(scenario: Scenario, draft_tokens: int) -> Scenario:
    """A scenario with memory for drafts, which may then be too large for what has to happen in a small one."""
    if draft_tokens == 1:
        return scenario
    roomy = _without(scenario, "evictions", "loads", "preemptions", "moves")
    return replace(roomy, kv_bytes=scenario.kv_bytes + draft_tokens * DRAFT_BYTES)


def _without(scenario: Scenario, *counts: Count) -> Scenario:
    """A scenario in which these needn't happen."""
    return replace(scenario, must=tuple(count for count in scenario.must if count not in counts))

"""The parts of a replay that need no vLLM: traces, generated workloads, the clock, figures, the page."""

import gzip
import html
import json
import random
import re
import time
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given, settings, strategies as st
from typer.testing import CliRunner

from tidepool.gpus import GPUS
from tidepool.models import ModelConfigError, entry, model_from_config
from tidepool.models.mixers import CacheOptions
from tidepool.replay.answers import with_answers, with_own_tokens, without_reasoning
from tidepool.replay.bound import attention_only
from tidepool.replay.clock import STEP_OVERHEAD, Work, cost_model
from tidepool.replay.command import replay
from tidepool.replay.comparison import curves_of, gain, render_comparison
from tidepool.replay.drafts import Drafts
from tidepool.replay.fits import split, too_small
from tidepool.replay.formats import read_trace
from tidepool.replay.generate import WORKLOADS, generate
from tidepool.replay.inputs import parse_modes
from tidepool.replay.job import MODES, USES, GroupLayout, HostFigures, Job, Mode, Result, Sample, Spread
from tidepool.replay.model import find_replay_model, language_config, without_weights
from tidepool.replay.page import render_page
from tidepool.replay.plot import round_step
from tidepool.replay.report import Report, Setting, mean_uses, read_report, rows, verdict
from tidepool.replay.sampling import FEWEST, Sampler
from tidepool.replay.statistics import median, percentile, spread
from tidepool.replay.trace import GENERATED_TOKEN, Skipped, TraceError, TraceRequest, sentences
from tidepool.replay.workload import Workload, leave_out_long, load_workload


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines), "utf-8")
    return path


def read(path: Path, *lines: object) -> list[TraceRequest]:
    """The requests of a trace, with their answers."""
    return with_answers(read_trace(write(path / "t.jsonl", *lines)).requests)


def answer(request: TraceRequest) -> list[int]:
    return [token for run in request.answer for token in run]


# Traces.


def test_hash_ids_stand_for_fixed_tokens(tmp_path: Path) -> None:
    first = {"timestamp": 1500, "input_length": 1000, "output_length": 7, "hash_ids": [0, 5]}
    second = {"timestamp": 500, "input_length": 1024, "output_length": 1, "hash_ids": [0, 6]}
    late, early = read(tmp_path, first, "", second)[::-1]
    assert (early.arrival, late.arrival) == (0.5, 1.5)
    assert (late.input_tokens, late.output_tokens) == (1000, 7)
    a, b = late.prompt(), early.prompt()
    assert (len(a), len(b)) == (1000, 1024)
    assert a[:512] == b[:512]
    assert not set(a[512:]) & set(b[512:])
    assert GENERATED_TOKEN not in a


def test_blocks_of_another_size_and_plain_tokens(tmp_path: Path) -> None:
    hashed = {"output_length": 2, "hash_ids": [3, 4], "block_size": 16}
    plain = {"output_length": 2, "token_ids": [9, 9, 8]}
    one, two = read(tmp_path, hashed, plain)
    assert one.input_tokens == len(set(one.prompt())) == 32
    assert two.prompt() == [9, 9, 8]


def test_only_the_first_requests_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", *[{"output_length": 1, "token_ids": [1]}] * 5, "not JSON")
    assert len(read_trace(path, 5, strict=True).requests) == 5
    with pytest.raises(TraceError, match="line 6: not valid JSON"):
        read_trace(path, strict=True)


def test_what_is_no_request_is_left_out_and_counted(tmp_path: Path) -> None:
    good = {"output_length": 1, "token_ids": [1]}
    trace = read_trace(write(tmp_path / "t.jsonl", good, "[", good | {"timestamp": float("nan")}, good, "]"))
    assert [request.line for request in trace.requests] == [1, 4]
    assert [each.line for each in trace.skipped] == [2, 3, 5]
    assert sentences(trace.skipped) == [
        "Left out: 2 requests, not valid JSON (lines 2, 5).",
        'Left out: 1 request, "timestamp" must be milliseconds from 0 (line 3).',
    ]
    assert sentences([Skipped(n, "bad") for n in range(1, 9)]) == [
        "Left out: 8 requests, bad (lines 1, 2, 3, 4, 5, ...)."
    ]


def test_what_is_too_long_is_left_out_and_counted() -> None:
    requests = [TraceRequest(0, (range(tokens),), tokens, 10, line=tokens) for tokens in (80, 90, 91)]
    made = leave_out_long(Workload(requests), 100, "that are served")
    assert made.requests == requests[:2]
    assert sentences(made.skipped) == ["Left out: 1 request, longer than the 100 tokens that are served (line 91)."]
    for tokens, strict in ((100, True), (50, False)):
        with pytest.raises(TraceError, match=r"The request of line .* tokens\) is longer than the .*\.$"):
            leave_out_long(Workload(requests), tokens, "that are served", strict=strict)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[]", "must be a JSON object"),
        ({"output_length": 1}, '"token_ids" or "hash_ids"'),
        ({"output_length": 0, "token_ids": [1]}, '"output_length" must be a positive'),
        ({"output_length": True, "token_ids": [1]}, '"output_length" must be a positive'),
        ({"output_length": 1, "token_ids": []}, "is empty"),
        ({"output_length": 1, "token_ids": [1.5]}, "whole numbers"),
        ({"output_length": 1, "hash_ids": []}, '"input_length" must be a positive'),
        ({"output_length": 1, "hash_ids": [1], "input_length": 513}, "too few"),
        ({"output_length": 1, "hash_ids": [1], "block_size": 0}, '"block_size" must be a positive'),
        ({"output_length": 1, "token_ids": [1], "timestamp": -1}, '"timestamp"'),
        ('{"output_length": 1, "token_ids": [1], "timestamp": NaN}', '"timestamp"'),
        ('{"output_length": 1, "token_ids": [1], "timestamp": 1e999}', '"timestamp"'),
        ({"output_length": 1, "token_ids": [1], "timestamp": 10**400}, '"timestamp"'),
        ({"output_length": 10**30, "token_ids": [1]}, '"output_length"'),
        ({"output_length": 1, "token_ids": [1 << 70]}, "below 2\\^62"),
        ({"output_length": 1, "hash_ids": [1 << 50]}, "below 2\\^40"),
        ({"output_length": 1, "hash_ids": [1], "block_size": 10**9}, '"block_size" must be at most'),
        ({"output_length": 1, "token_ids": [1], "lora": {}}, "must be names"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_a_bad_line_is_one_sentence(tmp_path: Path, line: object, message: str) -> None:
    with pytest.raises(TraceError, match=message) as caught:
        read_trace(write(tmp_path / "t.jsonl", line))
    assert str(caught.value).endswith(".")
    assert "line 1" in str(caught.value)


def test_an_empty_or_missing_trace_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="no requests"):
        read_trace(write(tmp_path / "t.jsonl", ""))
    with pytest.raises(TraceError, match="No such file"):
        read_trace(tmp_path / "missing.jsonl")


def test_gzipped_traces_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", {"output_length": 2, "token_ids": [9, 9, 8]})
    packed = tmp_path / "packed"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read_trace(packed) == read_trace(path)
    for content in (packed.read_bytes()[:-9], packed.read_bytes()[:10] + b"\xff" * 30, b"\x1f\x8b"):
        packed.write_bytes(content)
        with pytest.raises(TraceError, match=r"Can't read .*gzip data is broken\.$"):
            read_trace(packed)


# Answers.

SIZE = 16
Turn = tuple[int, int, int]
"""Tokens that a user adds, tokens of the answer, and which earlier turn is gone on from."""


def hashed(tokens: list[int], ids: dict[tuple[int, ...], int]) -> list[int]:
    """An id for each block of a prompt and all before it, the last one cut, as services record them."""
    ends = [*range(SIZE, len(tokens), SIZE), len(tokens)]
    return [ids.setdefault(tuple(tokens[:end]), len(ids)) for end in ends]


def shared(one: list[int], other: list[int]) -> int:
    """Tokens that both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


turns = st.lists(st.tuples(st.integers(1, 3 * SIZE), st.integers(1, 3 * SIZE), st.integers(0, 5)), max_size=12)


@settings(deadline=None)
@given(st.integers(0, 2 * SIZE), turns, st.booleans())
def test_what_a_conversation_recorded_is_found_again(
    tmp_path_factory: pytest.TempPathFactory, system: int, turns: list[Turn], plain: bool
) -> None:
    """Conversations that go on from any of their turns, some several times, and others that begin beside them."""
    fresh = iter(range(10_000))
    common = [next(fresh) for _ in range(system)]
    prompts: list[list[int]] = []
    said: list[list[int]] = []
    goes_on: list[int | None] = []
    for added, length, back in [(2 * SIZE, 3, 0), *turns]:
        earlier = len(prompts) - back if 0 < back <= len(prompts) else None
        past = common if earlier is None else prompts[earlier] + said[earlier]
        prompts.append([*past, *(next(fresh) for _ in range(added))])
        said.append([next(fresh) for _ in range(length)])
        goes_on.append(earlier)
    ids: dict[tuple[int, ...], int] = {}
    lines = [
        {"timestamp": time, "output_length": len(a), "input_length": len(p), "block_size": SIZE}
        | ({"token_ids": p} if plain else {"hash_ids": hashed(p, ids)})
        for time, (p, a) in enumerate(zip(prompts, said, strict=True))
    ]
    made = read(tmp_path_factory.mktemp("trace"), *lines)
    assert [r.input_tokens for r in made] == [len(r.prompt()) for r in made] == list(map(len, prompts))
    found = [answer(r) for r in made]
    assert all(len(a) in (0, len(s)) for a, s in zip(found, said, strict=True))
    for later, earlier in enumerate(goes_on):
        if earlier is None or len(prompts[earlier]) < system + SIZE:
            continue
        ancestors = {earlier}
        while (before := goes_on[min(ancestors)]) is not None:
            ancestors.add(before)
        full = prompts[earlier][: len(prompts[earlier]) // SIZE * SIZE]
        # From which of several prompts with the same full blocks it goes on isn't recorded.
        if not any(prompts[other][: len(full)] == full for other in set(range(later)) - ancestors):
            text = made[earlier].prompt() + found[earlier]
            assert len(text) == len(prompts[earlier]) + len(said[earlier])
            assert text == made[later].prompt()[: len(text)]
    # Full blocks are shared as recorded.
    for one, other in zip(made, prompts, strict=True):
        for two, another in zip(made, prompts, strict=True):
            assert shared(one.prompt(), two.prompt()) // SIZE == shared(other, another) // SIZE


def test_an_answer_that_has_no_room_in_the_next_prompt_is_of_its_own_tokens(tmp_path: Path) -> None:
    first = {"timestamp": 0, "input_length": 20, "block_size": 16, "hash_ids": [1, 2]}
    later = {"timestamp": 1, "input_length": 40, "block_size": 16, "hash_ids": [1, 3, 4], "output_length": 5}
    made = read(tmp_path, first | {"output_length": 20}, later)
    assert answer(made[0]) == made[1].prompt()[20:40]
    assert made[0].prompt() == made[1].prompt()[:20]
    made = read(tmp_path, first | {"output_length": 21}, later)
    assert answer(made[0]) == []
    assert made[0].prompt() == made[1].prompt()[:20]
    own = [answer(r) for r in with_own_tokens(made)]
    assert list(map(len, own)) == [21, 5]
    assert len({*own[0], *own[1]}) == 26
    assert not {*own[0], *own[1]} & {token for r in made for token in r.prompt()}


def recorded(tmp_path: Path, *prompts: tuple[list[int], int], block: int = 16) -> list[TraceRequest]:
    """Requests by hash ids and lengths of their prompts, one a millisecond, with answers of 9 tokens."""
    lines = [
        {"timestamp": at, "hash_ids": ids, "input_length": tokens, "output_length": 9, "block_size": block}
        for at, (ids, tokens) in enumerate(prompts)
    ]
    return read(tmp_path, *lines)


def test_nobody_goes_on_from_a_shared_beginning(tmp_path: Path) -> None:
    """A system prompt fills the only full block of the second prompt."""
    made = recorded(tmp_path, ([1, 2, 3], 40), ([1, 4], 20), ([1, 5, 6], 47))
    assert [answer(r) for r in made] == [[], [], []]
    assert shared(made[1].prompt(), made[2].prompt()) == 16


def test_of_equal_prompts_the_last_one_is_gone_on_from_first(tmp_path: Path) -> None:
    made = recorded(tmp_path, ([1, 2], 20), ([1, 2], 20), ([1, 3], 32), ([1, 4], 32))
    assert answer(made[1]) == made[2].prompt()[20:29]
    assert answer(made[0]) == made[3].prompt()[20:29]
    assert made[2].prompt()[:20] == made[3].prompt()[:20] == made[0].prompt()


def test_a_shorter_prompt_goes_on_from_no_longer_one(tmp_path: Path) -> None:
    longer, shorter, later = recorded(tmp_path, ([1, 2], 28), ([1, 3], 20), ([1, 4, 5], 40))
    assert shared(longer.prompt(), shorter.prompt()) == 16
    assert answer(shorter) == later.prompt()[20:29]


def test_a_hash_id_may_stand_for_a_part_of_its_block(tmp_path: Path) -> None:
    first, later, again = recorded(tmp_path, ([1, 2], 20), ([1, 2, 3], 40), ([1, 2], 27))
    assert answer(first) == later.prompt()[20:29]
    assert later.prompt()[:32] == [*range(1016, 1048)]
    assert again.prompt() == later.prompt()[:27]


def test_blocks_of_two_sizes_keep_apart(tmp_path: Path) -> None:
    line: dict[str, object] = {"output_length": 9, "block_size": 16}
    lines = [line | {"hash_ids": [0, 1]}, line | {"hash_ids": [0], "block_size": 32}, line | {"hash_ids": [0, 1, 2]}]
    made = read(tmp_path, *[line | {"timestamp": at} for at, line in enumerate(lines)])
    assert answer(made[0]) == made[2].prompt()[32:41]


def test_recorded_tokens_must_be_equal_up_to_the_end(tmp_path: Path) -> None:
    first = [*range(20)]
    for last, found in ((19, True), (18, False)):
        prompts = first, [*first[:-1], last, *range(30, 50)]
        made = read(tmp_path, *[{"timestamp": at, "token_ids": p, "output_length": 9} for at, p in enumerate(prompts)])
        assert [r.prompt() for r in made] == list(prompts)
        assert answer(made[0]) == (prompts[1][20:29] if found else [])


def test_reasoning_is_dropped_from_a_share_of_the_answers() -> None:
    made = generate("chat", 400, 0)
    few, many = (without_reasoning(made, share, 1) for share in (0.25, 0.75))
    dropped = [{index for index, r in enumerate(each) if not r.answer} for each in (few, many)]
    assert 0.2 < len(dropped[0]) / 400 < 0.3
    assert 0.7 < len(dropped[1]) / 400 < 0.8
    assert dropped[0] < dropped[1]
    assert [r.runs for r in many] == [r.runs for r in made]
    assert without_reasoning(made, 0, 1) == made


def test_a_workload_is_loaded_with_answers(tmp_path: Path) -> None:
    job = Job("stock", {}, "H100", 1, None, "chat", 50, 3, 1.0, 256, 8192)
    assert load_workload(job).requests == generate("chat", 50, 3)
    dropped = load_workload(replace(job, drop_reasoning=1.0)).requests
    assert not {t for r in dropped for t in answer(r)} & {t for r in dropped for t in r.prompt()}
    path = write(tmp_path / "t.jsonl", {"output_length": 2, "token_ids": list(range(40))})
    (request,) = load_workload(replace(job, workload=None, trace=str(path))).requests
    assert answer(request) == [40, 41]


# Generated workloads.


@pytest.mark.parametrize("workload", WORKLOADS)
def test_generated_requests_depend_on_the_seed_alone(workload: str) -> None:
    made = generate(workload, 60, 3)
    assert made == generate(workload, 60, 3)
    assert made != generate(workload, 60, 4)
    assert len(made) == 60
    assert [r.arrival for r in made] == sorted(r.arrival for r in made)
    assert all(r.input_tokens == len(r.prompt()) > 0 and r.output_tokens > 0 for r in made)


def endless_hit_rate(workload: str, block: int = 16) -> float:
    """Share of prompt tokens in whole blocks that an earlier request had, with a cache that forgets nothing."""
    seen: set[int] = set()
    hits = total = 0
    for request in generate(workload, 150, 0):
        prompt, prefix, matched = request.prompt(), 0, True
        total += len(prompt)
        for start in range(0, len(prompt) - block, block):
            prefix = hash((prefix, tuple(prompt[start : start + block])))
            matched &= prefix in seen
            hits += block * matched
            seen.add(prefix)
    return hits / total


def test_workloads_share_what_their_names_say() -> None:
    assert endless_hit_rate("random") == 0
    assert endless_hit_rate("hot-prefix") > 0.75
    assert endless_hit_rate("agent") > 0.8
    assert 0.5 < endless_hit_rate("tree") < 0.95
    assert 0.2 < endless_hit_rate("chat") < 0.9
    assert 0.4 < endless_hit_rate("documents") < 0.8


def test_a_turn_contains_what_the_last_one_generated() -> None:
    chats = generate("chat", 300, 0)
    told = {tuple(r.runs): r.answer for r in chats}
    later = [r for r in chats if len(r.runs) > 2]
    assert later
    assert all(told[tuple(r.runs[:-2])] == (r.runs[-2],) for r in later)


def test_an_unknown_workload_names_the_known() -> None:
    with pytest.raises(TraceError, match="hot-prefix"):
        generate("cold", 1, 0)


# The clock.

NAMES = ["Qwen3.5-4B", "Nemotron-3-Nano-4B", "Qwen3-Next-80B-A3B", "Llama-3.1-8B"]
COSTS = {(name, card): cost_model(entry(name).config, gpu) for name in NAMES for card, gpu in GPUS.items()}
works = st.builds(
    Work,
    tokens=st.integers(1, 8192),
    pairs=st.floats(1, 1e9),
    context_tokens=st.integers(1, 10**7),
    requests=st.integers(1, 256),
)


@given(st.sampled_from(list(COSTS)), works, works)
def test_more_work_never_takes_less_time(key: tuple[str, str], one: Work, other: Work) -> None:
    both = Work(
        one.tokens + other.tokens,
        one.pairs + other.pairs,
        one.context_tokens + other.context_tokens,
        one.requests + other.requests,
    )
    apart = [COSTS[key].seconds(work) for work in (one, other)]
    assert max(apart) <= COSTS[key].seconds(both) <= sum(apart)
    assert min(apart) > STEP_OVERHEAD


@given(works)
def test_a_faster_card_is_never_slower(work: Work) -> None:
    slow, fast, fastest = (COSTS["Qwen3.5-4B", gpu].seconds(work) for gpu in ("A100-80", "H100", "B200"))
    assert slow >= fast >= fastest


def test_prefill_is_bound_by_arithmetic_and_decode_by_memory() -> None:
    """A 4B model on an H100: over 100 ms of arithmetic for 8,192 tokens, about 3 ms of weights to read for one."""
    costs = COSTS["Qwen3.5-4B", "H100"]
    chunk = costs.seconds(Work(8192, 8192 * 4096, 8192, 1)) - STEP_OVERHEAD
    token = costs.seconds(Work(1, 4096, 4096, 1)) - STEP_OVERHEAD
    assert 0.1 < chunk < 0.2
    assert token == pytest.approx(costs.plain_bytes / 3.35e12 / 0.75, rel=0.1)


def test_experts_are_read_only_as_far_as_tokens_choose_them() -> None:
    costs = COSTS["Qwen3-Next-80B-A3B", "H200"]
    assert 2e9 < costs.plain_weights + costs.expert_weights * costs.expert_share < 4e9
    one, many = (costs.seconds(Work(n, n, n, n)) for n in (1, 256))
    assert one < many / 4


# The bound.


@pytest.mark.parametrize("name", ["Qwen3.5-4B", "Nemotron-3-Nano-4B", "Qwen3.5-27B", "Falcon-H1-7B"])
def test_the_bound_keeps_the_same_attention_and_no_states(name: str) -> None:
    hybrid = model_from_config(entry(name).config).layer_caches(CacheOptions()).values()
    bound = model_from_config(attention_only(entry(name).config)).layer_caches(CacheOptions()).values()
    attention = [cache for cache in hybrid if type(cache).__name__ == "FullAttention"]
    assert list(bound) == attention


def test_the_bound_refuses_what_has_no_plain_attention() -> None:
    with pytest.raises(ModelConfigError, match="leave it out"):
        attention_only(entry("Mamba-Codestral-7B").config)


# Figures, samples, reports.


@given(st.lists(st.floats(0, 1e6), min_size=1))
def test_percentiles_are_values_in_order(values: list[float]) -> None:
    made = spread(values)
    assert {made.p50, made.p95, made.p99} <= set(values)
    assert min(values) <= made.p50 <= made.p95 <= made.p99 <= max(values)


def test_percentiles_of_a_hundred() -> None:
    values = list(range(1, 101))
    random.Random(0).shuffle(values)
    assert spread(values) == Spread(50.5, 50, 95, 99)
    assert median([3, 1, 2]) == 2
    assert percentile([7], 0.99) == 7


@given(st.floats(1e-3, 1e12))
def test_axes_have_a_few_round_steps(top: float) -> None:
    assert 2.99 < top / round_step(top) < 6.01


def sample(seconds: float, *uses: int) -> Sample:
    return Sample(seconds, 1, 0, 10, 100, (*uses, *[0] * (len(USES) - len(uses))))


def test_samples_stay_few_and_evenly_spread() -> None:
    sampler = Sampler(0.0, lambda: sample(now))
    for step in range(100_000):
        now = step / 20
        sampler.offer(now)
    now = 5000.0
    sampler.close()
    times = [s.seconds for s in sampler.samples]
    gaps = {round(b - a, 3) for a, b in pairwise(times[:-1])}
    assert FEWEST <= len(times) <= 2 * FEWEST
    assert max(gaps) <= 2 * min(gaps)
    assert times[-1] == 5000


def result(mode: Mode = "stock") -> Result:
    groups = [GroupLayout("state", 24, 528, 52, 50), GroupLayout("attention", 8, 16, 5, 5)]
    return Result(
        mode=mode,
        requests=3,
        prompt_tokens=100,
        hit_tokens=25,
        output_tokens=30,
        ttft=Spread(1.0, 1.0, 2.0, 2.0),
        tpot=None,
        e2e=Spread(3.0, 3.0, 4.0, 4.0),
        makespan=10.0,
        preemptions=0,
        running_mean=1.5,
        running_peak=2,
        extents_moved=None if mode == "stock" else 4,
        extents=None,
        extent_bytes=None,
        steps=12,
        scheduler_mean=1e-3,
        scheduler_median=1e-3,
        wall_seconds=0.1,
        block_tokens=16,
        groups=groups,
        samples=[sample(0, 0, 100), sample(6, 100), sample(10, 100)],
    )


def report() -> Report:
    return Report(
        Setting("M<1>", "H100", 100, "t.jsonl", 1.0, 256, 8192), [result(), result("elastic")], {"fixed": "No room."}
    )


def test_a_result_survives_json() -> None:
    content = json.loads(json.dumps(result("elastic").to_dict()))
    assert Result.from_dict(content) == result("elastic")
    assert content["hit_rate"] == 0.25
    assert content["output_rate"] == 3


def test_mean_uses_weigh_by_time() -> None:
    assert mean_uses(result())[:2] == [40, 60]


def test_the_page_needs_nothing_else() -> None:
    page = render_page(report())
    assert "M&lt;1&gt;" in page
    assert "M<1>" not in page
    assert "tidepool fixed can't run: No room." in page.replace("&#x27;", "'")
    assert "http" not in page
    assert "<script" not in page
    assert page.count("<svg") == 5


def test_the_page_says_how_it_was_made_and_what_came_out() -> None:
    made = replace(report().setting, command="tidepool replay <t>", seed=7, versions={"vLLM": "0.32"})
    page = html.unescape(render_page(replace(report(), setting=made, skipped=[Skipped(3, "too long")])))
    assert "tidepool replay <t> (seed 7; vLLM 0.32)" in page
    assert verdict(report().results) in page
    assert "Left out: 1 request, too long (line 3)." in page


def test_all_plots_have_one_axis_of_time() -> None:
    short = replace(result("elastic"), samples=[sample(0, 0, 100), sample(5, 100)])
    page = render_page(replace(report(), results=[result(), short]))
    drawings = page.split("<svg")[1:]
    assert len({tuple(re.findall(r'text-anchor="middle">(\d+)</text>', each)) for each in drawings}) == 1
    assert 'points="58.0' in drawings[-1]
    widest = max(float(x) for x in re.findall(r"([\d.]+),[\d.]+", drawings[-1].split("<polygon")[1]))
    assert widest == pytest.approx(58 + (480 - 58 - 16) / 2, abs=0.1), "half as long"


def test_the_verdict_is_two_sentences() -> None:
    stock = result()
    more = replace(result("elastic"), hit_tokens=50, ttft=replace(stock.ttft, mean=0.5))
    assert verdict([stock, more]) == (
        "On this traffic tidepool elastic finds 50.0% of the prompt tokens in its cache, stock vLLM 25.0%. On average "
        "the first token comes after 500 ms instead of 1.00 s, and the last after 3.00 s with either."
    )
    assert verdict([stock, result("elastic")]) == (
        "On this traffic tidepool elastic and stock vLLM find as much of the prompts in their caches, 25.0%. Requests "
        "take as long with either, 3.00 s on average."
    )
    assert verdict([result("bound")]).startswith("On this traffic attention only finds 25.0%")


def test_hits_are_told_by_tier() -> None:
    host = HostFigures(loaded_bytes=1 << 30, stored_bytes=2 << 30, stalled=0.5, loaded_tokens=10, waited=2.0)
    with_host = replace(result("elastic"), host=host)
    assert Result.from_dict(json.loads(json.dumps(with_host.to_dict()))) == with_host
    told = {row.label.strip(): row.of(with_host) for row in rows([with_host])}
    assert told["of these on the device"] == "15"
    assert told["loaded from the host"] == "10"
    assert told["host memory: bytes loaded"] == "1.00 GiB"
    assert told["requests waited for loads"] == "2.00 s"
    assert [row.of(result()) for row in rows([result(), with_host])].count("-") == 4 + 6 + 1
    assert len(rows([result()])) == len(rows([with_host])) - 6


# Comparisons.


def compared(folder: Path, *changes: dict[str, Any]) -> list[Path]:
    """What replays that differ like this wrote."""
    files = []
    for index, change in enumerate(changes):
        made = replace(report(), setting=replace(report().setting, **change), skipped=[Skipped(2, "bad")])
        files.append(write(folder / f"{index}.json", made.to_dict()))
        assert json.dumps(read_report(files[-1]).to_dict()) == json.dumps(made.to_dict())
    return files


def test_runs_that_differ_by_memory_are_one_curve(tmp_path: Path) -> None:
    files = compared(
        tmp_path, {"kv_bytes": 2 << 30}, {"kv_bytes": 1 << 30}, {"kv_bytes": 1 << 30, "host_bytes": 5 << 30}
    )
    reports = [read_report(file) for file in files]
    curves = curves_of(reports)
    assert {name: [run.setting.kv_bytes >> 30 for run in runs] for name, runs in curves.items()} == {
        "stock vLLM, no host memory": [1, 2],
        "stock vLLM, 5.00 GiB of host memory": [1],
        "tidepool elastic, no host memory": [1, 2],
        "tidepool elastic, 5.00 GiB of host memory": [1],
    }
    page = render_comparison(reports)
    assert page.count("<svg") == 4
    assert page.count("<circle") == 4 * 6
    assert "M<1>" not in page
    assert "M&lt;1&gt;" in page


def test_the_policy_concerns_tidepool_alone(tmp_path: Path) -> None:
    files = compared(tmp_path, {"eviction": "lru"}, {"eviction": "returns", "kv_bytes": 200})
    curves = curves_of([read_report(file) for file in files])
    assert [len(runs) for runs in curves.values()] == [2, 1, 1]
    assert list(curves)[1:] == ["tidepool elastic, evicts by lru", "tidepool elastic, evicts by returns"]


def test_the_least_memory_that_does_as_well_is_named(tmp_path: Path) -> None:
    files = compared(tmp_path, {"kv_bytes": 4 << 30}, {"kv_bytes": 1 << 30})
    assert gain(curves_of([read_report(file) for file in files])) == (
        "Most prompt tokens are found with stock vLLM on 1.00 GiB: 25.0%. No run with less memory comes within a "
        "twentieth of that."
    )


def test_the_command_compares(tmp_path: Path) -> None:
    files = compared(tmp_path, {}, {"kv_bytes": 200})
    app = typer.Typer()
    app.command()(replay)
    out = ["--html", str(tmp_path / "c.html"), "--json", str(tmp_path / "c.json")]
    done = CliRunner().invoke(app, ["--compare", *map(str, files), *out])
    assert done.exit_code == 0, done.output
    assert "25.00%" in done.output
    assert (tmp_path / "c.html").read_text("utf-8").startswith("<!doctype html>")
    content = json.loads((tmp_path / "c.json").read_text("utf-8"))
    assert [run["kv_bytes"] for run in content["stock vLLM"]] == [100, 200]


# Models.


def test_wrappers_are_their_language_model() -> None:
    text = dict(entry("Qwen3.5-0.8B").config)
    untyped = {key: value for key, value in text.items() if key != "model_type"}
    vision = {"vision_config": {"depth": 3, "hidden_size": 5}, "architectures": ["X"], "auto_map": {"a": "b"}}
    for key in ("text_config", "llm_config", "language_config"):
        for kind, nested in (("qwen3_5", untyped), ("some_vl", text)):
            made = language_config({"model_type": kind, "image_token_id": 5, **vision, key: nested})
            assert made == text | {"image_token_id": 5}
    assert language_config(text | {"architectures": ["X"]}) == text


def test_a_model_whose_weights_are_unknown_is_refused(tmp_path: Path) -> None:
    content = entry("Qwen3.5-0.8B").config | {"quantization_config": {"quant_method": "zip"}}
    (tmp_path / "config.json").write_text(json.dumps(content), "utf-8")
    assert "(zip), so how long a step takes" in refused("--generate", "chat", "--model", str(tmp_path))


@pytest.mark.parametrize("whole", [True, False], ids=["folder", "file"])
def test_a_folder_without_weights_is_a_model(tmp_path: Path, whole: bool) -> None:
    text = entry("Qwen3.5-0.8B").config
    quantized = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    content = {"model_type": "qwen3_5", "text_config": text, **quantized}
    (tmp_path / "config.json").write_text(json.dumps(content), "utf-8")
    found = find_replay_model(str(tmp_path if whole else tmp_path / "config.json"))
    assert found.name == tmp_path.name
    assert found.config["model_type"] == "qwen3_5_text"
    assert found.shapes.weight_bytes() < 0.8 * find_replay_model("Qwen3.5-0.8B").shapes.weight_bytes()
    assert "quantization_config" not in without_weights(found.config)
    costs = cost_model(found.config, GPUS["H100"])
    assert costs.plain_bytes < COSTS["Qwen3.5-4B", "H100"].plain_bytes


# What can run.


def test_modes_that_cannot_run_say_so_before_any_starts() -> None:
    config = entry("Qwen3.5-4B").config
    plain = Job("stock", config, "H100", 12 << 30, None, "chat", 9, 0, 1.0, 256, 8192)
    held, refused = split(replace(plain, mode=mode) for mode in MODES)
    assert set(held) == {"stock", "elastic", "bound"}
    assert all(tokens and 300_000 < tokens < 450_000 for tokens in held.values())
    assert "nothing is left for attention" in refused["fixed"]
    modes: tuple[Mode, ...] = ("stock", "elastic", "bound")
    changes: tuple[tuple[dict[str, Any], dict[Mode, str]], ...] = (
        ({"kv_dtype": "nvfp4"}, {"elastic": "kv-cache-dtype"}),
        ({"kv_dtype": "fp8"}, {}),
        ({"kv_dtype": "tqkv-k4v4"}, {"stock": "vLLM has no", "bound": "vLLM has no", "elastic": "CPU"}),
        ({"tp": 2, "draft_tokens": 2}, {}),
        ({"kv_bytes": 1 << 10}, {"stock": "One request needs", "bound": "One request needs", "elastic": "1,024 bytes"}),
    )
    for change, reasons in changes:
        held, refused = split(replace(plain, mode=mode, **change) for mode in modes)
        assert set(refused) == set(reasons)
        assert set(held) == set(modes) - set(reasons)
        assert all(part in refused[mode] for mode, part in reasons.items())


def test_a_mode_too_small_for_the_longest_request_says_what_helps() -> None:
    assert too_small({"stock": None, "elastic": 500, "fixed": 499}, 500) == {
        "fixed": "It holds requests of at most 499 tokens, and the longest has 500: --max-model-len leaves longer ones "
        "out."
    }


# Several devices and drafts on the clock.


def test_devices_share_weights_and_pay_for_sums() -> None:
    config, gpu = entry("Qwen3.5-27B").config, GPUS["H100"]
    one, four = (cost_model(config, gpu, CacheOptions(tp=tp)) for tp in (1, 4))
    decode, prefill = Work(1, 1000, 1000, 1), Work(8192, 8192 * 4096, 8192, 1)
    for work in (decode, prefill):
        faster = (one.seconds(work) - STEP_OVERHEAD) / (four.seconds(work) - STEP_OVERHEAD)
        assert 2 < faster < 4


def test_drafts_write_a_state_each() -> None:
    config, gpu = entry("Qwen3.5-4B").config, GPUS["H100"]
    plain, drafting = (cost_model(config, gpu, CacheOptions(speculative_tokens=k)) for k in (0, 3))
    work = Work(64, 64, 64, 64)
    more = 64 * 3 * plain.state_bytes / (gpu.bandwidth * 0.75)
    assert drafting.seconds(work) - plain.seconds(work) == pytest.approx(more, rel=0.1)


def test_drafts_are_accepted_as_often_as_said() -> None:
    drafts = Drafts(3, 0.6, 1)
    accepted = [drafts.accepted("r", position, 3) for position in range(4_000)]
    assert accepted == [drafts.accepted("r", position, 3) for position in range(4_000)]
    assert sum(accepted) / 4_000 == pytest.approx(0.6 + 0.6**2 + 0.6**3, rel=0.05)
    assert {Drafts(3, share, 1).accepted("r", 1, 3) for share in (0.0, 1.0)} == {0, 3}


def test_salts_keep_prompts_apart(tmp_path: Path) -> None:
    first = {"output_length": 9, "hash_ids": [0, 1], "block_size": 16, "input_length": 20, "lora": "sql"}
    later = first | {"timestamp": 1, "hash_ids": [0, 2, 3], "input_length": 48}
    same, other = read(tmp_path, first, later), read(tmp_path, first, later | {"lora": "code"})
    assert answer(same[0]) == same[1].prompt()[20:29]
    assert answer(other[0]) == []
    assert same[0].salt == same[1].salt != other[1].salt


def test_a_job_survives_json() -> None:
    job = Job("bound", {"a": 1}, "H100", 5, None, "chat", None, 0, 1.5, 256, 8192, layer_kv_dtypes=((3, "fp8"),))
    assert Job.from_dict(json.loads(json.dumps(asdict(job)))) == job


# The command.


def test_modes_are_known_and_once_each() -> None:
    assert parse_modes("elastic, stock") == ["elastic", "stock"]
    for bad in ("", "stock,stock", "stock,quick"):
        with pytest.raises(ValueError, match="--modes"):
            parse_modes(bad)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Name a trace"),
        (["t.jsonl", "--generate", "chat"], "and not both"),
        (["missing.jsonl", "--memory", "1GiB"], "No such file"),
        (["--generate", "cold"], "no workload"),
        (["--generate", "chat", "--model", "Qwen3.5-5B"], "did you mean"),
        (["--generate", "chat", "--model", "gpt-oss-120b"], "A replay builds"),
        (["--generate", "chat", "--gpu", "9090"], "There is no GPU"),
        (["--generate", "chat", "--memory", "much"], "is no size"),
        (["--generate", "chat", "--modes", "fast"], "--modes"),
        (["--generate", "chat", "--eviction", "fifo"], "--eviction takes returns or lru"),
        (["--generate", "chat", "--queue", "lifo"], "--queue takes fcfs or hits-first"),
        (["--generate", "chat", "--requests", "0"], "--requests must be above zero"),
        (["--generate", "chat", "--rate", "-1"], "--rate must be above zero"),
        (["--generate", "chat", "--drop-reasoning", "1.5"], "--drop-reasoning must be from 0 to 1"),
        (["--generate", "chat", "--json", "missing/x.json"], "no such directory"),
        (["--generate", "chat", "--model", "Qwen3.5-27B", "--gpu", "4090"], "leave nothing"),
        (["--generate", "chat", "--rate", "nan"], "--rate must be above zero"),
        (["--generate", "chat", "--rate", "inf"], "--rate must be above zero"),
        (["--generate", "chat", "--requests", "1000000000000"], "at most 1,000,000 requests"),
        (["--generate", "chat", "--memory", "500TiB"], "none has"),
        (["--generate", "chat", "--max-model-len", "0"], "--max-model-len must be above zero"),
        (["--generate", "chat", "--max-model-len", "8"], "longer than the 8 tokens that are served"),
        (["--generate", "chat", "--max-model-len", "900", "--strict"], "longer than the 900 tokens that are served"),
        (["--generate", "hot-prefix", "--memory", "220MiB"], "that the memory holds, and so are all others"),
        (["--generate", "chat", "--max-num-batched-tokens", "100"], "must be at least --max-num-seqs (256)"),
        (["--generate", "chat", "--json", "."], "it is a directory"),
        (["--generate", "chat", "--block-size", "0"], "--block-size must be above zero"),
        (["--generate", "chat", "--block-size", "40"], "--block-size must be a multiple of 16"),
        (["--generate", "chat", "--tp", "0"], "--tp must be above zero"),
        (["--generate", "chat", "--tp", "3"], "3"),
        (["--generate", "chat", "--kv-cache-dtype", "fp3"], "There is no KV cache dtype 'fp3'"),
        (["--generate", "chat", "--speculative-tokens", "3"], "belong together"),
        (["--generate", "chat", "--acceptance", "0.5"], "belong together"),
        (["--generate", "chat", "--speculative-tokens", "3", "--acceptance", "1.5"], "from 0 to 1"),
        (["--generate", "chat", "--speculative-tokens", "-1", "--acceptance", "1"], "from 0 to 1,000"),
        (["--generate", "chat", "--host-memory", "1GiB", "--no-prefix-caching"], "for the prefix cache"),
        (["--generate", "chat", "--host-memory", "1GiB", "--host-bandwidth", "fast"], "--host-bandwidth takes"),
        (["--generate", "chat", "--drop-reasoning", "nan"], "--drop-reasoning must be from 0 to 1"),
        (["--generate", "chat", "--vllm", "0.1"], "vLLM 0.1 isn't here"),
        (["a.jsonl", "b.jsonl"], "and not both"),
        (["/dev/zero"], "isn't a regular file"),
        (["."], "isn't a regular file"),
        (["--compare"], "Name the files that --json wrote"),
        (["--compare", "missing.json"], "No such file"),
        (["--compare", __file__], "isn't what tidepool replay --json of this version writes"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(arguments: list[str], message: str) -> None:
    assert message in refused(*arguments)


LINE = b'{"output_length": 1, "token_ids": [1, 2]}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no requests"),
        (b"\n \n", "holds no requests"),
        (b"\xff\xfe" + LINE.decode().encode("utf-16-le"), "isn't UTF-8 text"),
        (b"\x00\x01\x02\x80", "isn't UTF-8 text"),
        (b"\x1f\x8b" + LINE, "gzip data is broken"),
        (b"%PDF-1.7\n", "line 1: not valid JSON"),
        (b"[1, 2]\n", "line 1: a request must be a JSON object"),
        (b'{"timestamp": NaN, "output_length": 1, "token_ids": [1]}\n', 'line 1: "timestamp"'),
        (b'{"timestamp": -Infinity, "output_length": 1, "token_ids": [1]}\n', 'line 1: "timestamp"'),
        (b'{"timestamp": 1e300, "output_length": 1, "token_ids": [1]}\n', 'line 1: "timestamp"'),
        (b'{"timestamp": "now", "output_length": 1, "token_ids": [1]}\n', 'line 1: "timestamp"'),
        (b'{"output_length": 99999999999999999999, "token_ids": [1]}\n', 'line 1: "output_length"'),
        (b'{"output_length": ' + b"9" * 5_000 + b', "token_ids": [1]}\n', "line 1: not valid JSON"),
        (b'{"output_length": 1, "hash_ids": [1], "input_length": 1e3}\n', 'line 1: "input_length"'),
        (b'{"output_length": 300000, "token_ids": [1]}\n', "longer than the 262,144 tokens that are served"),
        (b"{" * 100_000, "line 1: not valid JSON"),
        (b"[" * 200_000, "line 1: not valid JSON"),
        (b"\x00" * 200_000, "line 1: not valid JSON"),
        (b'{"prompt": "' + b"tide " * 40_000 + b'"}\n', "line 1: nothing says how long its answer is"),
        (b"TIMESTAMP,ContextTokens,GeneratedTokens\n5," + b"9" * 200_000 + b",1\n", "line 2: 0 columns"),
    ],
    ids=range(20),
)
def test_a_bad_trace_is_one_sentence_and_exit_code_2(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "t.jsonl"
    file.write_bytes(content)
    assert message in refused(str(file))
    if content.startswith(b"{") and "longer" not in message:
        file.write_bytes(LINE + content)
        assert message.replace("line 1", "line 2") in refused(str(file), "--strict")


def refused(*arguments: str) -> str:
    """What the command says to input that it doesn't take."""
    app = typer.Typer()
    app.command()(replay)
    began = time.process_time()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tidepool.replay.parent.run_jobs", lambda *jobs: pytest.fail("it would run"))
        done = CliRunner().invoke(app, arguments)
    assert time.process_time() - began < 2
    assert done.exit_code == 2, done.output
    assert len(done.output.strip().splitlines()) == 1
    assert done.output.endswith((".\n", "?\n"))
    return done.output


def test_the_documentation_has_every_card() -> None:
    text = (Path(__file__).parents[1] / "docs" / "replay.md").read_text(encoding="utf-8")
    for name, card in GPUS.items():
        assert f"| {name} | {card.flops / 1e12:,.0f} TFLOP/s | {card.bandwidth / 1e12:.2f} TB/s |" in text

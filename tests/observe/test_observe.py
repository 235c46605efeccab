"""From an engine's counts to what people read: export, scrape, map, sentences and dashboard."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("prometheus_client", reason="comes with vLLM")

from rich.console import Console
from told import Told, engine, serve
from typer.testing import CliRunner

from tidepool import cli
from tidepool.cache import Arena, LookupResult, Retention, Share, TokenResult
from tidepool.metrics import METRICS, Collector, Kind
from tidepool.observe.dashboard import PANELS, dashboard, names_in, series_of
from tidepool.observe.explain import Evidence, evidence_of, evidence_of_replay, explain
from tidepool.observe.look import USES, GroupLook, Look, look_at
from tidepool.observe.scrape import VLLM_METRICS, Scrape
from tidepool.observe.view import COLOURS, RESULTS, TOKENS, WORDS, cells, draw
from tidepool.replay.job import GroupLayout, Mode, Result, Sample, Spread
from tidepool.replay.report import Report, Setting
from tidepool.sizes import percent

DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"


# Collecting and exporting.


def test_counters_go_as_what_was_added_and_arrive_as_what_there_is() -> None:
    watched, told = engine(), Told()
    collector = Collector(watched)
    told.hear(collector)
    first = Scrape(told.text)
    assert first.total("tidepool_allocated_bytes_total") == 0
    assert ("hit",) in first.by("tidepool_prefix_lookups_total", "result"), "a series begins at 0"
    serve(watched, "one", 1, 5)
    told.hear(collector)
    told.hear(collector)
    assert Scrape(told.text).total("tidepool_allocated_bytes_total") == 500 + 5 * 200
    watched.arena.allocate(0, 1)
    told.hear(collector)
    assert Scrape(told.text).total("tidepool_allocated_bytes_total") == 2 * 500 + 5 * 200


def test_only_what_grew_is_sent_again() -> None:
    watched = engine()
    collector = Collector(watched)
    kinds = {metric.name: metric.kind for metric in METRICS}
    sent = {name for name in collector.take() if kinds[name] == Kind.COUNTER}
    assert sent == {metric.name for metric in METRICS if metric.kind == Kind.COUNTER and "_host_" not in metric.name}
    assert not {name for name in collector.take() if kinds[name] == Kind.COUNTER}
    watched.arena.allocate(0, 1)
    assert {name for name in collector.take() if kinds[name] == Kind.COUNTER} == {"tidepool_allocated_bytes_total"}


def test_bytes_add_up_by_tier() -> None:
    watched, told = engine(host=True), Told()
    states, _ = serve(watched, "one", 2, 3)
    watched.arena.release(0, states[:1], [Retention.KEEP], request="one")
    told.hear(Collector(watched))
    look = look_at(Scrape(told.text))
    assert look.memory["device"] == {
        "states": 490,
        "attention": 3 * 160,
        "cached_states": 490,
        "cached_attention": 0,
        "free": 2 * 160,
        "padding": 2 * 10 + 5 * 40,
        "unowned": 6_000,
        "null": 1_000,
    }
    assert look.bytes_of("device") == 9_000
    assert look.bytes_of("host") == 21_000
    assert look.extents == {
        "states": 1,
        "cached_states": 0,
        "attention": 1,
        "cached_attention": 0,
        "unowned": 6,
        "null": 1,
    }


def test_a_fixed_partition_has_bytes_and_no_extents() -> None:
    config = ("1.0", "fixed", "returns", 0, 512, 4)
    arena = Arena.fixed([Share(10, 10, 3, 8), Share(20, 20, 6, 5)], 220)
    arena.allocate(0, 2)
    told = Told()
    told.hear(Collector(replace(engine(), arena=arena, elastic=False, config=config, retention=None)))
    look = look_at(Scrape(told.text))
    assert (look.memory["device"]["states"], look.memory["device"]["free"]) == (20, 60 + 100)
    assert look.bytes_of("device") == 220
    assert look.extents == {}
    assert look.hit_rate is None
    Console(width=80, file=io.StringIO()).print(draw(look))
    said = explain(evidence_of([replace(look, waiting=1, running=1)]))
    assert said.limit == "states"
    assert said.advice.endswith("larger card).")


def test_every_metric_is_exported_with_the_labels_of_the_table() -> None:
    watched, told = engine(host=True), Told()
    watched.arena.eviction_ages.append(9_000)
    watched.reuse.return_ages.append(2_250)
    told.hear(Collector(watched))
    found = Scrape(told.text)
    for metric in METRICS:
        for series in series_of(metric):
            assert series in found, series
            for labels, _ in found.rows(series):
                assert set(labels) == {"model_name", "engine", *metric.labels, *({"le"} & labels.keys())}
    assert found.total("tidepool_host_copied_bytes_total", direction="to_host") == 70
    assert found.total("tidepool_host_copied_bytes_total", direction="to_device") == 30
    assert found.total("tidepool_host_copying_bytes") == 7
    assert found.total("tidepool_host_wait_seconds_total") == 0.5
    assert found.total("tidepool_host_failed_copies_total") == 1
    assert found.total("tidepool_eviction_age_ratio_sum") == 1
    assert found.total("tidepool_return_age_ratio_sum") == 0.25


def test_ages_are_told_once() -> None:
    watched, told = engine(), Told()
    collector = Collector(watched)
    watched.arena.eviction_ages.append(4_500)
    told.hear(collector)
    told.hear(collector)
    found = Scrape(told.text)
    assert found.total("tidepool_eviction_age_ratio_count") == 1
    assert found.quantile("tidepool_eviction_age_ratio", 0.5) == 0.5
    assert found.quantile("tidepool_return_age_ratio", 0.5) is None


def test_refusals_evictions_moves_and_lookups_arrive_under_their_labels() -> None:
    watched, told = engine(), Told()
    assert watched.retention
    watched = replace(watched, refusals=[3, 2, 1])
    assert watched.retention
    watched.arena.pools[1].moves = 4
    watched.arena.pools[0].evictions = 5
    for number, priority in enumerate(watched.arena.evictions):
        watched.arena.evictions[priority] = number + 1
    for number, result in enumerate(LookupResult):
        watched.retention.lookups.requests[result] = number + 10
    for number, part in enumerate(TokenResult):
        watched.retention.lookups.tokens[part] = number + 100
    watched.retention.branch_checkpoints.left, watched.retention.branch_checkpoints.used = 8, 6
    told.hear(Collector(watched))
    look = look_at(Scrape(told.text))
    assert look.refused == {"states": 3, "attention": 2, "reserve": 1}
    assert look.moves == 4
    assert look.evicted == {"low": 1, "first": 2, "second": 3, "later": 4, "shared": 5, "running": 6}
    assert look.lookups == {"hit": 10, "short": 11, "no_state": 12, "evicted": 13, "other_key": 14, "new": 15}
    assert look.tokens == {"hit_device": 100, "hit_host": 101, "no_state": 102, "evicted": 103, "new": 104}
    assert look.hit_rate == 201 / 510
    assert look.branch_checkpoints == {"left": 8, "used": 6}
    evicted = Scrape(told.text).by("tidepool_evicted_blocks_total", "kind")
    assert evicted == {("states",): 5, ("attention",): 0}


def test_several_engines_add_up() -> None:
    told = Told()
    for number in range(2):
        told.hear(Collector(engine()), number)
    look = look_at(Scrape(told.text))
    assert look.engines == 2
    assert look.bytes_of("device") == 18_000
    assert len(look.groups) == 2
    assert look.model == 'a "model"'


def test_the_document_lists_every_metric() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    for metric in METRICS:
        assert f"| `{metric.name}` | {metric.kind} | {', '.join(metric.labels)} | {metric.help} |" in text


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_names_follow_the_conventions_of_prometheus(metric: Any) -> None:
    assert metric.name.startswith("tidepool_")
    assert metric.name.endswith("_total") == (metric.kind == Kind.COUNTER)
    assert metric.help.endswith(".")
    assert not set(metric.labels) & {"le", "model_name", "engine"}


# Scraping.


@contextmanager
def answering(status: int, text: str) -> Iterator[str]:
    """A server that answers every request alike."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("command", ["top", "explain"])
@pytest.mark.parametrize(
    ("status", "text", "sentence"),
    [
        (200, "<html>", "answers, but not as a server of vLLM's does"),
        (404, "", "answers with 404 Not Found, not with metrics."),
        (200, Told().text, "tells nothing of tidepool"),
    ],
)
def test_what_is_no_server_of_tidepools_is_said_in_one_sentence(
    command: str, status: int, text: str, sentence: str
) -> None:
    with answering(status, text) as url:
        result = CliRunner().invoke(cli.app, [command, url])
    assert result.exit_code == 1
    assert sentence in result.output
    assert len(result.output.splitlines()) == 1


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "127.0.0.1:9/metrics", "ftp:/nowhere", "http://[", "no server"])
def test_where_there_is_no_server(url: str) -> None:
    result = CliRunner().invoke(cli.app, ["top", url, "--once"])
    assert result.exit_code == 1
    assert "There is no server at" in result.output
    assert "Traceback" not in result.output


def test_top_shows_a_server_once_and_as_json() -> None:
    watched, told = engine(host=True), Told()
    serve(watched, "one", 1, 5)
    told.hear(Collector(watched))
    with answering(200, told.text) as url:
        drawn = CliRunner().invoke(cli.app, ["top", url, "--once"])
        told_json = CliRunner().invoke(cli.app, ["top", url.removeprefix("http://"), "--json"])
    assert drawn.exit_code == told_json.exit_code == 0
    assert "KV memory" in drawn.output
    assert "host memory" in drawn.output
    assert json.loads(told_json.output)["memory"]["device"]["states"] == 490


# Drawing.


def look_of(prepare: Callable[[Any], None] = lambda watched: None) -> Look:
    watched, told = engine(), Told()
    prepare(watched)
    told.hear(Collector(watched))
    return look_at(Scrape(told.text))


def test_the_map_is_right_to_a_cell() -> None:
    uses = dict.fromkeys(USES, 0) | {"states": 250, "unowned": 500, "null": 250}
    drawn = cells(uses, 100)
    assert [drawn.count(use) for use in ("states", "unowned", "null")] == [25, 50, 25]
    assert len(cells(dict.fromkeys(USES, 1), 100)) == 100
    assert cells(dict.fromkeys(USES, 0), 10) == []


def test_everything_has_a_colour_and_words() -> None:
    assert set(COLOURS) == set(WORDS) == set(USES)
    assert set(RESULTS) == set(LookupResult)
    assert set(TOKENS) == set(TokenResult)


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_view_fits_its_width_and_shows_rates(width: int) -> None:
    before = look_of()
    look = replace(before, moves=30, lookups={**before.lookups, "hit": 3}, tokens={**before.tokens, "hit_device": 48})
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(draw(look, before, 10.0, width=width))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    text = " ".join(" ".join(lines).split())
    assert "3.0/s" in text
    assert "100%" in text


# Explaining.


NOTHING: dict[str, int] = {part.value: 0 for part in TokenResult}
BASE = Evidence(
    what="a model",
    waits=0.0,
    waiting=0.0,
    running=4.0,
    running_most=4,
    max_num_seqs=16,
    memory={"states": 400 << 20, "attention": 300 << 20, "unowned": 300 << 20},
    host_bytes=0,
    refused={},
    tokens=NOTHING | {"hit_device": 100, "new": 900},
    state_bytes=50 << 20,
    token_bytes=32 << 10,
    checkpoint_tokens=512,
    requests=10,
)
WAITS = {"waits": 0.9, "waiting": 5.0}
EVICTED = NOTHING | {"evicted": 500, "new": 500}
NO_STATE = NOTHING | {"no_state": 2_000, "new": 2_000}
OF_STATES = {
    "tokens": EVICTED,
    "memory": {"states": 100 << 20, "attention": 150 << 20, "cached_states": 600 << 20, "cached_attention": 150 << 20},
    "eight_bit_bytes": 12_500 << 10,
}


@pytest.mark.parametrize(
    ("change", "limit", "setting", "words"),
    [
        ({}, "arrivals", None, "No setting would help"),
        (WAITS | {"running_most": 16, "running": 16}, "max_num_seqs", "--max-num-seqs", "--max-num-seqs 22 would help"),
        (
            WAITS | {"running_most": 16, "running": 16, "memory": {"states": 900, "attention": 100}},
            "max_num_seqs",
            "--gpu-memory-utilization",
            "More memory",
        ),
        (WAITS | {"refused": {"states": 3, "attention": 1}}, "states", "--gpu-memory-utilization", "1,600 tokens"),
        (WAITS | {"refused": {"states": 1, "window": 3}}, "attention", "--gpu-memory-utilization", "31.2 MiB"),
        (WAITS | {"refused": {"reserve": 9}}, "reserve", "--gpu-memory-utilization", "rest of their answers"),
        (WAITS, "states", "--gpu-memory-utilization", "More memory"),
        (
            {"tokens": EVICTED, "eviction_age": 1.0, "return_age": 4.0},
            "arrivals",
            "--kv-offloading-size",
            "--kv-offloading-size 4 would help: 3.91 GiB",
        ),
        ({"tokens": NO_STATE}, "arrivals", "checkpoint_tokens", "checkpoint_tokens 256 would help"),
        (OF_STATES | {"return_age": 1.4}, "arrivals", "checkpoint_states", "checkpoint_states int8 would help: 80%"),
        (OF_STATES | {"return_age": None}, "arrivals", "checkpoint_states", "holds 2.5 times as much. It rounds them"),
        (OF_STATES | {"return_age": 4.0}, "arrivals", "--kv-offloading-size", "--kv-offloading-size 4"),
        (OF_STATES | {"eight_bit_bytes": 0}, "arrivals", "--kv-offloading-size", "hold what"),
        (OF_STATES | WAITS, "attention", "--gpu-memory-utilization", "More memory"),
        (OF_STATES | {"tokens": NO_STATE}, "arrivals", "checkpoint_tokens", "checkpoint_tokens 256"),
    ],
)
def test_what_limits_and_which_setting_helps(
    change: dict[str, Any], limit: str, setting: str | None, words: str
) -> None:
    found = explain(replace(BASE, **change))
    assert (found.limit, found.setting) == (limit, setting)
    assert words in " ".join((*found.sentences, found.advice))


def test_more_memory_is_counted_as_plan_counts() -> None:
    """8 extents of 1,000 bytes: a request of 32 tokens has a state, half an extent, and 2 of 5 blocks in one."""

    def run(watched: Any) -> None:
        watched.refusals[0] = 1
        for number in range(4):
            serve(watched, str(number), 1, 2)

    look = replace(look_of(run), running=4, waiting=2)
    found = explain(evidence_of([look]))
    assert found.limit == "max_num_seqs"
    look = replace(look, max_num_seqs=16)
    found = explain(evidence_of([look]))
    assert found.limit == "states"
    planned = look.planned(9_000)
    assert planned is not None
    assert planned.most(100, 32, ()) == 8
    assert (
        "Of requests of 32 tokens, as they run now, with one state each 8 fit in 8.79 KiB and 10 in 11 KiB."
        in found.advice
    )


def test_what_was_short_lately_counts_for_more_than_what_was_before() -> None:
    first = replace(look_of(), running=2, waiting=1, refused={"states": 90, "attention": 1, "reserve": 0})
    assert explain(evidence_of([first, first])).limit == "states"
    last = replace(first, refused={**first.refused, "attention": 3})
    assert explain(evidence_of([first, last])).limit == "attention"


SPREAD = Spread(0.1, 0.1, 0.2, 0.3)
GROUPS = [GroupLayout("state", 24, 128, 52 << 20, 52 << 20), GroupLayout("attention", 8, 16, 512 << 10, 512 << 10)]


def replayed(mode: Mode, hits: int, waiting: int, uses: tuple[int, ...]) -> Result:
    """1,000 prompt tokens of Qwen3.5-4B."""
    return Result(
        mode=mode,
        requests=10,
        prompt_tokens=1_000,
        hit_tokens=hits,
        output_tokens=50,
        ttft=SPREAD,
        tpot=None,
        e2e=SPREAD,
        makespan=9.0,
        preemptions=0,
        running_mean=3.0,
        running_peak=4,
        extents_moved=None,
        extents=None,
        extent_bytes=None,
        steps=9,
        scheduler_mean=0.001,
        scheduler_median=0.001,
        wall_seconds=1.0,
        block_tokens=16,
        groups=GROUPS,
        samples=[Sample(0.0, 3, waiting, hits, 1_000, tuple(use << 20 for use in uses))],
    )


SETTING = Setting("Qwen3.5-4B", "H100", 1_000 << 20, "chat", 1.0, 8, 2_048)


def test_a_replay_is_explained(tmp_path: Path) -> None:
    report = Report(SETTING, [replayed("stock", 0, 0, (0,) * 6), replayed("elastic", 30, 2, (500, 300, 0, 0, 0, 200))])
    found = explain(evidence_of_replay(report))
    assert found.limit == "states"
    assert "3.00% of 1,000 prompt tokens hit." in found.sentences
    assert any("as much as the attention of 1,664 tokens" in sentence for sentence in found.sentences)
    (tmp_path / "replay.json").write_text(json.dumps(report.to_dict()), encoding="utf-8")
    told = CliRunner().invoke(cli.app, ["explain", str(tmp_path / "replay.json"), "--json"])
    assert json.loads(told.output) == asdict(found) | {"sentences": list(found.sentences)}


CACHE_OF_STATES, CACHE_OF_ATTENTION = (100, 100, 600, 200, 0, 0), (100, 100, 100, 700, 0, 0)


@pytest.mark.parametrize(
    ("hits", "uses", "setting", "advised"),
    [
        (400, CACHE_OF_STATES, SETTING, True),
        (590, CACHE_OF_STATES, SETTING, False),
        (400, CACHE_OF_ATTENTION, SETTING, False),
        (400, CACHE_OF_STATES, replace(SETTING, checkpoint_states="bfloat16"), False),
        (400, CACHE_OF_STATES, replace(SETTING, model="LFM2-1.2B"), False),
        (400, CACHE_OF_STATES, replace(SETTING, model="a/model/that/is/gone"), False),
    ],
    ids=["states cost hits", "hardly any", "attention fills the cache", "packed", "never smaller", "unknown model"],
)
def test_smaller_states_are_advised_where_states_cost_hits(
    hits: int, uses: tuple[int, ...], setting: Setting, advised: bool
) -> None:
    report = Report(setting, [replayed("elastic", hits, 0, uses), replayed("bound", 600, 0, uses)])
    found = explain(evidence_of_replay(report))
    assert found.limit == "arrivals"
    assert f"{percent((600 - hits) / 1_000)} more would hit if states took no memory." in found.sentences
    assert (found.setting == "checkpoint_states") == advised
    # 13.5 of 49.1 MiB a state in 8 bits, as plan counts them: 60% of the cache take 17%.
    assert ("75% of what is cached are states of 52 MiB, which take 14.3 MiB" in found.advice) == advised
    assert ("2.2 times as much. It rounds them" in found.advice) == advised
    alone = explain(evidence_of_replay(Report(setting, [replayed("elastic", hits, 0, uses)])))
    assert (alone.setting, alone.advice[:27]) == (None, "No setting is known to help")
    assert (found.setting is None) == (hits == 590), "where states cost hits and can't be smaller, memory helps"


def test_a_partition_that_packs_nothing_is_not_advised_to() -> None:
    report = Report(SETTING, [replayed("fixed", 400, 0, CACHE_OF_STATES), replayed("bound", 600, 0, CACHE_OF_STATES)])
    assert explain(evidence_of_replay(report)).setting == "--gpu-memory-utilization"


def test_a_server_knows_how_small_its_states_would_be() -> None:
    def told(look: Look) -> int:
        return evidence_of([look]).eight_bit_bytes

    look = look_of()
    assert told(look) == 0, "a model that nobody knows"
    known = replace(look, model="Qwen/Qwen3.5-4B")
    assert told(known) == round(490 * 14_155_776 / 51_511_296)
    assert told(replace(known, partition="fixed")) == 0
    packed = GroupLook("packed", 0, 140, 7)
    assert told(replace(known, groups=(*look.groups, packed))) == 0


@pytest.mark.parametrize("content", ["[]", "{}", '{"modes": {}, "setting": {}}', "no json"])
def test_a_file_that_is_no_replay_is_refused_in_one_sentence(tmp_path: Path, content: str) -> None:
    path = tmp_path / "replay.json"
    path.write_text(content, encoding="utf-8")
    result = CliRunner().invoke(cli.app, ["explain", str(path)])
    assert result.exit_code == 1
    assert len(result.output.splitlines()) == 1


def test_a_file_that_is_not_there_is_refused_in_one_sentence(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["explain", str(tmp_path / "none.json")])
    assert result.exit_code == 1
    assert "Can't read" in result.output
    assert len(result.output.splitlines()) == 1


# The dashboard.


def test_every_expression_of_the_dashboard_names_a_metric_that_exists() -> None:
    known = set().union(*map(series_of, METRICS)) | set(VLLM_METRICS) | {f"{name}_bucket" for name in VLLM_METRICS}
    printed = json.loads(CliRunner().invoke(cli.app, ["dashboard"]).output)
    assert printed == dashboard()
    expressions = [target["expr"] for panel in printed["panels"] for target in panel["targets"]]
    for expression in expressions:
        names = names_in(expression)
        assert names, expression
        assert names <= known, expression
        assert expression.count("(") == expression.count(")")
        assert expression.count("{") == expression.count("}") == expression.count('engine=~"$engine"')


def test_the_dashboard_shows_every_metric_and_labels_that_there_are() -> None:
    shown = set().union(*(names_in(query) for panel in PANELS for query, _ in panel.queries))
    assert not [metric.name for metric in METRICS if not series_of(metric) & shown]
    labels = {label for metric in METRICS for label in metric.labels}
    for panel in PANELS:
        for query, legend in panel.queries:
            for part in legend.split("{{")[1:]:
                assert part.split("}}")[0] in labels, legend
                assert part.split("}}")[0] in query, legend


def test_panels_lie_beside_each_other() -> None:
    places = [tuple(panel["gridPos"].values()) for panel in dashboard()["panels"]]
    assert len(set(places)) == len(places)
    assert len({panel["id"] for panel in dashboard()["panels"]}) == len(places)

"""What a real server's `/metrics` says under load, against the arena's own account at the same moment, and against what
its clients know. And the commands that read it."""

from __future__ import annotations

import json
import os
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai", reason="comes with vLLM")

from server_process import NAME, Server, wait_for
from typer.testing import CliRunner

from tidepool import cli
from tidepool.observe.dashboard import PANELS, names_in
from tidepool.observe.look import Look, look_at
from tidepool.observe.scrape import VLLM_METRICS, Scrape, scrape

pytestmark = pytest.mark.vllm

MEMORY = 4 * 3_244_032
"""Four extents: one for the null blocks, and too little for all clients at once."""
OPTIONS = ["--max-model-len", "1024", "--max-num-seqs", "16", "--enable-prefix-caching"]
OPTIONS += ["--enable-prompt-tokens-details"]
TESTS = Path(__file__).parents[1]
CLIENTS = 6
WAIT_SECONDS = 300


class Load:
    """Clients that ask for answers, and what they know afterwards."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.requests = self.prompt_tokens = self.hit_tokens = 0
        self._lock = threading.Lock()

    def ask(self, prompt: list[int], output_tokens: int, **more: Any) -> None:
        body = {"model": NAME, "prompt": prompt, "max_tokens": output_tokens, "ignore_eos": True, **more}
        status, answer = self.server.post("/v1/completions", json.dumps(body).encode(), WAIT_SECONDS)
        assert status == 200, answer
        usage = json.loads(answer)["usage"]
        with self._lock:
            self.requests += 1
            self.prompt_tokens += usage["prompt_tokens"]
            self.hit_tokens += (usage["prompt_tokens_details"] or {}).get("cached_tokens") or 0

    def converse(self, number: int) -> None:
        """A few conversations whose first turns share their beginnings with other clients'."""
        chance = random.Random(number)
        for _ in range(2):
            text = random.Random(chance.randrange(6)).choices(range(5, 60), k=chance.choice([100, 400]))
            text += chance.choices(range(5, 60), k=chance.choice([10, 200]))
            for _ in range(2):
                self.ask(text, chance.choice([2, 8]))
                text += chance.choices(range(5, 60), k=40)
        self.ask(text[:20], 2)
        self.ask(text, 2, cache_salt=f"of {number}")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("metrics")
    path = os.pathsep.join(map(str, (TESTS / "server" / "accounting", TESTS, os.environ.get("PYTHONPATH", ""))))
    served = Server(
        folder / "log",
        [*OPTIONS, "--kv-cache-memory-bytes", str(MEMORY)],
        {"ACCOUNT": str(folder / "account"), "PYTHONPATH": path},
    )
    try:
        served.wait_until_healthy()
        yield served
    finally:
        served.stop()


def test_a_server_that_has_had_no_request_is_said_to_tell_nothing(server: Server) -> None:
    result = CliRunner().invoke(cli.app, ["top", server.url, "--once"])
    assert result.exit_code == 1
    assert "has had no request yet" in result.output


def test_under_load_every_scrape_is_what_the_arena_says_at_that_moment(server: Server) -> None:
    load, over, texts = Load(server), threading.Event(), []

    def look() -> None:
        while not over.wait(0.1):
            texts.append(server.get("/metrics"))

    load.ask([5, 6, 7], 1)
    with ThreadPoolExecutor(CLIENTS + 1) as threads:
        looks = threads.submit(look)
        try:
            list(threads.map(load.converse, range(CLIENTS), timeout=WAIT_SECONDS))
        finally:
            over.set()
        looks.result(WAIT_SECONDS)
    wait_for(lambda: not scrape(server.url).total("vllm:num_requests_running"), 10, "the last word of the engine")
    texts.append(server.get("/metrics"))

    accounts: dict[int, list[Any]] = {}
    for line in (server.log.parent / "account").read_text(encoding="utf-8").splitlines():
        told = json.loads(line)
        accounts.setdefault(told["allocated"], []).append((sorted(map(tuple, told["memory"])), told["moves"]))
    agreeing, states_in_use = 0, set()
    for text in texts:
        found = Scrape(text)
        memory = sorted((*key, int(count)) for key, count in found.by("tidepool_memory_bytes", "group", "use").items())
        moment = memory, int(found.total("tidepool_extent_moves_total"))
        agreeing += moment in accounts.get(int(found.total("tidepool_allocated_bytes_total")), [])
        states_in_use.add(found.total("tidepool_memory_bytes", kind="states", use="in_use"))
    # A scrape may come while the next numbers are being set.
    assert agreeing >= 0.9 * len(texts)
    assert len(texts) > 20
    assert len(states_in_use) > 3, "the load never changed"

    last = look_at(Scrape(texts[-1]))
    assert sum(last.lookups.values()) == load.requests
    assert sum(last.tokens.values()) == load.prompt_tokens
    assert last.tokens["hit_device"] == load.hit_tokens > 0
    assert last.lookups["short"] >= CLIENTS
    assert last.lookups["other_key"] == CLIENTS
    assert last.memory["device"]["states"] == last.memory["device"]["attention"] == last.running == 0
    assert sum(last.evicted.values()) > 0
    assert sum(last.refused.values()) > 0


def test_commands_read_it(server: Server) -> None:
    told = json.loads(CliRunner().invoke(cli.app, ["top", server.url, "--json"]).output)
    assert sum(told["memory"]["device"].values()) == MEMORY
    drawn = CliRunner().invoke(cli.app, ["top", server.url, "--once"], env={"COLUMNS": "100"}).output
    assert "elastic partition" in drawn
    assert "hits and misses" in drawn
    said = CliRunner().invoke(cli.app, ["explain", server.url, "--seconds", "0"]).output
    assert "The arrival rate limits it" in said


def test_what_the_dashboard_asks_for_is_there(server: Server) -> None:
    """Host memory's own metrics come with host memory."""
    found = scrape(server.url)
    asked = set().union(*(names_in(query) for panel in PANELS for query, _ in panel.queries))
    missing = {name for name in asked if name not in found and not name.startswith("tidepool_host_")}
    assert not missing
    assert {name for name in VLLM_METRICS if name not in found and f"{name}_bucket" not in found} == set()


def test_two_front_ends_and_one_engine_tell_it_all(tmp_path: Path) -> None:
    options = [*OPTIONS, "--kv-cache-memory-bytes", str(MEMORY), "--api-server-count", "2"]
    server = Server(tmp_path / "log", options)
    try:
        server.wait_until_healthy()
        load = Load(server)
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(load.converse, range(2), timeout=WAIT_SECONDS))

        def told() -> Look:
            return look_at(scrape(server.url))

        wait_for(lambda: sum(told().lookups.values()) == load.requests, 10, "both to have told it")
        assert told().tokens["hit_device"] == load.hit_tokens > 0
        assert sum(told().memory["device"].values()) == MEMORY
    finally:
        server.stop()

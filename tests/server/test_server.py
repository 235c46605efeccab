"""`tidepool serve` under clients that behave and clients that don't. Whatever they do, the next answer must be right.

All tests of the running server share one, whose memory is just enough for one request of the greatest length: blocks
that were lost to an aborted or refused request would leave too little for the next longest one. The last test kills
its engine.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

openai = pytest.importorskip("openai", reason="comes with vLLM")

from server_process import NAME, Server, wait_for  # noqa: E402

from tidepool.verify.task import (  # noqa: E402
    ANSWER_TOKENS,
    WORDS,
    Prompt,
    make_conversation,
    make_prompts,
    to_text,
)

pytestmark = pytest.mark.vllm

MAX_MODEL_LEN = 1024
EXTENT = 3_244_032
"""Bytes of an extent: two states of the model, or 99 blocks of 32 tokens."""
EXTENTS = 3
"""What one request of the greatest length needs: its states, its attention, and the null blocks."""
WAIT_SECONDS = 300
"""Within which anything asked for must have happened; some processors take twenty times as long as others."""
OPTIONS = ["--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", "16", "--enable-prefix-caching"]


def with_memory(memory: int) -> list[str]:
    return [*OPTIONS, "--kv-cache-memory-bytes", str(memory)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    served = Server(
        tmp_path_factory.mktemp("server") / "log", with_memory(EXTENTS * EXTENT), {"VLLM_SERVER_DEV_MODE": "1"}
    )
    try:
        served.wait_until_healthy()
        yield served
    finally:
        served.stop()


@pytest.fixture
def healthy(server: Server) -> Iterator[Server]:
    """The shared server; after the test, a request that takes all of its memory must be answered right."""
    yield server
    assert_right(client_of(server), longest(seed=99))


def client_of(server: Server) -> Any:
    http = openai.DefaultHttpxClient(trust_env=False)
    return openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", timeout=WAIT_SECONDS, max_retries=0, http_client=http
    )


def longest(seed: int) -> Prompt:
    return make_prompts(seed, length=MAX_MODEL_LEN - ANSWER_TOKENS, stories=1, kind="fact")[0]


def complete(client: Any, prompt: Prompt, **options: Any) -> Any:
    arguments = {"max_tokens": ANSWER_TOKENS, "temperature": 0} | options
    return client.completions.create(model=NAME, prompt=prompt.tokens, **arguments)


def assert_right(client: Any, prompt: Prompt) -> None:
    assert complete(client, prompt).choices[0].text.split() == to_text(prompt.question.answer).split()


def test_tidepool_serves_it(healthy: Server) -> None:
    assert "tidepool serves this model." in healthy.output
    assert f"{EXTENTS} extents of" in healthy.output


def test_concurrent_streams_are_answered_right(healthy: Server) -> None:
    """Twelve clients at once, three turns each, while the memory holds a few of them.

    A busy server sends tokens together that it has together, so some streams may be short.
    """
    streamed: list[bool] = []

    def converse(number: int) -> list[bool]:
        client = client_of(healthy)
        right = []
        for prompt in make_conversation(number, length=240, turns=3):
            chunks = [chunk.choices[0].text for chunk in complete(client, prompt, stream=True)]
            streamed.append(len(chunks) > 1)
            right.append("".join(chunks).split() == to_text(prompt.question.answer).split())
        return right

    with ThreadPoolExecutor(12) as threads:
        assert list(threads.map(converse, range(12), timeout=WAIT_SECONDS)) == [[True] * 3] * 12
    assert any(streamed)


def test_a_router_reads_the_truth(healthy: Server) -> None:
    """From the text of /metrics alone: how many tokens fit, and that the memory is full when requests wait for it."""
    (labels,) = re.findall(r"^vllm:cache_config_info\{(.*)\} 1\.0$", healthy.get("/metrics"), re.MULTILINE)
    told = dict(re.findall(r'(\w+)="([^"]*)"', labels))
    tokens = int(told["num_gpu_blocks"]) * int(told["block_size"])
    assert tokens == 99 * 32, "an extent of attention beside one of states"
    assert f"tokens beside 1 request: {tokens:,}" in healthy.output
    assert MAX_MODEL_LEN <= int(told["kv_cache_size_tokens"]) <= tokens

    over = threading.Event()

    def look() -> list[tuple[float, float]]:
        seen = []
        while not over.wait(0.02):
            text = healthy.get("/metrics")
            waiting, usage = (read_metric(text, name) for name in ("num_requests_waiting", "kv_cache_usage_perc"))
            seen.append((waiting, usage))
        return seen

    def answer(number: int) -> None:
        prompt = make_prompts(number, length=200, stories=1)[0]
        complete(client_of(healthy), prompt, max_tokens=300, extra_body={"ignore_eos": True})

    with ThreadPoolExecutor(9) as threads:
        looks = threads.submit(look)
        try:
            list(threads.map(answer, range(8), timeout=WAIT_SECONDS))
        finally:
            over.set()
        seen = looks.result(WAIT_SECONDS)
    assert all(usage < 1 for waiting, usage in seen if not waiting)
    usages = [usage for waiting, usage in seen if waiting]
    # A request that has just ended leaves memory that nobody has got yet.
    assert len(usages) > 10
    assert sum(usage == 1 for usage in usages) > 0.8 * len(usages)
    assert metric(healthy, "kv_cache_usage_perc") == 0


def test_clients_that_go_away_leave_nothing_behind(healthy: Server) -> None:
    """Eight clients close the connection after the first token of a long answer, and eight before it."""

    def leave(number: int) -> None:
        prompt = make_prompts(number, length=200, stories=1)[0]
        endless = {"max_tokens": MAX_MODEL_LEN - 200}
        own = {"ignore_eos": True}
        """What openai's client doesn't know of."""
        if number % 2:
            with complete(client_of(healthy), prompt, stream=True, extra_body=own, **endless) as stream:
                next(iter(stream))
        else:
            connection = HTTPConnection(urlsplit(healthy.url).netloc)
            body = {"model": NAME, "prompt": prompt.tokens, **endless, **own}
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            time.sleep(0.3)
            connection.close()

    before = metric(healthy, "generation_tokens_total")
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(leave, range(16), timeout=WAIT_SECONDS))
    wait_for(lambda: running(healthy) == 0, WAIT_SECONDS, "the requests of those who left to end")
    generated = metric(healthy, "generation_tokens_total") - before
    assert generated < 16 * (MAX_MODEL_LEN - 200) / 2, "they were served to the end"


def running(server: Server) -> float:
    """Requests in the engine, by its metrics, which are brought up to date by asking something."""
    assert_right(client_of(server), make_prompts(7, length=100, stories=1)[0])
    return metric(server, "num_requests_running") + metric(server, "num_requests_waiting")


def metric(server: Server, name: str) -> float:
    """A number that the server tells."""
    return read_metric(server.get("/metrics"), name)


def read_metric(text: str, name: str) -> float:
    """A number in what a server answers when asked for its metrics."""
    (value,) = re.findall(rf"^vllm:{name}\{{.*\}} (\S+)$", text, re.MULTILINE)
    return float(value)


def test_too_long_is_refused(healthy: Server) -> None:
    """A prompt over the limit is refused; an answer that would go over it ends there, as vLLM has it."""
    client = client_of(healthy)
    prompt = longest(seed=1)
    for tokens in (prompt.tokens + prompt.tokens[: ANSWER_TOKENS + 1], prompt.tokens * 3):
        with pytest.raises(openai.BadRequestError, match=str(MAX_MODEL_LEN)):
            client.completions.create(model=NAME, prompt=tokens, max_tokens=1)
    answer = complete(client, prompt, max_tokens=100, extra_body={"ignore_eos": True})
    assert answer.choices[0].text.split() == to_text(prompt.question.answer).split()
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"",
        b"[]",
        b'{"model": "stories"}',
        json.dumps({"model": NAME, "prompt": [len(WORDS) + 5], "max_tokens": 1}).encode(),
        json.dumps({"model": NAME, "prompt": [-1], "max_tokens": 1}).encode(),
        json.dumps({"model": NAME, "prompt": [5, "x"], "max_tokens": 1}).encode(),
        json.dumps({"model": NAME, "prompt": [5], "max_tokens": -1}).encode(),
        json.dumps({"model": NAME, "prompt": [5], "temperature": -2}).encode(),
        json.dumps({"model": NAME, "prompt": [], "max_tokens": 1}).encode(),
        json.dumps({"model": "another", "prompt": [5], "max_tokens": 1}).encode(),
    ],
)
def test_malformed_is_refused(healthy: Server, body: bytes) -> None:
    status, answer = healthy.post("/v1/completions", body)
    assert 400 <= status < 500, answer
    assert "Traceback" not in answer


def test_the_prefix_cache_is_reset_under_load(healthy: Server) -> None:
    """Resets while eight clients are served: refused or done, and their answers are right."""
    prompts = make_prompts(3, length=200, stories=2, questions=8)
    over = threading.Event()

    def reset() -> int:
        resets = 0
        while not over.is_set():
            for query in ("", "?reset_running_requests=true"):
                status, answer = healthy.post(f"/reset_prefix_cache{query}")
                assert status == 200, answer
                resets += 1
            over.wait(0.2)
        return resets

    with ThreadPoolExecutor(9) as threads:
        resets = threads.submit(reset)
        try:
            list(threads.map(lambda prompt: assert_right(client_of(healthy), prompt), prompts, timeout=WAIT_SECONDS))
        finally:
            over.set()
        assert resets.result(WAIT_SECONDS) >= 2


def test_sleep_and_wake(healthy: Server) -> None:
    """vLLM's CPU worker keeps its memory, but the scheduler stops and the cache is emptied."""
    prompt = make_prompts(5, length=300, stories=1)[0]
    assert_right(client_of(healthy), prompt)
    assert healthy.post("/sleep?level=1")[0] == 200
    assert healthy.post("/wake_up")[0] == 200
    assert_right(client_of(healthy), prompt)


def test_an_engine_that_is_killed_ends_the_server(server: Server) -> None:
    """With a client waiting: that gets an error, and the server says what happened and ends."""
    client = client_of(server)
    prompt = make_prompts(4, length=100, stories=1)[0]
    stream = complete(client, prompt, stream=True, max_tokens=MAX_MODEL_LEN - 100, extra_body={"ignore_eos": True})
    next(iter(stream))
    engine = server.engine_processes()
    assert engine
    for process in engine:
        process.kill()
    with pytest.raises(openai.APIError):
        for _ in stream:
            pass
    assert server.wait_until_ended(WAIT_SECONDS) == 1, "a supervisor is to start it again"
    assert re.search(r"EngineDeadError|[Ee]ngine ?[Cc]ore.*died", server.output), server.output[-2000:]


# Servers that don't start.


def ended(tmp_path: Path, options: list[str]) -> tuple[int, str]:
    served = Server(tmp_path / "log", options)
    try:
        return served.wait_until_ended(), served.output
    finally:
        served.stop()


def test_memory_for_less_than_one_request_is_refused(tmp_path: Path) -> None:
    """A byte less than the other tests' server has."""
    code, output = ended(tmp_path, with_memory(EXTENTS * EXTENT - 1))
    assert code != 0
    assert f"To serve at least one request with the model's max seq len ({MAX_MODEL_LEN})" in output


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"partion": "fixed"}, "has no key 'partion'"),
        ({"block_tokens": 0}, "'block_tokens'] can't be 0"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_sentence(tmp_path: Path, settings: dict[str, Any], sentence: str) -> None:
    configuration = json.dumps({"tidepool": settings})
    code, output = ended(tmp_path, [*with_memory(EXTENTS * EXTENT), "--additional-config", configuration])
    assert code == 2
    assert sentence in output.strip().splitlines()[-1]
    assert "Traceback" not in output

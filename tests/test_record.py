"""A recording of a server that is made up here: what it keeps, and that it changes nothing."""

from __future__ import annotations

import gzip
import json
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tidepool.replay.formats import read_trace
from tidepool.replay.recording import Recording, answer_of, questions

pytest.importorskip("aiohttp")
SECRET = "The harbour master's password is swordfish. "
STREAM = [
    {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]},
    {"choices": [{"index": 0, "delta": {"reasoning": "Hm. "}}]},
    {"choices": [{"index": 0, "delta": {"content": "swordfish"}}]},
]


class Server(BaseHTTPRequestHandler):
    """Tokens are letters."""

    asked: list[tuple[str, str | None]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.path, self.headers["Authorization"]))
        if self.path == "/tokenize":
            text = body["prompt"] if "prompt" in body else "".join(each["content"] for each in body["messages"])
            self.answer(json.dumps({"tokens": [*map(ord, text)]}).encode())
        elif body.get("model") == "unknown":
            self.answer(b"{}", 404)
        elif body.get("stream"):
            events = [*(json.dumps(event) for event in STREAM), "[DONE]"]
            self.answer("".join(f"data: {event}\n\n" for event in events).encode())
        else:
            self.answer(json.dumps({"choices": [{"text": "x"}], "usage": {"completion_tokens": 7}}).encode())

    def do_GET(self) -> None:
        self.answer(self.path.encode())

    def answer(self, content: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Tide", "high")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Server.asked = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{made.server_address[1]}"
        made.shutdown()


def post(address: str, body: object) -> bytes:
    headers = {"Content-Type": "application/json", "Authorization": "Bearer swordfish"}
    request = urllib.request.Request(address, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert answer.headers["X-Tide"] == "high"
        return bytes(answer.read())


def test_a_recording_passes_everything_on_and_keeps_no_text(server: str, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = tmp_path / "trace.jsonl.gz"
    command = [sys.executable, "-m", "tidepool", "record", server, str(out), "--port", str(port)]
    proxy = f"http://127.0.0.1:{port}"
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            ask(proxy, port)
            process.send_signal(signal.SIGINT)
            _, told = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 0
    assert f"4 requests are in {out}; 0 couldn't be recorded." in told
    content = gzip.decompress(out.read_bytes()).decode()
    assert "swordfish" not in content + told
    assert set(json.loads(content.splitlines()[0])) == {
        "timestamp",
        "input_length",
        "output_length",
        "block_size",
        "hash_ids",
        "cache_salt",
    }
    trace = read_trace(out)
    assert not trace.skipped
    lengths = sorted((request.input_tokens, request.output_tokens) for request in trace.requests)
    size = len(SECRET) * 2
    assert lengths == [(3, 7), (size, 7), (size, len("Hm. swordfish")), (size + 7 + len("And mine?"), 7)]
    one, two = sorted((r for r in trace.requests if r.salt == "[null, 0]"), key=lambda r: r.input_tokens)
    full = size // 16
    assert one.blocks[:full] == two.blocks[:full]
    assert one.blocks[full:] != two.blocks[full:]
    assert len({request.salt for request in trace.requests}) == 3, "none, a salt, another model"
    assert {key for path, key in Server.asked if path == "/tokenize"} == {"Bearer swordfish"}


def ask(proxy: str, port: int) -> None:
    """Requests of all kinds."""
    wait_for(port)
    with urllib.request.urlopen(f"{proxy}/v1/models?x=1") as answer:
        assert answer.read() == b"/v1/models?x=1"
    first: list[dict[str, str]] = [{"role": "user", "content": SECRET * 2}]
    later = [*first, {"role": "assistant", "content": "x" * 7}, {"role": "user", "content": "And mine?"}]
    for messages in (first, later):
        asked: dict[str, Any] = {"model": "a", "messages": messages, "cache_salt": "swordfish"}
        assert json.loads(post(f"{proxy}/v1/chat/completions", asked))["usage"] == {"completion_tokens": 7}
    streamed = post(f"{proxy}/v1/chat/completions", {"model": "b", "messages": first, "stream": True})
    assert streamed.endswith(b"data: [DONE]\n\n")
    post(f"{proxy}/v1/completions", {"model": "a", "prompt": [1, 2, 3]})
    with pytest.raises(urllib.error.HTTPError):
        post(f"{proxy}/v1/completions", {"model": "unknown", "prompt": [1, 2, 3]})


def wait_for(port: int) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_blocks_are_numbered_with_all_that_is_before_them() -> None:
    made = Recording(2)
    lines = [json.loads(made.line(0.5, tokens, 3, {})) for tokens in ([1, 2, 3, 4, 5], [1, 2, 3, 4, 6], [3, 4])]
    assert [line["hash_ids"] for line in lines] == [[0, 1, 2], [0, 1, 3], [4]]
    assert lines[0] == {
        "timestamp": 500,
        "input_length": 5,
        "output_length": 3,
        "block_size": 2,
        "hash_ids": [0, 1, 2],
    }


def test_all_prompts_of_a_request_are_asked_for() -> None:
    body = {"model": "a", "prompt": ["x", [1, 2]], "temperature": 1}
    assert questions("/v1/completions", body) == [{"model": "a", "prompt": "x"}, {"model": "a", "prompt": [1, 2]}]
    assert questions("/v1/completions", {"prompt": [1, 2]}) == [{"prompt": [1, 2]}]
    chat = {"messages": [], "tools": [], "max_tokens": 5, "chat_template_kwargs": {"enable_thinking": False}}
    assert questions("/v1/chat/completions", chat) == [{key: chat[key] for key in chat if key != "max_tokens"}]


def test_the_answer_is_counted_from_its_usage_or_its_text() -> None:
    usage = {"choices": [], "usage": {"completion_tokens": 5}}
    events = "".join(f"data: {json.dumps(event)}\n\n" for event in [*STREAM, usage])
    assert answer_of(events.encode()) == (5, "Hm. swordfish")
    call = {"choices": [{"message": {"tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}}]}
    assert answer_of(json.dumps(call).encode()) == (None, "f{}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["localhost:8000", "t.jsonl"], "The server is an address"),
        (["http://localhost:8000", "missing/t.jsonl"], "No such file or directory"),
        (["http://localhost:8000", "."], "File exists"),
        (["http://localhost:8000", "t.jsonl", "--block-size", "0"], "--block-size"),
        (["http://localhost:8000", "t.jsonl", "--port", "70000"], "--port"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(arguments: list[str], message: str) -> None:
    from typer.testing import CliRunner

    from tidepool.cli import app

    done = CliRunner().invoke(app, ["record", *arguments])
    assert done.exit_code == 2
    assert message in done.output
    assert len(done.output.strip().splitlines()) == 1

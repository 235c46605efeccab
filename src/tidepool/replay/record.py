"""The command ``tidepool record``: a proxy in front of a vLLM server that passes everything on and keeps no text."""

from __future__ import annotations

import asyncio
import gzip
import json
import sys
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from tidepool.command_line import UsageError, cannot_write, fail
from tidepool.replay.recording import Recording, answer_of, questions

if TYPE_CHECKING:
    from aiohttp import ClientSession, web

RECORDED = ("/v1/chat/completions", "/v1/completions")
_OF_ONE_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "host", "content-length"}
"""Headers that aren't passed on."""


def record(
    server: Annotated[str, typer.Argument(help="The vLLM server, like http://localhost:8000.")],
    out: Annotated[Path, typer.Argument(help="The trace to write, gzip'd if it ends in .gz; it must not exist yet.")],
    host: Annotated[str, typer.Option(help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Where to listen.")] = 8001,
    block_size: Annotated[int, typer.Option(help="Tokens that are compared at once.")] = 16,
) -> None:
    """Record a trace for tidepool replay: send requests here instead of to the server. Keeps lengths, no text."""
    try:
        from aiohttp import web
    except ImportError:
        fail("tidepool record needs the package aiohttp, which vLLM brings.", 1)
    try:
        if urlsplit(server).scheme not in ("http", "https") or not urlsplit(server).netloc:
            raise UsageError(f"The server is an address like http://localhost:8000, not {server!r}.")
        if not 0 < block_size <= 4096:
            raise UsageError(f"--block-size must be from 1 to 4,096, not {block_size:,}.")
        if not 0 < port < 1 << 16:
            raise UsageError(f"--port must be from 1 to 65,535, not {port}.")
        opened = _open(out)
    except UsageError as error:
        fail(str(error), 2)
    except OSError as error:
        fail(cannot_write(error), 2)
    with opened as file:
        proxy = Proxy(server.rstrip("/"), Recording(block_size), file)
        print(f"Send requests to http://{host}:{port} in place of {server}; Ctrl-C ends it.", file=sys.stderr)
        try:
            web.run_app(proxy.app(), host=host, port=port, print=None)
        except OSError as error:
            fail(f"Can't listen on {host}:{port}: {error.strerror}.", 1)
    print(f"{proxy.recorded:,} requests are in {out}; {proxy.left_out:,} couldn't be recorded.", file=sys.stderr)


def _open(out: Path) -> IO[str]:
    return gzip.open(out, "xt", encoding="utf-8") if out.suffix == ".gz" else out.open("x", encoding="utf-8")


class Proxy:
    """Passes requests on, and writes a line for each one that was answered, once it was.

    Args:
        server: address of the server, without a slash at its end.
        recording: makes the lines.
        file: takes them.
    """

    def __init__(self, server: str, recording: Recording, file: IO[str]) -> None:
        self._server = server
        self._recording = recording
        self._file = file
        self._began = time.monotonic()
        self._under_way: set[asyncio.Task[None]] = set()
        self.recorded = self.left_out = 0
        """Requests that were answered: those that were written, and those whose tokens the server didn't tell."""

    def app(self) -> web.Application:
        """The server that clients talk to."""
        from aiohttp import web

        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self._pass_on)
        app.cleanup_ctx.append(self._session)
        return app

    async def _session(self, app: web.Application) -> Any:
        from aiohttp import ClientSession, ClientTimeout, TCPConnector

        async with ClientSession(timeout=ClientTimeout(total=None), connector=TCPConnector(limit=0)) as session:
            self._client = session
            yield
            await asyncio.gather(*self._under_way)

    _client: ClientSession

    async def _pass_on(self, request: web.Request) -> web.StreamResponse:
        from aiohttp import ClientError, web

        arrival = time.monotonic() - self._began
        sent = await request.read()
        headers = {key: value for key, value in request.headers.items() if key.lower() not in _OF_ONE_HOP}
        headers["Accept-Encoding"] = "identity"
        kept = bytearray()
        wanted = request.method == "POST" and request.path in RECORDED
        try:
            address = f"{self._server}{request.path_qs}"
            async with self._client.request(
                request.method, address, headers=headers, data=sent or None, allow_redirects=False
            ) as answer:
                passed = {key: value for key, value in answer.headers.items() if key.lower() not in _OF_ONE_HOP}
                response = web.StreamResponse(status=answer.status, headers=passed)
                await response.prepare(request)
                async for chunk in answer.content.iter_any():
                    await response.write(chunk)
                    if wanted:
                        kept += chunk
                await response.write_eof()
        except ClientError as error:
            return web.Response(status=502, text=f"tidepool record can't reach {self._server}: {error}")
        if wanted and answer.status == 200:
            task = asyncio.create_task(self._record(arrival, request.path, sent, bytes(kept), headers))
            self._under_way.add(task)
            task.add_done_callback(self._under_way.discard)
        return response

    async def _record(self, arrival: float, path: str, sent: bytes, answered: bytes, headers: dict[str, str]) -> None:
        """Write a line for each prompt of a request. It has been answered, so nobody waits for this."""
        try:
            body = json.loads(sent)
            output_tokens, text = answer_of(answered)
            asked = questions(path, body)
            if output_tokens is None:
                question = {"model": body.get("model"), "prompt": text, "add_special_tokens": False}
                output_tokens = len(await self._tokens(question, headers))
            for question in asked:
                tokens = await self._tokens(question, headers)
                line = self._recording.line(arrival, tokens, max(1, output_tokens // len(asked)), body)
                self._file.write(f"{line}\n")
                self.recorded += 1
            self._file.flush()
        except Exception as error:  # whatever a server or a client may send, recording others goes on
            self.left_out += 1
            print(f"A request couldn't be recorded: {type(error).__name__}.", file=sys.stderr)

    async def _tokens(self, question: dict[str, Any], headers: dict[str, str]) -> list[int]:
        if isinstance(question.get("prompt"), list):
            return list(question["prompt"])
        wanted = {key: value for key, value in headers.items() if key.lower() == "authorization"}
        async with self._client.post(f"{self._server}/tokenize", json=question, headers=wanted) as answer:
            answer.raise_for_status()
            return list(json.loads(await answer.read())["tokens"])

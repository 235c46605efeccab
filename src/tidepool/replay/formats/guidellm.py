"""What guidellm writes of a benchmark: one JSON document with the requests that it made."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from tidepool.replay.formats.fields import LATEST_MS
from tidepool.replay.formats.hashed import recorded_tokens
from tidepool.replay.formats.lines import LineError
from tidepool.replay.formats.messages import prompt_tokens
from tidepool.replay.formats.text import Tokens
from tidepool.replay.trace import Recorded, Skipped


def read_guidellm(document: Mapping[str, Any], tokens: Tokens) -> Iterator[Recorded | Skipped]:
    """The successful requests of all its benchmarks, numbered from 1."""
    number = 0
    for benchmark in document["benchmarks"]:
        requests = benchmark.get("requests") if isinstance(benchmark, dict) else None
        for request in (requests.get("successful") if isinstance(requests, dict) else None) or []:
            number += 1
            try:
                yield _request(request, number, tokens)
            except LineError as error:
                yield Skipped(number, str(error))


def _request(request: Any, number: int, tokens: Tokens) -> Recorded:
    if not isinstance(request, dict):
        raise LineError("a request must be a JSON object")
    arguments = _arguments(request.get("request_args"))
    if isinstance(messages := arguments.get("messages"), list):
        prompt = tokens.of_messages(messages, arguments.get("tools") or [])
    else:
        prompt = prompt_tokens(request.get("prompt", arguments.get("prompt")), tokens)
    length = request.get("output_tokens") or _deep(request, "output_metrics", "text_tokens")
    start = request.get("request_start_time") or request.get("start_time")
    start = start or _deep(request, "info", "timings", "request_start")
    if not isinstance(length, int) or length <= 0:
        raise LineError('"output_tokens" must be a positive whole number')
    if not isinstance(start, int | float) or not 0 <= start < LATEST_MS / 1000:
        raise LineError("nothing says when it began")
    return recorded_tokens(float(start), prompt, length, number)


def _arguments(given: object) -> Mapping[str, Any]:
    """What was sent, which some versions write as JSON in a string, and some under a key."""
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError:
            return {}
    if not isinstance(given, dict):
        return {}
    return next(
        (given[key] for key in ("body", "json", "json_body", "payload") if isinstance(given.get(key), dict)), given
    )


def _deep(content: object, *keys: str) -> Any:
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content

"""What ``vllm serve --enable-log-requests`` logs at level DEBUG, which alone has the prompts' tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime

from tidepool.replay.formats.hashed import recorded_tokens
from tidepool.replay.formats.lines import Line, LineError
from tidepool.replay.trace import Recorded, Skipped

_TIME = re.compile(r"\b(\d\d-\d\d \d\d:\d\d:\d\d)\b")
_RECEIVED = re.compile(r"Received request (\S+): (?=params|prompt)")
_DETAILS = re.compile(r"Request (\S+) details: ")
_GENERATED = re.compile(r"Generated response (\S+?)(?: \(streaming complete\))?(?: details)?: ")
_PROMPT = re.compile(r".*prompt_token_ids: \[([\d, ]*)\]")
_OUTPUT = re.compile(r".*output_token_ids: \[([\d, ]*)\]")
_LIMIT = re.compile(r".*\bmax_tokens=(\d+)")
_PART = re.compile(r"-\d+$")
NEEDS_DEBUG = "the log lacks its prompt's tokens: vLLM logs them with VLLM_LOGGING_LEVEL=DEBUG"


@dataclass
class _Request:
    line: int
    arrival: float = 0.0
    prompt: list[int] = field(default_factory=list)
    limit: int | None = None


def is_log_line(text: str) -> bool:
    """Whether vLLM logged a request there."""
    return bool(_RECEIVED.search(text) or _DETAILS.search(text))


def read_log(lines: Iterable[Line]) -> Iterator[Recorded | Skipped]:
    """Its requests, once all is read: what one generated stands behind it."""
    requests: dict[str, _Request] = {}
    lengths: dict[str, int] = {}
    for number, line in lines:
        if generated := _GENERATED.search(line):
            if tokens := _OUTPUT.match(line):
                lengths[_PART.sub("", generated[1])] = len(_numbers(tokens[1]))
        elif found := _RECEIVED.search(line) or _DETAILS.search(line):
            request = requests.setdefault(found[1], _Request(number))
            if (time := _TIME.search(line)) and not request.arrival:
                # Logs name no year; a leap year has all days.
                request.arrival = datetime.fromisoformat(f"2000-{time[1]}+00:00").timestamp()
            if tokens := _PROMPT.match(line):
                request.prompt = _numbers(tokens[1])
            if limit := _LIMIT.match(line):
                request.limit = int(limit[1])
    for name, request in requests.items():
        length = lengths.get(_PART.sub("", name)) or request.limit
        try:
            if not request.prompt:
                raise LineError(NEEDS_DEBUG)
            if not length:
                raise LineError("the log lacks its answer: vLLM logs it with --enable-log-outputs")
            yield recorded_tokens(request.arrival, request.prompt, length, request.line)
        except LineError as error:
            yield Skipped(request.line, str(error))


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number.strip()]

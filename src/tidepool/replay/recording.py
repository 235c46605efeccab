"""What a recording keeps of a request: its time, the lengths of prompt and answer, and which blocks came before.

Blocks of a prompt are numbered in the order in which they first come, so the file has no hash of any text. In memory a
block is known by a hash of it and all before it, under a key that is drawn for each recording and never written.
"""

from __future__ import annotations

import json
import secrets
from array import array
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any


class Numbers:
    """Numbers things by the order in which they first come."""

    def __init__(self) -> None:
        self._numbers: dict[object, int] = {}

    def of(self, thing: object) -> int:
        """Its number, from 0."""
        return self._numbers.setdefault(thing, len(self._numbers))


class Recording:
    """Makes the lines of a trace.

    Args:
        block_tokens: tokens of a block.
    """

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._key = secrets.token_bytes(32)
        self._blocks, self._models, self._salts = Numbers(), Numbers(), Numbers()

    def line(self, arrival: float, tokens: Sequence[int], output_tokens: int, body: Mapping[str, Any]) -> str:
        """A request as a line of a trace.

        Args:
            arrival: seconds since the recording began.
            tokens: of the prompt.
            output_tokens: how many were generated.
            body: what was asked for, of which only the names of model and salt matter.
        """
        fields: dict[str, Any] = {
            "timestamp": round(arrival * 1000),
            "input_length": len(tokens),
            "output_length": output_tokens,
            "block_size": self._block_tokens,
            "hash_ids": list(self._hash_ids(tokens)),
        }
        if model := self._models.of(body.get("model")):
            fields["lora"] = model
        if salt := body.get("cache_salt"):
            fields["cache_salt"] = self._salts.of(salt)
        return json.dumps(fields)

    def _hash_ids(self, tokens: Sequence[int]) -> Iterator[int]:
        before = b""
        for start in range(0, len(tokens), self._block_tokens):
            block = array("q", tokens[start : start + self._block_tokens]).tobytes()
            before = blake2b(before + block, digest_size=16, key=self._key).digest()
            yield self._blocks.of(before)


def questions(path: str, body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What to ask a server's ``/tokenize`` for the prompts of a request; a prompt that is tokens is there already."""
    shared = {key: body[key] for key in ("model", "add_special_tokens") if key in body}
    if path.endswith("/chat/completions"):
        keys = ("messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template")
        template = {key: body[key] for key in (*keys, "chat_template_kwargs") if key in body}
        return [shared | template]
    prompt = body.get("prompt")
    several = isinstance(prompt, list) and not all(isinstance(token, int) for token in prompt)
    prompts: list[Any] = prompt if isinstance(prompt, list) and several else [prompt]
    return [shared | {"prompt": each} for each in prompts]


def answer_of(content: bytes) -> tuple[int | None, str]:
    """(tokens of the answer, if the response says how many; its text). Whole responses and streams of events alike."""
    tokens: int | None = None
    words: list[str] = []
    for event in _events(content):
        usage = event.get("usage")
        if isinstance(usage, dict) and isinstance(usage.get("completion_tokens"), int):
            tokens = usage["completion_tokens"]
        for choice in event.get("choices") or ():
            words += _words(choice.get("delta") or choice.get("message") or choice)
    return tokens, "".join(words)


def _events(content: bytes) -> Iterator[dict[str, Any]]:
    text = content.decode("utf-8", errors="replace")
    parts = [text] if text.lstrip().startswith("{") else [line[5:] for line in text.splitlines() if line[:5] == "data:"]
    for part in parts:
        try:
            event = json.loads(part)
        except ValueError:  # the last one says [DONE]
            continue
        if isinstance(event, dict):
            yield event


def _words(said: Mapping[str, Any]) -> Iterator[str]:
    for key in ("reasoning_content", "reasoning", "content", "text"):
        if isinstance(said.get(key), str):
            yield said[key]
    for call in said.get("tool_calls") or ():
        function = call.get("function") or {}
        yield f"{function.get('name') or ''}{function.get('arguments') or ''}"

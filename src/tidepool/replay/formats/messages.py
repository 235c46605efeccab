"""Requests as OpenAI's API takes them, a JSON object for each: messages or a prompt, also as batch files have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tidepool.replay.formats.fields import milliseconds, positive, salt
from tidepool.replay.formats.hashed import recorded_tokens
from tidepool.replay.formats.lines import LineError
from tidepool.replay.formats.text import Tokens, content
from tidepool.replay.trace import Recorded

_LENGTHS = ("output_length", "output_tokens", "completion_tokens")
_LIMITS = ("max_completion_tokens", "max_tokens")


def has_text(fields: Mapping[str, Any]) -> bool:
    """Whether an object is a request in this form."""
    return (
        any(isinstance(fields.get(key), dict) for key in ("body", "request"))
        or "messages" in fields
        or "prompt" in fields
    )


def read_messages(fields: Mapping[str, Any], line: int, tokens: Tokens) -> Recorded:
    """A request of a line; it arrives at its ``timestamp``, in milliseconds."""
    body = next((fields[key] for key in ("body", "request") if isinstance(fields.get(key), dict)), fields)
    answer = _answer(fields)
    if "messages" in body:
        messages = body["messages"]
        if not isinstance(messages, list) or not messages or not all(isinstance(each, dict) for each in messages):
            raise LineError('"messages" must be a list of objects')
        if answer is None and len(messages) > 1 and messages[-1].get("role") == "assistant":
            *messages, last = messages
            answer = content(last)
        tools = body.get("tools") or []
        prompt = tokens.of_messages(messages, tools if isinstance(tools, list) else [tools])
    else:
        prompt = prompt_tokens(body.get("prompt"), tokens)
    length = _length(fields, body, answer, tokens)
    return recorded_tokens(milliseconds(fields, "timestamp"), prompt, length, line, salt({**body, **fields}))


def prompt_tokens(prompt: object, tokens: Tokens) -> list[int]:
    """The tokens of a prompt that is text or tokens."""
    if isinstance(prompt, str):
        return tokens.of_text(prompt)
    if isinstance(prompt, list) and all(type(token) is int and token >= 0 for token in prompt):
        return prompt
    raise LineError('"prompt" must be text, or a list of tokens')


def _answer(fields: Mapping[str, Any]) -> str | None:
    """The answer's text, where a response is beside the request."""
    response = fields.get("response", fields.get("output"))
    if isinstance(response, str):
        return response
    choices = _body(response).get("choices", fields.get("choices"))
    first = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    if isinstance(first.get("message"), dict):
        return content(first["message"])
    return first.get("text") if isinstance(first.get("text"), str) else None


def _length(fields: Mapping[str, Any], body: Mapping[str, Any], answer: str | None, tokens: Tokens) -> int:
    response = _body(fields.get("response"))
    usages = [each for each in (fields, response.get("usage"), fields.get("usage")) if isinstance(each, dict)]
    for usage, key in ((usage, key) for usage in usages for key in _LENGTHS):
        if usage.get(key) is not None:
            return positive(usage, key)
    if answer is not None:
        return max(1, len(tokens.of_text(answer)))
    for key in _LIMITS:
        if body.get(key) is not None:
            return positive(body, key)
    raise LineError('nothing says how long its answer is: "output_length", a response, or "max_tokens"')


def _body(response: object) -> Mapping[str, Any]:
    """Of a response, which batch files wrap once more."""
    if not isinstance(response, dict):
        return {}
    return response["body"] if isinstance(response.get("body"), dict) else response

"""Tokens of text: a model's own, or words where no tokenizer is given."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tidepool.replay.formats.lines import LineError
from tidepool.replay.trace import FIRST_TOKEN, TraceError

Message = Mapping[str, Any]
BY_WORDS = "Words of at most six letters stand for tokens: lengths are rough, and --tokenizer makes them exact."
_WORD = re.compile(r"\w{1,6}|[^\w\s]|\s{2,}")


class Tokens(Protocol):
    """Makes tokens of text."""

    def of_text(self, text: str) -> list[int]:
        """The tokens of plain text."""

    def of_messages(self, messages: Sequence[Message], tools: Sequence[Any]) -> list[int]:
        """The tokens of a prompt: a conversation that the model goes on from, and the tools that it may call."""


class Words:
    """A number for each word, equal ones for equal words."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    @property
    def used(self) -> bool:
        """Whether there was any text."""
        return bool(self._numbers)

    def of_text(self, text: str) -> list[int]:
        """The numbers of its words."""
        return [self._numbers.setdefault(word, FIRST_TOKEN + len(self._numbers)) for word in _WORD.findall(text)]

    def of_messages(self, messages: Sequence[Message], tools: Sequence[Any]) -> list[int]:
        """The numbers of all messages, one after the other."""
        return self.of_text(plain(messages, tools))


class Tokenizer:
    """A model's own, with its chat template if it has one."""

    def __init__(self, path: Path) -> None:
        try:
            if path.is_dir():
                from transformers import AutoTokenizer

                self._tokenizer: Any = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
            else:
                from tokenizers import Tokenizer as Fast

                self._tokenizer = Fast.from_file(str(path))
        except ImportError as error:
            raise TraceError(f"--tokenizer needs the package {error.name}, which vLLM brings.") from error
        except Exception as error:  # the libraries raise bare ones
            raise TraceError(f"Can't read a tokenizer from {path}.") from error

    def of_text(self, text: str) -> list[int]:
        """The model's tokens."""
        made = self._tokenizer.encode(text, add_special_tokens=False)
        return list(getattr(made, "ids", made))

    def of_messages(self, messages: Sequence[Message], tools: Sequence[Any]) -> list[int]:
        """The model's tokens, by its chat template."""
        if not getattr(self._tokenizer, "chat_template", None):
            return self.of_text(plain(messages, tools))
        try:
            rendered = self._tokenizer.apply_chat_template(
                list(messages), tools=list(tools) or None, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # templates raise what they like
            raise LineError("the tokenizer's chat template refuses its messages") from error
        return self.of_text(rendered)


def plain(messages: Sequence[Message], tools: Sequence[Any]) -> str:
    """A conversation as text, as ChatML has it."""
    head = f"{json.dumps(tools)}\n" if tools else ""
    said = (f"<|im_start|>{each.get('role', '')}\n{content(each)}<|im_end|>\n" for each in messages)
    return f"{head}{''.join(said)}<|im_start|>assistant\n"


def content(message: Message) -> str:
    """What a message says: its text, or that of its parts, and the calls of tools."""
    said = message.get("content") or ""
    if isinstance(said, list):
        said = "".join(str(part.get("text", part.get("type", ""))) for part in said if isinstance(part, Mapping))
    calls = message.get("tool_calls")
    return f"{said}{json.dumps(calls) if calls else ''}"

"""Files of recorded requests in the formats that people have."""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from tidepool.replay.formats import Trace, read_trace
from tidepool.replay.formats.tables import NO_REUSE
from tidepool.replay.formats.text import BY_WORDS
from tidepool.replay.formats.vllm_log import NEEDS_DEBUG
from tidepool.replay.trace import Recorded, TraceError


def read(folder: Path, *lines: object) -> Trace:
    """What a file of these lines holds; objects are written as JSON."""
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "t").write_text(text, "utf-8")
    trace = read_trace(folder / "t")
    for packed in (gzip.compress(text.encode()), b"\xef\xbb\xbf" + text.encode()):
        (folder / "t").write_bytes(packed)
        assert read_trace(folder / "t") == trace, "packed, and behind a byte order mark"
    return trace


def prompt(request: Recorded) -> list[int]:
    return [token for block in request.blocks for token in block]


# Messages.

SYSTEM = {"role": "system", "content": "You are a very helpful assistant."}
ASKED = {"role": "user", "content": "What is the tide, and why?"}
SAID = {"role": "assistant", "content": "The sea rises, since the moon pulls."}


def test_equal_beginnings_of_conversations_are_equal_tokens(tmp_path: Path) -> None:
    first = {"timestamp": 1000, "messages": [SYSTEM, ASKED], "output_length": 9}
    later = {
        "timestamp": 2500,
        "messages": [SYSTEM, ASKED, SAID, {"role": "user", "content": "Why?"}],
        "max_tokens": 30,
    }
    trace = read(tmp_path, first, later)
    assert trace.notes == [BY_WORDS]
    one, two = trace.requests
    assert (one.arrival, two.arrival) == (1, 2.5)
    assert (one.output_tokens, two.output_tokens) == (9, 30)
    opening = prompt(one)[:-4]
    assert prompt(two)[: len(opening)] == opening
    assert len(prompt(two)) > len(prompt(one))


@pytest.mark.parametrize(
    ("fields", "length"),
    [
        ({"output_length": 5, "max_tokens": 50, "response": "a b c"}, 5),
        ({"usage": {"completion_tokens": 6}, "max_tokens": 50}, 6),
        ({"response": {"body": {"usage": {"completion_tokens": 7}}}}, 7),
        ({"response": "a b c"}, 3),
        ({"output": "a b c d"}, 4),
        ({"response": {"choices": [{"message": {"content": "a b"}}]}}, 2),
        ({"choices": [{"text": "a b"}]}, 2),
        ({"max_completion_tokens": 8}, 8),
    ],
)
def test_the_answers_length_is_found(tmp_path: Path, fields: dict[str, Any], length: int) -> None:
    assert read(tmp_path, {"messages": [ASKED]} | fields).requests[0].output_tokens == length


def test_a_conversation_that_ends_with_the_assistant_is_a_prompt_and_its_answer(tmp_path: Path) -> None:
    told, asked = read(tmp_path, {"messages": [ASKED, SAID]}, {"messages": [ASKED], "max_tokens": 9}).requests
    assert prompt(told) == prompt(asked)
    assert told.output_tokens == 9


def test_batch_files_and_plain_prompts(tmp_path: Path) -> None:
    batch = {"custom_id": "1", "url": "/v1/chat/completions", "body": {"messages": [ASKED], "max_tokens": 5}}
    plain = {"prompt": "a b c", "max_tokens": 2}
    tokens = {"prompt": [5, 6, 7], "max_tokens": 3, "lora": "sql"}
    trace = read(tmp_path, batch, plain, tokens)
    assert [request.output_tokens for request in trace.requests] == [5, 2, 3]
    assert prompt(trace.requests[2]) == [5, 6, 7]
    assert [request.salt is None for request in trace.requests] == [True, True, False]
    assert trace.notes == [BY_WORDS, "The trace has no times, so all requests arrive at once."]


def test_parts_and_calls_of_tools_are_read(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "tide"}}]}
    parts = {"role": "user", "content": [{"type": "text", "text": "Look:"}, {"type": "image_url", "image_url": {}}]}
    made = read(tmp_path, {"messages": [parts, call, ASKED], "tools": [{"name": "tide"}], "max_tokens": 1})
    assert made.requests[0].input_tokens > 30


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"messages": []}, '"messages" must be a list of objects'),
        ({"messages": ["hello"]}, '"messages" must be a list of objects'),
        ({"messages": [ASKED]}, "nothing says how long its answer is"),
        ({"messages": [ASKED], "max_tokens": -1}, '"max_tokens" must be a positive'),
        ({"prompt": None, "max_tokens": 1}, '"prompt" must be text'),
        ({"prompt": "", "max_tokens": 1}, "its prompt is empty"),
    ],
)
def test_what_is_no_request_of_text_is_said(tmp_path: Path, line: object, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        read(tmp_path, line)


def test_a_tokenizer_counts_as_the_model_does(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[UNK]": 0, "the": 1, "tide": 2}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "t").write_text(json.dumps({"prompt": "the tide the", "response": "tide"}), "utf-8")
    trace = read_trace(tmp_path / "t", tokenizer=tmp_path / "tokenizer.json")
    assert prompt(trace.requests[0]) == [1, 2, 1]
    assert trace.requests[0].output_tokens == 1
    assert not trace.notes
    with pytest.raises(TraceError, match=r"Can't read a tokenizer from .*\.$"):
        read_trace(tmp_path / "t", tokenizer=tmp_path / "t")


# Tables.


@pytest.mark.parametrize(
    "lines",
    [
        (
            "TIMESTAMP,ContextTokens,GeneratedTokens",
            "2023-11-16 18:17:03.9799600,4808,10",
            "2023-11-16 18:17:04.0319600,3180,8",
        ),
        (
            "TIMESTAMP,ContextTokens,GeneratedTokens",
            "2024-05-10 00:00:00.009930+00:00,4808,10",
            "2024-05-10 00:00:00.061930+00:00,3180,8",
        ),
        (
            "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type",
            "5,ChatGPT,4808,10,4818,Conversation log",
            "5.052,GPT-4,3180,8,3188,API log",
        ),
        (
            "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type",
            '5,"a,b",1,ChatGPT,4808,10,4818,Conversation log',
            "5.052,c,1,GPT-4,3180,8,3188,API log",
        ),
    ],
    ids=["Azure 2023", "Azure 2024", "BurstGPT", "BurstGPT 3"],
)
def test_tables_of_lengths(tmp_path: Path, lines: tuple[str, ...]) -> None:
    failed = ",".join("0" if name.endswith("okens") else "1" for name in next(csv.reader(io.StringIO(lines[0]))))
    trace = read(tmp_path, *lines, failed, "x")
    first, second = trace.requests
    assert (first.input_tokens, first.output_tokens, second.input_tokens, second.output_tokens) == (4808, 10, 3180, 8)
    assert second.arrival - first.arrival == pytest.approx(0.052)
    assert not {*prompt(first)} & {*prompt(second)}
    assert trace.notes == [NO_REUSE]
    assert [each.line for each in trace.skipped] == [4, 5]


# Logs.


def test_vllms_own_log_is_read(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    from vllm import SamplingParams
    from vllm.entrypoints.serve.utils import request_logger

    log = io.StringIO()
    handler = logging.StreamHandler(log)
    handler.setFormatter(logging.Formatter("%(levelname)s 07-21 10:31:0%(created).0s2 [x.py:1] %(message)s"))
    logger, level = request_logger.logger, request_logger.logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        made = request_logger.RequestLogger(max_log_len=None)
        for name, tokens in (("cmpl-a-0", [1, 2, 3]), ("cmpl-b-0", [4, 5])):
            text = "prompt_token_ids: [9], max_tokens=3"
            made.log_inputs(name, text, tokens, None, SamplingParams(max_tokens=77), None)
        made.log_outputs("cmpl-a", "tide", [7, 8], "stop")
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    (tmp_path / "t").write_text("INFO 07-21 10:30:00 [api.py:1] Starting\n" + log.getvalue(), "utf-8")
    trace = read_trace(tmp_path / "t")
    assert [prompt(request) for request in trace.requests] == [[1, 2, 3], [4, 5]]
    assert [request.output_tokens for request in trace.requests] == [2, 77]


OLD_LOG = (
    "INFO 03-01 10:00:00 [logger.py:42] Received request cmpl-1-0: prompt: 'Say [1]', params: SamplingParams(n=1, "
    "max_tokens=16, min_tokens=0), prompt_token_ids: [1, 2, 3, 4], prompt_embeds shape: None, lora_request: None.",
    "INFO 03-01 10:00:02 [loggers.py:116] Engine 000: Running: 1 reqs",
    "INFO 03-01 10:00:05 [logger.py:42] Received request cmpl-2-0: prompt: 'Hi', params: SamplingParams(n=1, "
    "max_tokens=8, min_tokens=0), prompt_token_ids: [1, 2], prompt_embeds shape: None, lora_request: None.",
)


def test_logs_of_older_versions_are_read(tmp_path: Path) -> None:
    one, two = read(tmp_path, *OLD_LOG).requests
    assert (prompt(one), one.output_tokens) == ([1, 2, 3, 4], 16)
    assert (prompt(two), two.output_tokens, two.arrival - one.arrival) == ([1, 2], 8, 5)


def test_a_log_without_tokens_says_how_to_get_them(tmp_path: Path) -> None:
    line = "INFO 07-21 10:31:02 [x.py:66] Received request a-0: params: SamplingParams(max_tokens=9), lora: None."
    with pytest.raises(TraceError, match=NEEDS_DEBUG):
        read(tmp_path, line)


NEW = {
    "request_args": json.dumps({"stream": True, "body": {"messages": [ASKED], "max_tokens": 5}}),
    "info": {"timings": {"request_start": 1_700_000_001.5}},
    "input_metrics": {"text_tokens": 12},
    "output_metrics": {"text_tokens": 5},
}
OLD = {"prompt": "a b c", "prompt_tokens": 3, "output_tokens": 4, "start_time": 1_700_000_000.0}


@pytest.mark.parametrize("indent", [None, 1])
def test_guidellm_is_read(tmp_path: Path, indent: int | None) -> None:
    requests = {"successful": [NEW, OLD, {}, OLD | {"output_tokens": None}], "errored": [OLD]}
    trace = read(tmp_path, json.dumps({"benchmarks": [{"requests": requests}]}, indent=indent))
    old, new = trace.requests
    assert (old.output_tokens, new.output_tokens) == (4, 5)
    assert new.arrival - old.arrival == 1.5
    assert old.input_tokens == 3
    assert [each.line for each in trace.skipped] == [3, 4]
    with pytest.raises(TraceError, match="holds no requests"):
        read(tmp_path, json.dumps({"benchmarks": [{}]}, indent=indent))


@pytest.mark.parametrize("text", ["{\n", "{\n}", '{\n"a": 1}', "{\n[[", "once upon a time"])
def test_what_is_no_format_is_said(tmp_path: Path, text: str) -> None:
    with pytest.raises(TraceError, match="line 1: not valid JSON"):
        read(tmp_path, text)

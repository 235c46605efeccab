"""What real engines answered, compared: shared by tests in several folders.

A result has ``answers``, a list of ``{"tokens": [...], "logprobs": [{token: log-probability}, ...]}``.
"""

from __future__ import annotations

from typing import Any

from tidepool.running.agreement import BFLOAT16_GAP, first_gap


def tokens(result: dict[str, Any]) -> list[list[int]]:
    """The tokens of every answer."""
    return [answer["tokens"] for answer in result["answers"]]


def gaps(reference: dict[str, Any], result: dict[str, Any]) -> list[float]:
    """`first_gap` of every answer that differs."""
    pairs = zip(reference["answers"], result["answers"], strict=True)
    found = [first_gap(expected["tokens"], expected["logprobs"], got["tokens"]) for expected, got in pairs]
    return [gap for gap in found if gap is not None]


def assert_same_answers(reference: dict[str, Any], result: dict[str, Any]) -> None:
    """Where the same chunks run, answers are equal to the last token, but for batches of another size.

    On some processors (those with AMX, say) kernels add in another order there: at most one answer in ten may part,
    and only where the reference found both tokens as good as equal.
    """
    found = gaps(reference, result)
    assert all(gap <= BFLOAT16_GAP for gap in found), found
    assert len(found) <= len(reference["answers"]) // 10, found

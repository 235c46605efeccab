"""Whether two runs gave the same answers, as far as bfloat16 can tell.

A token computed in a batch of another size, or a prompt cut in another place, is rounded in another order. Where two
tokens are as good as equally likely, that decides between them, and everything after it differs. So what counts is the
first token that differs: how much likelier the reference found its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf

BFLOAT16_GAP = 1.0
"""Log-probabilities that rounding accounts for, with the models of `tidepool.testing.tiny`: their logits reach 64,
where neighbouring bfloat16 numbers lie 0.25 apart, and this is four such steps."""
ALTERNATIVES = 20
"""Log-probabilities of so many tokens are kept for each one generated; one that isn't among them is far off."""

Logprobs = Sequence[Mapping[str, float]]
"""For each generated token, the log-probabilities of the likeliest: by token id as text, which is what JSON has."""


def first_gap(expected: Sequence[int], logprobs: Logprobs, got: Sequence[int]) -> float | None:
    """How much likelier the reference found its own token where an answer first differs from it.

    Args:
        expected: the reference's tokens.
        logprobs: the reference's, one entry a token.
        got: the other answer's tokens.

    Returns:
        A difference of log-probabilities; infinite where the other token was far off, or one answer is shorter. None
        if the answers are equal.
    """
    for ours, theirs, likely in zip(expected, got, logprobs, strict=False):
        if ours != theirs:
            return likely[str(ours)] - likely.get(str(theirs), -inf)
    return None if len(expected) == len(got) else inf

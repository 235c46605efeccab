"""What attention gets wrong by a format, as theory says; docs/tqkv.md derives it, a test holds it to measurements."""

from __future__ import annotations

import torch

from tidepool.tqkv.codebook import lloyd_max
from tidepool.tqkv.formats import Format


def expected_error(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, form: Format
) -> tuple[torch.Tensor, torch.Tensor]:
    """The outputs of causal attention, and the expected square of how far a format moves each.

    To first order, and over random rotations: with weights p, output o and noise n = D / (1 - D) of a codebook,

        sum of p_i^2 (n_v |v_i|^2 + scale^2 |q|^2 |k_i|^2 n_k / size |v_i - o|^2)

    Args:
        query: ``[tokens, size]``, of the last tokens.
        key, value: ``[all tokens, size]``.
        scale: of the scores.
        form: the format.

    Returns:
        ``[tokens, size]`` and ``[tokens]``.
    """
    (asked, size), tokens = query.shape, len(key)
    own = torch.arange(tokens - asked, tokens).unsqueeze(1)
    weights = (query @ key.T * scale).masked_fill(torch.arange(tokens) > own, -torch.inf).softmax(-1)
    output = weights @ value
    queries, keys, values, outputs = (each.square().sum(-1) for each in (query, key, value, output))
    scores = scale**2 * lloyd_max(form.key_bits).noise / size * queries.unsqueeze(1) * keys
    apart = values + outputs.unsqueeze(1) - 2 * output @ value.T
    return output, (weights.square() * (lloyd_max(form.value_bits).noise * values + scores * apart)).sum(-1)

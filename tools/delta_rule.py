"""The gated delta rule in chunks, for training: the function of transformers' fallback, in fewer and larger steps.

Transformers loops over chunks with half a dozen small products in each. Here a chunk's effect on the state is one
matrix, S' = M S + C, computed for all chunks at once, so that the loop has a single product a chunk in each direction.
"""

# torch has no types here, see pyproject.toml.
# mypy: disallow-subclassing-any=False, disallow-untyped-decorators=False

from typing import Any

import torch

CHUNK = 64
"""Tokens of a chunk."""


class _UnitInverse(torch.autograd.Function):
    """The inverse of I + L for strictly lower triangular L, in blocks that double; stable as forward substitution."""

    @staticmethod
    def forward(ctx: Any, lower: torch.Tensor) -> torch.Tensor:
        size = lower.shape[-1]
        lead = lower.shape[:-2]
        inverse = torch.ones(*lead, size, 1, 1, dtype=lower.dtype, device=lower.device)
        width = 1
        while width < size:
            pairs = size // (2 * width)
            blocks = lower.view(*lead, pairs, 2 * width, pairs, 2 * width)
            corner = blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)[..., width:, :width]
            first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
            joined = torch.zeros(*lead, pairs, 2 * width, 2 * width, dtype=lower.dtype, device=lower.device)
            joined[..., :width, :width] = first
            joined[..., width:, width:] = second
            joined[..., width:, :width] = -(second @ corner @ first)
            inverse, width = joined, 2 * width
        result = inverse.squeeze(-3)
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (inverse,) = ctx.saved_tensors
        turned = inverse.transpose(-1, -2)
        return -(turned @ grad @ turned).tril(-1)


class _Scan(torch.autograd.Function):
    """States before each chunk, from S' = M S + C and a state of zeros; chunks are the first dimension."""

    @staticmethod
    def forward(ctx: Any, steps: torch.Tensor, updates: torch.Tensor) -> torch.Tensor:
        states = torch.empty_like(updates)
        states[0].zero_()
        for i in range(len(states) - 1):
            torch.baddbmm(updates[i], steps[i], states[i], out=states[i + 1])
        ctx.save_for_backward(steps, states)
        return states

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        steps, states = ctx.saved_tensors
        after = torch.empty_like(states)  # gradients of the states after each chunk
        after[-1].zero_()
        for i in range(len(states) - 1, 0, -1):
            torch.baddbmm(grad[i], steps[i].transpose(-1, -2), after[i], out=after[i - 1])
        return after @ states.transpose(-1, -2), after


def gated_delta_rule(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, decay: torch.Tensor, beta: torch.Tensor
) -> torch.Tensor:
    """Outputs of the gated delta rule from a state of zeros, with queries and keys normalized.

    Args:
        query: [batch, tokens, heads, key size]; the number of tokens is a multiple of `CHUNK`.
        key: like ``query``.
        value: [batch, tokens, heads, value size].
        decay: [batch, tokens, heads], logarithms of what is left of the state.
        beta: [batch, tokens, heads], in 0 to 1.

    Returns:
        Like ``value``, in float32.
    """
    batch, tokens, heads, size = value.shape
    chunks = tokens // CHUNK

    def cut(x: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, heads, ...] to [chunks, batch * heads, CHUNK, ...]."""
        x = x.float().view(batch, chunks, CHUNK, heads, -1).permute(1, 0, 3, 2, 4)
        return x.reshape(chunks, batch * heads, CHUNK, -1)

    query, key, value, decay, beta = (cut(x) for x in (query, key, value, decay, beta))
    query = query * torch.rsqrt((query * query).sum(-1, keepdim=True) + 1e-6) * query.shape[-1] ** -0.5
    key = key * torch.rsqrt((key * key).sum(-1, keepdim=True) + 1e-6)

    total = decay.cumsum(-2)  # [chunks, batch * heads, CHUNK, 1]
    future = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=query.device).triu(1)
    pairwise = (total - total.transpose(-1, -2)).masked_fill(future, float("-inf")).exp()
    key_beta = key * beta
    inverse = _UnitInverse.apply((key_beta @ key.transpose(-1, -2) * pairwise).tril(-1))
    new_values = inverse @ (value * beta)
    old_keys = inverse @ (key_beta * total.exp())
    scores = query @ key.transpose(-1, -2) * pairwise

    last = total[..., -1:, :]
    late_keys = (key * (last - total).exp()).transpose(-1, -2)
    eye = torch.eye(key.shape[-1], dtype=key.dtype, device=key.device)
    states = _Scan.apply(last.exp() * eye - late_keys @ old_keys, late_keys @ new_values)
    output = (query * total.exp()) @ states + scores @ (new_values - old_keys @ states)
    return output.view(chunks, batch, heads, CHUNK, size).permute(1, 0, 3, 2, 4).reshape(batch, tokens, heads, size)

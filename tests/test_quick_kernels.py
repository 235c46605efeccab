"""The tests' own kernels compute what vLLM's do."""

from __future__ import annotations

import pytest

import quick_kernels

pytestmark = pytest.mark.vllm


def test_the_gated_delta_rule_is_vllms() -> None:
    import torch
    from vllm import _custom_ops as ops

    torch.manual_seed(0)
    bounds = torch.tensor([0, 1, 64, 193], dtype=torch.int32)
    tokens, slots = 193, torch.tensor([4, 0, 2], dtype=torch.int32)
    query, key = (torch.randn(1, tokens, 2, 128, dtype=torch.bfloat16) for _ in range(2))
    value = torch.randn(1, tokens, 4, 128, dtype=torch.bfloat16)
    g = -torch.rand(1, tokens, 4)
    beta = torch.rand(1, tokens, 4, dtype=torch.bfloat16)
    states = torch.randn(5, 4, 128, 128) * 0.1
    found = []
    for rule in (ops.chunk_gated_delta_rule_cpu, quick_kernels.chunk_gated_delta_rule):
        state = states.clone()
        out, _ = rule(query, key, value, g, beta, state, True, bounds, False, True, slots)
        assert torch.equal(state[[1, 3]], states[[1, 3]]), "other slots"
        found.append((out.float(), state))
    (out, state), (ours, our_state) = found
    assert (out - ours).abs().max() < 0.02 * out.abs().max()
    assert (state - our_state).abs().max() < 0.02 * state.abs().max()

"""Kernels for tests on processors without AVX-512, where vLLM's own are some ten times slower.

There vLLM computes the gated delta rule and products in bfloat16 one number at a time. These compute the same in
float32 and round at the end. Both sides of a comparison use them, so what is tested stays the same: which memory holds
what. They need no more of a processor than torch does. test_quick_kernels.py holds them to vLLM's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

CHUNK = 64
"""Tokens of a chunk of the gated delta rule."""


def is_slow() -> bool:
    """Whether vLLM's kernels are slow here: an x86 processor that has AVX2 and no AVX-512."""
    flags = Path("/proc/cpuinfo")
    return flags.exists() and " avx2" in (text := flags.read_text(encoding="utf-8")) and " avx512f" not in text


def install() -> None:
    """Put them in the place of vLLM's in this process, if those are slow."""
    if not is_slow():
        return
    import torch
    from vllm import _custom_ops
    from vllm.model_executor.layers import utils

    _custom_ops.chunk_gated_delta_rule_cpu = chunk_gated_delta_rule
    dispatch = utils.dispatch_cpu_unquantized_gemm

    def dispatch_cpu_unquantized_gemm(layer: Any, remove_weight: bool) -> None:
        dispatch(layer, remove_weight=False)
        if layer.weight.dtype == torch.bfloat16 and layer.weight.dim() == 2:
            wide = layer.weight.float()
            layer.cpu_linear = lambda x, weight, bias: torch.nn.functional.linear(
                x.float(), wide, None if bias is None else bias.float()
            ).to(x.dtype)

    utils.dispatch_cpu_unquantized_gemm = dispatch_cpu_unquantized_gemm


def chunk_gated_delta_rule(
    query: Any,
    key: Any,
    value: Any,
    g: Any,
    beta: Any,
    initial_state: Any,
    output_final_state: bool,
    cu_seqlens: Any,
    head_first: bool,
    use_qk_l2norm_in_kernel: bool,
    initial_state_indices: Any,
    eps: float = 1e-5,
) -> tuple[Any, Any]:
    """As vLLM's function of this name: reads prompts from their states, and leaves their new ones in place.

    Args:
        query, key: [1, tokens, key heads, key size], normalized here.
        value: [1, tokens, value heads, value size].
        g, beta: [1, tokens, value heads]; logarithms of what is left of the state, and what is written of a value.
        initial_state: [slots, value heads, key size, value size], changed.
        cu_seqlens: where each prompt begins, and the last one ends.
        initial_state_indices: the slot of each prompt.
        output_final_state, head_first, use_qk_l2norm_in_kernel, eps: as vLLM calls it.
    """
    import torch

    assert output_final_state
    assert use_qk_l2norm_in_kernel
    assert not head_first
    out = torch.empty_like(value)
    bounds = cu_seqlens.tolist()
    for slot, start, end in zip(initial_state_indices.tolist(), bounds, bounds[1:], strict=False):
        part = slice(start, end)
        inputs: list[Any] = [x[0, part].float() for x in (query, key, value, g, beta)]
        result, initial_state[slot] = _one(*inputs, *[initial_state[slot].float(), eps])
        out[0, part] = result.to(out.dtype)
    return out, initial_state


def _one(query: Any, key: Any, value: Any, g: Any, beta: Any, state: Any, eps: float) -> tuple[Any, Any]:
    """One prompt, in chunks: inside a chunk every token's effect on the later ones is solved for at once."""
    import torch

    tokens, heads = value.shape[:2]
    repeat = heads // query.shape[1]
    query, key = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + eps) for x in (query, key))
    query = query * query.shape[-1] ** -0.5
    query, key = (x.repeat_interleave(repeat, 1) for x in (query, key))
    query, key, value, g, beta = (
        torch.nn.functional.pad(x.movedim(1, 0), (0, 0) * (x.dim() - 2) + (0, -tokens % CHUNK))
        for x in (query, key, value, g, beta)
    )
    total = g.unflatten(1, (-1, CHUNK)).cumsum(-1).flatten(1)
    out = torch.empty_like(value)
    future = torch.ones(CHUNK, CHUNK, dtype=torch.bool).triu(1)
    for start in range(0, value.shape[1], CHUNK):
        part = slice(start, start + CHUNK)
        q, k, v, left, write = query[:, part], key[:, part], value[:, part], total[:, part, None], beta[:, part, None]
        pairwise = (left - left.transpose(1, 2)).masked_fill(future, float("-inf")).exp()
        among = (k * write) @ k.transpose(1, 2) * pairwise
        among = among.tril(-1) + torch.eye(CHUNK)
        updates = (v - (k * left.exp()) @ state) * write
        updates = torch.linalg.solve_triangular(among, updates, upper=False, unitriangular=True)
        out[:, part] = (q * left.exp()) @ state + (q @ k.transpose(1, 2) * pairwise) @ updates
        last = left[:, -1:]
        state = last.exp() * state + (k * (last - left).exp()).transpose(1, 2) @ updates
    return out.movedim(0, 1)[:tokens], state

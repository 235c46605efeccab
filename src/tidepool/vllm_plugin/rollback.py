"""Drafts over states on the CPU: twins of GPU kernels, for requests to go back to the state of their last good token.

A step reads a request's last token and its drafts, and leaves one state for each: that after token t lies in the t-th
of the request's rollback blocks, and the convolution's inputs in one wider window. The next step continues from the one
of the last token that was accepted. `tidepool.vllm_plugin.compat` puts these functions where vLLM 0.32 lacks them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def _require_accepted(accepted: torch.Tensor) -> None:
    """A request that accepted nothing would have to go back before the step, which no state is kept for.

    Raises:
        RuntimeError: there is such a request.
    """
    if int(accepted.min()) < 1:
        raise RuntimeError(
            "A step with drafts gave a request no token at all, and the state before it is gone: serve such requests "
            "(vLLM's issue 56419 names structured output) without speculative decoding."
        )


def convolve_drafts(
    x: torch.Tensor,
    windows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    silu: bool,
    blocks: torch.Tensor,
    starts: torch.Tensor,
    accepted: torch.Tensor,
) -> torch.Tensor:
    """The causal convolution of a step with drafts; any number of tokens from each request.

    Column ``c`` of a window is the input ``c`` tokens after the oldest that the last step still needed, so the inputs
    before this step's first token begin at column ``accepted - 1``.

    Args:
        x: inputs, ``[token, channel]``.
        windows: cached inputs, ``[block, channel, width - 1 + drafts]``; those of ``blocks`` are changed.
        weight: ``[channel, width]``.
        bias: ``[channel]``.
        silu: whether SiLU follows.
        blocks: the block with each request's window, ``[request]``.
        starts: each request's first token in ``x``, and the end of the last, ``[request + 1]``.
        accepted: tokens of the last step that counted, ``[request]``, at least 1.

    Returns:
        Outputs, ``[token, channel]``.

    Raises:
        RuntimeError: a request accepted none.
    """
    import torch

    _require_accepted(accepted)
    out = torch.empty_like(x)
    width, wide = weight.shape[1], weight.float()
    rows = zip(blocks.tolist(), starts.tolist(), starts.tolist()[1:], accepted.tolist(), strict=False)
    for block, start, end, good in rows:
        if start == end:
            continue
        window = windows[block]
        inputs = torch.cat([window[:, good - 1 : good + width - 2], x[start:end].T.to(window.dtype)], dim=1)
        columns = inputs.float()
        each = sum(columns[:, k : k + end - start] * wide[:, k, None] for k in range(width))
        each = each if bias is None else each + bias.float()[:, None]
        out[start:end] = (torch.nn.functional.silu(each) if silu else each).T.to(out.dtype)
        window[:, : inputs.shape[1] - 1] = inputs[:, 1:]
    return out


def convolution_update(
    update: Callable[..., Any],
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: bool | str | None = None,
    conv_state_indices: torch.Tensor | None = None,
    num_accepted_tokens: torch.Tensor | None = None,
    query_start_loc: torch.Tensor | None = None,
    **rest: Any,
) -> Any:
    """``causal_conv1d_update``, which overlooks drafts on the CPU; with the arguments of vLLM's GPU function."""
    if num_accepted_tokens is None or conv_state_indices is None or query_start_loc is None:
        return update(
            x,
            conv_state,
            weight,
            bias,
            activation,
            conv_state_indices=conv_state_indices,
            query_start_loc=query_start_loc,
            **rest,
        )
    blocks = conv_state_indices[:, 0] if conv_state_indices.dim() == 2 else conv_state_indices
    return convolve_drafts(x, conv_state, weight, bias, bool(activation), blocks, query_start_loc, num_accepted_tokens)


def state_update(
    update: Callable[..., None],
    backend: Any,
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *args: Any,
    state_batch_indices: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    num_accepted_tokens: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    **rest: Any,
) -> None:
    """The call of ``CPUSSUBackend``, whose kernel takes one token of each request and one block.

    The kernel is run on the first token of every request, then on the second, and so on; each time in a copy of the
    state before, for it writes to the block that it reads.
    """
    import torch

    if num_accepted_tokens is None or cu_seqlens is None or state_batch_indices is None or out is None:
        update(
            backend,
            state,
            x,
            dt,
            A,
            B,
            C,
            *args,
            state_batch_indices=state_batch_indices,
            out=out,
            num_accepted_tokens=num_accepted_tokens,
            cu_seqlens=cu_seqlens,
            **rest,
        )
        return
    rest |= {"num_accepted_tokens": None, "cu_seqlens": None}
    lengths = cu_seqlens.diff()
    before = state_batch_indices.gather(1, num_accepted_tokens[:, None].long() - 1)[:, 0]
    for index in range(int(lengths.max())):
        rows = (lengths > index).nonzero()[:, 0]
        tokens = (cu_seqlens[rows] + index).long()
        blocks = state_batch_indices[rows, index].contiguous()
        moved = blocks != before[rows]
        state[blocks[moved].long()] = state[before[rows][moved].long()]
        part = torch.empty_like(out[tokens])
        rest["dst_state_batch_indices"] = blocks
        parts = (each[tokens] for each in (x, dt, B, C))
        x_part, dt_part, B_part, C_part = parts
        update(backend, state, x_part, dt_part, A, B_part, C_part, *args, state_batch_indices=blocks, out=part, **rest)
        out[tokens] = part
        before = state_batch_indices[:, index]


def gdn_draft_step(
    layer: Any,
    metadata: Any,
    mixed_qkv: torch.Tensor,
    b: torch.Tensor,
    a: torch.Tensor,
    windows: torch.Tensor,
    states: torch.Tensor,
    width: int,
    window_length: int,
) -> torch.Tensor:
    """A Gated DeltaNet layer's step over requests with drafts, whatever the number that each has.

    vLLM's own is right only where every request has all its drafts.

    Args:
        layer: the layer.
        metadata: its ``GDNAttentionMetadata``.
        mixed_qkv, b, a: inputs of the requests with drafts, ``[token, ...]``.
        windows: the convolution's cached inputs, ``[block, channel, window_length]``.
        states: recurrent states, ``[block, head, key, value]``.
        width, window_length: as in `convolve_drafts`.

    Returns:
        Outputs, ``[token, head, value]``.
    """
    import torch
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.mamba.ops.cpu.gdn_attention import _unpacked_conv_weight

    requests = metadata.num_spec_decodes
    blocks = metadata.spec_state_indices_tensor[:requests].to(torch.int32).contiguous()
    starts = metadata.spec_query_start_loc[: requests + 1].to(torch.int32).contiguous()
    accepted = metadata.num_accepted_tokens[:requests].to(torch.int32).contiguous()
    silu = layer.activation == "silu"
    weight, bias = _unpacked_conv_weight(layer), layer.conv1d.bias
    convolved = convolve_drafts(mixed_qkv, windows, weight, bias, silu, blocks[:, 0], starts, accepted)
    query, key, value = (each.squeeze(0) for each in layer.rearrange_mixed_qkv(convolved))
    out: torch.Tensor = ops.fused_sigmoid_gating_delta_rule_update_spec_cpu(
        A_log=layer.A_log,
        dt_bias=layer.dt_bias,
        q=query,
        k=key,
        v=value,
        a=a,
        b=b,
        initial_state_source=states,
        spec_state_indices=blocks,
        num_accepted_tokens=accepted,
        cu_seqlens=starts,
        use_qk_l2norm_in_kernel=True,
    )
    return out


# States that move to another block: prefix caching -------------------------------------------------------------
#
# vLLM launches one program for each request and each state of a layer. The twins get the same arguments, among them
# tensors of addresses.


def copy_before_step(
    to_column: torch.Tensor, from_column: torch.Tensor, bias: torch.Tensor, *layout: Any, **constants: Any
) -> None:
    """Copy the state from which each request continues to the block that this step writes, where that is another one.

    Args:
        to_column, from_column: columns of the block table, ``[request]``; -1 where there is no state yet.
        bias: tokens accepted in the last step less one, ``[request]``.
        layout: of the states and block tables, then an index of requests (None) and the number of requests.
        constants: compile-time constants of the GPU kernel.
    """
    *shape, _, requests = layout
    rows = zip(range(requests), to_column.tolist(), from_column.tolist(), bias.tolist(), strict=False)
    for row, target, source, tokens in rows:
        if source >= 0 and source != target:
            _copy_state(row, source, target, tokens, *shape, **constants)


def copy_after_step(
    accepted: torch.Tensor,
    running_column: torch.Tensor,
    scheduled: torch.Tensor,
    computed: torch.Tensor,
    drafts: torch.Tensor,
    *layout: Any,
    block_size: int,
    **constants: Any,
) -> None:
    """Keep the state at the last multiple of ``block_size`` that the accepted tokens passed, in that block.

    Args:
        accepted: tokens that this step yielded, ``[request]``.
        running_column: column of the block table that this step wrote, ``[request]``.
        scheduled, computed, drafts: tokens of this step, before it, and drafts among this step's, ``[request]``.
        layout: of the states and block tables, then the accepted tokens to go on from (changed: 1 where the state has
            moved within its block), an index of requests (None) and the number of requests.
        block_size: tokens between checkpoints.
        constants: compile-time constants of the GPU kernel.
    """
    *shape, accepted_out, _, requests = layout
    for row in range(requests):
        before_drafts = int(computed[row] + scheduled[row] - drafts[row])
        aligned = (before_drafts + int(accepted[row]) - 1) // block_size * block_size
        if aligned < before_drafts:
            continue
        source, target, tokens = int(running_column[row]), aligned // block_size - 1, aligned - before_drafts
        if source == target:
            accepted_out[row] = 1
        if source != target or tokens:
            _copy_state(row, source, target, tokens, *shape, **constants)


def _copy_state(
    row: int,
    source: int,
    target: int,
    tokens: int,
    tables: torch.Tensor,
    table_stride: int,
    bases: torch.Tensor,
    block_strides: torch.Tensor,
    element_sizes: torch.Tensor,
    inner_sizes: torch.Tensor,
    conv_widths: torch.Tensor,
    groups: torch.Tensor,
    row_counts: torch.Tensor,
    row_strides: torch.Tensor,
    CONV_STATE_DIM_FIRST: bool = False,
    **_: Any,
) -> None:
    """Copy a request's state, all layers: from that after ``tokens`` drafts to another column of its block table."""
    layers = zip(
        bases.tolist(),
        block_strides.tolist(),
        element_sizes.tolist(),
        inner_sizes.tolist(),
        conv_widths.tolist(),
        groups.tolist(),
        row_counts.tolist(),
        row_strides.tolist(),
        strict=True,
    )
    addresses = tables.tolist()
    for base, stride, element, inner, columns, group, channels, channel_stride in layers:
        table = addresses[group] + 4 * row * table_stride  # block ids are 32 bits wide

        def block(column: int, table: int = table, base: int = base, stride: int = stride) -> int:
            return base + stride * ctypes.c_int32.from_address(table + 4 * column).value

        if not columns:
            # Recurrent states: one block for each token.
            ctypes.memmove(block(target), block(source + tokens), inner * element)
        elif CONV_STATE_DIM_FIRST:
            for channel in range(channels):
                at = channel * channel_stride
                size = (columns - tokens) * element
                ctypes.memmove(block(target) + at, block(source) + at + tokens * element, size)
        else:
            token = inner * element
            ctypes.memmove(block(target), block(source) + tokens * token, (columns - tokens) * token)

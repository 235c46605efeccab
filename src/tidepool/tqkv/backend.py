"""vLLM's attention backend for coded pages, on the CPU.

One class for each format: vLLM asks classes, not objects, for the size of a page. All are the same but for `form`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.selector import AttentionSelectorConfig
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from tidepool.cache import CacheConfigError
from tidepool.tqkv.attention import attend, write
from tidepool.tqkv.codec import HeadCodec
from tidepool.tqkv.formats import FORMATS, Format

BLOCK_TOKENS = 16
"""Blocks have a multiple of so many tokens. Any number would do; small blocks cost more bookkeeping."""


class TqkvBackend(AttentionBackend):
    """Base of the backends of all formats."""

    form: ClassVar[Format]
    impl: ClassVar[type[TqkvImpl]]
    forward_includes_kv_cache_update = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto"]

    @classmethod
    def get_name(cls) -> str:
        """The name in vLLM's registry: ``TQKV_K4V4``."""
        return cls.form.name.upper().replace("-", "_")

    @classmethod
    def get_impl_cls(cls) -> type[TqkvImpl]:
        """What computes a layer."""
        return cls.impl

    @staticmethod
    def get_builder_cls() -> type[TqkvMetadataBuilder]:
        """What prepares a step."""
        return TqkvMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Multiples of `BLOCK_TOKENS`."""
        return [MultipleOf(BLOCK_TOKENS)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Any strides are read; these keep a page in one piece."""
        return (KVCacheLayout.LBHNC, KVCacheLayout.LBNHC)

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """Untested."""
        return False

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """A page of plain bytes, `Format.head_bytes` for each KV head and token."""
        if spec.head_size_v != spec.head_size:
            raise CacheConfigError(
                f"{cls.form.name} keeps keys and values of one size, not of {spec.head_size} and {spec.head_size_v} "
                "numbers: leave the setting kv out for this model."
            )
        size = cls.form.head_bytes(spec.head_size, spec.head_size_v)
        return replace(spec, dtype=torch.uint8, state_content_bytes=size)


@dataclass
class TqkvMetadata(AttentionMetadata):
    """A step's requests, in order."""

    starts: list[int]
    """Where each request's tokens start in the step, and where the last one's end."""
    lengths: list[int]
    """Tokens of each request so far, those of this step included."""
    block_table: torch.Tensor
    """``[requests, blocks]``."""


class TqkvMetadataBuilder(AttentionMetadataBuilder[TqkvMetadata]):
    """Takes from vLLM's common description of a step what `TqkvImpl` reads."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # vLLM's own is abstract
        super().__init__(*args, **kwargs)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> TqkvMetadata:
        """The requests of one step."""
        if common_attn_metadata.causal is not True:
            raise NotImplementedError("tqkv computes causal attention only.")
        return TqkvMetadata(
            starts=common_attn_metadata.query_start_loc_cpu.tolist(),
            lengths=common_attn_metadata.seq_lens.tolist(),
            block_table=common_attn_metadata.block_table_tensor,
        )


class TqkvImpl(AttentionImpl[TqkvMetadata]):
    """The attention of one layer; base of those of all formats."""

    form: ClassVar[Format]

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **others: Any,
    ) -> None:
        extras = {
            "ALiBi": alibi_slopes,
            "a soft cap of logits": logits_soft_cap,
            "layers that share a cache": kv_sharing_target_layer_name,
            "a sliding window": sliding_window,
        } | others
        for name, value in extras.items():
            if value:
                raise CacheConfigError(
                    f"{self.form.name} doesn't know {name}: leave the setting kv out for this model."
                )
        self.num_heads, self.head_size, self.scale = num_heads, head_size, scale
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.codec = HeadCodec(self.form, head_size)

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Keep a step's tokens."""
        write(kv_cache, slot_mapping, key, value, self.codec)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: TqkvMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Fill ``output``, ``[tokens, heads, size]``; shapes as in `tidepool.tqkv.attention`."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("tqkv writes plain outputs only.")
        if attn_metadata is None:  # vLLM is warming up
            return output.zero_()
        requests = zip(pairwise(attn_metadata.starts), attn_metadata.lengths, attn_metadata.block_table, strict=True)
        for (start, end), length, blocks in requests:
            output[start:end] = attend(query[start:end], kv_cache, blocks, length, self.scale, self.codec)
        return output


def _make_backend(form: Format) -> type[TqkvBackend]:
    """The classes of one format: ``TqkvK4V4``, ``TqkvImplK4V4``."""
    bits, shared = f"K{form.key_bits}V{form.value_bits}", {"form": form, "__module__": __name__}
    impl = type(f"TqkvImpl{bits}", (TqkvImpl,), shared)
    return type(f"Tqkv{bits}", (TqkvBackend,), shared | {"impl": impl})


BACKENDS = {form: _make_backend(form) for form in FORMATS.values()}
# vLLM's registry knows a backend by the name of its class in its module.
globals().update({backend.__name__: backend for backend in BACKENDS.values()})


def choose(form: Format, config: AttentionSelectorConfig) -> type[TqkvBackend]:
    """The backend of a format, known to vLLM's registry from now on.

    Args:
        form: the format.
        config: what vLLM selects the backend of a layer by.

    Raises:
        CacheConfigError: this layer's attention isn't served.
    """
    backend = BACKENDS[form]
    if reasons := backend.validate_configuration(device_capability=None, **config._asdict()):
        raise CacheConfigError(
            f"{form.name} can't keep this model's attention ({', '.join(reasons)}): leave the setting kv out."
        )
    if backend.get_name() not in AttentionBackendEnum.__members__:
        register_backend(backend.get_name(), f"{backend.__module__}.{backend.__qualname__}")
    return backend

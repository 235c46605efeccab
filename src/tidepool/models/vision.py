"""A vision tower: its weights, and what it takes to read one image of the largest size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tidepool.models.config import ModelConfigError
from tidepool.models.weights import Linear

IMAGE_TOKENS = 16_384
"""Tokens of the largest image that vLLM reads to measure memory, for models that take images of any size."""


@dataclass(frozen=True)
class Vision:
    """A transformer over patches, and what leads from there to the language model."""

    depth: int
    hidden: int
    inner: int
    patch_numbers: int
    """Numbers of a patch: channels x frames x height x width."""
    positions: int
    merged: int
    """Patches that become one token."""
    merger: tuple[Linear, ...]
    patches: int
    """Of the largest image that vLLM reads to measure memory."""

    @property
    def linears(self) -> tuple[Linear, ...]:
        """All matrices."""
        blocks = (
            Linear("visual.blocks.0.attn.qkv", self.hidden, 3 * self.hidden, self.depth),
            Linear("visual.blocks.0.attn.proj", self.hidden, self.hidden, self.depth),
            Linear("visual.blocks.0.mlp.linear_fc1", self.hidden, self.inner, self.depth),
            Linear("visual.blocks.0.mlp.linear_fc2", self.inner, self.hidden, self.depth),
        )
        return (*blocks, *self.merger)

    @property
    def other(self) -> int:
        """Embeddings of patches and positions, biases and norms."""
        biases = self.depth * (9 * self.hidden + self.inner)
        return self.hidden * (self.patch_numbers + 1 + self.positions) + biases

    @property
    def image_tokens(self) -> int:
        """Of an image of the largest size, as the language model sees it."""
        return self.patches // self.merged

    def activation_bytes(self, model_bytes: int) -> int:
        """What one image of the largest size takes: its patches, and in one block the token, its norm and both sides of
        the feed-forward part's activation."""
        return self.patches * (self.patch_numbers + 2 * self.hidden + 2 * self.inner) * model_bytes


def read_vision(table: Mapping[str, Any], hidden_size: int) -> Vision | None:
    """A tower from a ``vision_config``; none where there is no table.

    Args:
        table: the configuration, with the keys of Qwen, SigLIP or MoonViT.
        hidden_size: of the language model.

    Raises:
        ModelConfigError: its shapes aren't known here.
    """
    if not table:
        return None

    def number(*keys: str, default: int | None = None) -> int:
        value = next((table[key] for key in keys if table.get(key) is not None), default)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise ModelConfigError(
                f'The config of the vision tower has no usable "{keys[0]}", so its size isn\'t known: give the weights '
                "on one device with --weights, or leave the tower out with --language-model-only."
            )
        return value

    depth = number("depth", "num_hidden_layers", "vt_num_hidden_layers")
    hidden = number("hidden_size", "vt_hidden_size")
    inner = number("intermediate_size", "vt_intermediate_size")
    patch = number("patch_size")
    numbers = number("in_channels", "num_channels", default=3) * patch * patch
    numbers *= number("temporal_patch_size", default=1)
    if table.get("image_size") is not None:  # SigLIP and its like: images of one size
        side = number("image_size") // patch
        projector = (Linear("multi_modal_projector", hidden, hidden_size),)
        return Vision(depth, hidden, inner, numbers, side * side, 1, projector, side * side)
    kernel = table.get("merge_kernel_size")
    side = kernel[0] if isinstance(kernel, list) and kernel else number("spatial_merge_size", default=2)
    merged = side * side
    positions = number("num_position_embeddings", default=number("init_pos_emb_height", default=48) ** 2)
    merger = (
        Linear("visual.merger.linear_fc1", hidden * merged, hidden * merged),
        Linear("visual.merger.linear_fc2", hidden * merged, number("out_hidden_size", default=hidden_size)),
    )
    return Vision(depth, hidden, inner, numbers, positions, merged, merger, IMAGE_TOKENS * merged)

"""What the families share: attention, kinds of layers, and what surrounds the layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tidepool.models.config import Config, ModelConfigError
from tidepool.models.dtypes import FLOAT_BYTES
from tidepool.models.mixers import Attention, Numerics
from tidepool.models.model import Layer, Model
from tidepool.models.quantization import read_quantization


def model_of(config: Config, family: str, layers: list[Layer], state_dtype: str | None = None) -> Model:
    """Put layers and what surrounds them together."""
    dtype = config.text("dtype", "torch_dtype", default="bfloat16").removeprefix("torch.")
    if dtype not in FLOAT_BYTES:
        raise ModelConfigError(f'"dtype" of the config must be one of {", ".join(FLOAT_BYTES)}, not {dtype!r}.')
    return Model(
        family=family,
        model_type=config.model_type,
        layers=tuple(layers),
        hidden=config.positive("hidden_size"),
        vocabulary=config.positive("vocab_size"),
        tied=config.flag("tie_word_embeddings", "tie_embedding"),
        max_tokens=config.positive("max_position_embeddings", "model_max_length", default=1 << 20),
        numerics=Numerics(FLOAT_BYTES[dtype], state_dtype or dtype),
        quantization=read_quantization(_stored(config)),
        experts_per_token=config.count("num_experts_per_tok", "num_experts_per_token", "experts_per_token"),
        vision_config=dict(config.table("vision_config")),
    )


def _stored(config: Config) -> Mapping[str, Any]:
    """How a checkpoint says that it stores its weights; empty where it says nothing."""
    said = config.table("quantization_config") or config.table("compression_config")
    of_mlx = config.table("quantization")
    return said or ({"quant_method": "mlx", **of_mlx} if of_mlx else {})


def attention(
    config: Config, *, window: int | None = None, gated: bool = False, module: str = "self_attn"
) -> Attention:
    """Grouped-query attention by the usual keys."""
    hidden, heads = config.positive("hidden_size"), config.positive("num_attention_heads")
    return Attention(
        hidden=hidden,
        heads=heads,
        kv_heads=config.positive("num_key_value_heads", default=heads),
        head_size=config.positive("head_dim", "attention_head_dim", default=max(1, hidden // heads)),
        window=window,
        gated=gated,
        module=module,
    )


def layer_kinds(config: Config, names: dict[str, str], *keys: str) -> list[str]:
    """The list of layer kinds under one of ``keys``, translated by ``names``."""
    kinds = config.texts(*keys)
    for kind in kinds:
        if kind not in names:
            raise ModelConfigError(f'"{keys[0]}" of the config names an unknown kind of layer: {kind!r}.')
    return [names[kind] for kind in kinds]

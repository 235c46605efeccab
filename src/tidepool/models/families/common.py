"""What the families share: weights of feed-forward parts and embeddings, number types, quantization."""

from __future__ import annotations

from tidepool.models.config import Config, ModelConfigError
from tidepool.models.dtypes import FLOAT_BYTES
from tidepool.models.mixers import Attention, Numerics
from tidepool.models.model import Layer, Model

MXFP4_BITS = 4.25
"""A 4-bit code, and an 8-bit scale for every 32."""


def model_of(config: Config, family: str, layers: list[Layer], state_dtype: str | None = None) -> Model:
    """Put layers and what surrounds them together."""
    dtype = config.text("dtype", "torch_dtype", default="bfloat16").removeprefix("torch.")
    if dtype not in FLOAT_BYTES:
        raise ModelConfigError(f'"dtype" of the config must be one of {", ".join(FLOAT_BYTES)}, not {dtype!r}.')
    tied = config.flag("tie_word_embeddings", "tie_embedding")
    weight_bytes, expert_bytes = _weight_bytes(config, FLOAT_BYTES[dtype])
    return Model(
        family=family,
        layers=tuple(layers),
        embedding=(1 if tied else 2) * config.positive("vocab_size") * config.positive("hidden_size"),
        max_tokens=config.positive("max_position_embeddings", "model_max_length", default=1 << 20),
        numerics=Numerics(FLOAT_BYTES[dtype], state_dtype or dtype),
        weight_bytes_each=weight_bytes,
        expert_bytes_each=expert_bytes,
    )


def attention(config: Config, *, window: int | None = None, gated: bool = False) -> Attention:
    """Grouped-query attention by the usual keys."""
    hidden, heads = config.positive("hidden_size"), config.positive("num_attention_heads")
    return Attention(
        hidden=hidden,
        heads=heads,
        kv_heads=config.positive("num_key_value_heads", default=heads),
        head_size=config.positive("head_dim", "attention_head_dim", default=max(1, hidden // heads)),
        window=window,
        gated=gated,
    )


def layer_kinds(config: Config, names: dict[str, str], *keys: str) -> list[str]:
    """The list of layer kinds under one of ``keys``, translated by ``names``."""
    kinds = config.texts(*keys)
    for kind in kinds:
        if kind not in names:
            raise ModelConfigError(f'"{keys[0]}" of the config names an unknown kind of layer: {kind!r}.')
    return [names[kind] for kind in kinds]


def dense(hidden: int, inner: int, *, gated: bool = True) -> int:
    """Parameters of a feed-forward part: up and down, and a gate."""
    return (3 if gated else 2) * hidden * inner


def mixture(hidden: int, inner: int, experts: int, shared: int, *, gated: bool = True) -> tuple[int, int]:
    """Parameters of experts, router and a shared expert ``shared`` wide; and of the routed experts alone."""
    routed = experts * dense(hidden, inner, gated=gated)
    return routed + experts * hidden + dense(hidden, shared, gated=gated), routed


def _weight_bytes(config: Config, model_bytes: int) -> tuple[float, float]:
    """Bytes of one parameter, and of one of a routed expert."""
    quantization = config.table("quantization_config")
    method = quantization.get("quant_method")
    if method is None:
        return model_bytes, model_bytes
    if method == "mxfp4":
        return model_bytes, MXFP4_BITS / 8
    if method == "fp8":
        return 1, 1
    bits = quantization.get("bits")
    if isinstance(bits, int) and bits > 0:
        return bits / 8, bits / 8
    return model_bytes, model_bytes

"""Families of attention alone, for contrast: Llama and its like, Mixtral, Gemma 3, gpt-oss."""

from __future__ import annotations

from tidepool.models.config import Config
from tidepool.models.families.common import attention, layer_kinds, model_of
from tidepool.models.model import Layer, Model
from tidepool.models.weights import Linear, dense, mixture

_KINDS = {"full_attention": "full", "sliding_attention": "window"}


def llama(config: Config) -> Model:
    """Llama, Mistral, Qwen2 and Qwen3: the same attention and feed-forward part in every layer."""
    width = dense("mlp", config.positive("hidden_size"), config.positive("intermediate_size"))
    layer = Layer({"attention": attention(config)}, width)
    return model_of(config, "attention", [layer] * config.positive("num_hidden_layers"))


def mixtral(config: Config) -> Model:
    """Mixtral: attention and experts."""
    layer = Layer({"attention": attention(config)}, _experts(config, "block_sparse_moe"))
    return model_of(config, "attention", [layer] * config.positive("num_hidden_layers"))


def gemma3(config: Config) -> Model:
    """Gemma 3: sliding windows, with full attention in every sixth layer."""
    width = dense("mlp", config.positive("hidden_size"), config.positive("intermediate_size"))
    layers = _windowed(config, width, config.positive("sliding_window_pattern", default=6))
    return model_of(config, "sliding window and full attention", layers)


def gpt_oss(config: Config) -> Model:
    """gpt-oss: sliding windows and full attention by turns, and experts."""
    layers = _windowed(config, _experts(config, "mlp"), interval=2)
    return model_of(config, "sliding window and full attention", layers)


def _experts(config: Config, module: str) -> tuple[Linear, ...]:
    return mixture(
        module,
        config.positive("hidden_size"),
        config.positive("intermediate_size"),
        config.positive("num_local_experts"),
    )


def _windowed(config: Config, feed_forward: tuple[Linear, ...], interval: int) -> list[Layer]:
    count = config.positive("num_hidden_layers")
    if config.has("layer_types"):
        kinds = layer_kinds(config, _KINDS, "layer_types")
    else:
        kinds = ["window" if (index + 1) % interval else "full" for index in range(count)]
    full, window = attention(config), attention(config, window=config.positive("sliding_window"))
    return [Layer({"window": window} if kind == "window" else {"attention": full}, feed_forward) for kind in kinds]

"""The attention-only model that a hybrid one is held against.

It keeps as many bytes of attention per token as the hybrid model and no states, so on the same budget its prefix cache
holds what a hybrid model's could if states cost nothing and every token had one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tidepool.models import ModelConfigError, model_from_config
from tidepool.models.mixers import Attention


def attention_only(config: Mapping[str, Any]) -> dict[str, Any]:
    """A Llama-shaped configuration with the full attention layers of ``config`` and nothing else.

    Raises:
        ModelConfigError: the layers of ``config`` with full attention differ, or there are none.
    """
    mixers = [mixer for layer in model_from_config(config).layers for mixer in layer.mixers.values()]
    layers = [mixer for mixer in mixers if isinstance(mixer, Attention) and mixer.window is None]
    if not layers or len(set(layers)) > 1:
        raise ModelConfigError(
            "The bound needs a model with layers of full attention, all of one shape: leave it out of --modes."
        )
    layer = layers[0]
    return {
        "model_type": "llama",
        "vocab_size": config["vocab_size"],
        "hidden_size": layer.heads * layer.head_size,
        "head_dim": layer.head_size,
        "intermediate_size": layer.heads * layer.head_size,
        "num_hidden_layers": len(layers),
        "num_attention_heads": layer.heads,
        "num_key_value_heads": layer.kv_heads,
        "max_position_embeddings": config.get("max_position_embeddings", 1 << 18),
    }

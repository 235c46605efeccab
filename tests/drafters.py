"""Checkpoints of small drafters beside a tiny model: one layer of attention, whose heads are smaller than the model's.

So its keys and values take another page, and its layer is a group of its own. It reads the model's embedding, which by
itself says what follows (`tidepool.testing.tiny`), and its own attention adds some noise: most drafts are accepted.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

HEADS, KV_HEADS, HEAD_SIZE = 4, 1, 32
NOISE = 2.0
"""How loud the layer is: not all drafts are right."""


def make_drafter(kind: Literal["eagle", "draft_model"], model: Path, path: Path) -> Path:
    """Write a drafter for a model of `tidepool.testing.tiny`: EAGLE's, or a small Llama of its own.

    Args:
        kind: as vLLM calls the method.
        model: the checkpoint that it drafts for.
        path: directory to write.
    """
    import torch
    from safetensors.torch import load_file, save_file

    target = load_file(model / "model.safetensors")
    embedding = next(weights for name, weights in target.items() if "embed" in name)
    vocabulary, hidden = embedding.shape
    generator = torch.Generator().manual_seed(9)

    def some(outputs: int, inputs: int) -> torch.Tensor:
        return (torch.randn(outputs, inputs, generator=generator) * NOISE / inputs**0.5).bfloat16()

    ones = torch.ones(hidden).bfloat16()
    layer = {
        "self_attn.q_proj": some(HEADS * HEAD_SIZE, hidden),
        "self_attn.k_proj": some(KV_HEADS * HEAD_SIZE, hidden),
        "self_attn.v_proj": some(KV_HEADS * HEAD_SIZE, hidden),
        "self_attn.o_proj": some(hidden, HEADS * HEAD_SIZE),
        "mlp.gate_proj": some(hidden, hidden),
        "mlp.up_proj": some(hidden, hidden),
        "mlp.down_proj": some(hidden, hidden),
        "input_layernorm": ones,
        "post_attention_layernorm": ones.clone(),
    }
    weights = {f"layers.0.{name}.weight": tensor for name, tensor in layer.items()}
    if kind == "eagle":
        del weights["layers.0.input_layernorm.weight"]
        weights["fc.weight"] = torch.cat([torch.eye(hidden), torch.zeros(hidden, hidden)], dim=1).bfloat16()
    else:
        weights = {f"model.{name}": tensor for name, tensor in weights.items()}
        weights |= {"model.embed_tokens.weight": embedding, "model.norm.weight": ones.clone()}
        weights["lm_head.weight"] = target["lm_head.weight"]
    path.mkdir(parents=True)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": hidden,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_SIZE,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 0,
    }
    (path / "config.json").write_text(json.dumps(config))
    return path

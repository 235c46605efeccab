"""Tiny checkpoints of hybrid models with random weights, for tests and trials on a CPU.

They are small copies in shape of real models: one state is as large as several hundred tokens of attention
cache, and the layer counts do not divide evenly. Torch, tokenizers and safetensors, which come with vLLM, are
needed here and in `tidepool.testing.tiny_library`, which also takes transformers.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from tidepool.testing.tiny_library import library_weights

Family = Literal[
    "qwen3.5",
    "nemotron-h",
    "qwen3.5-vl",
    "qwen3.5-moe",
    "qwen3-next",
    "falcon-h1",
    "granite-4-h",
    "granite-4-h-moe",
    "zamba2",
    "lfm2",
    "lfm2-moe",
]

VOCAB_SIZE = 512
MAX_POSITIONS = 8192
"""Longest sequence, in tokens."""

_HIDDEN = 128
_CONV_WIDTH = 4
_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_VISION_ROLES = ("vision_start", "vision_end", "image", "video")
_VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_END = 0
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_LOGIT_SCALE = 4.0
"""Standard deviation of the logits."""
_QWEN_LOUDNESS = 1.65
"""Standard deviation of the embeddings; see `_embeddings`."""

# Enough English for a few hundred merges; nothing is learnt from it but the tokenizer.
_TEXT = """
The tide comes in and the tide goes out, and between the two lines that it leaves on the shore there are
pools.
Each pool keeps what the last high water brought to it: a few small fish, a crab under its stone, some
weed that
waves when a cloud of sand goes by. Some of the pools are deep and hold the same water for days. Others
are only
the width of a hand and are filled, emptied and filled again before anyone has looked at them twice.
A child with a bucket asks how much water there is on the beach. It depends, says her mother, on where
you stand
and on when you ask. The sea does not own the pools and the pools do not own the sea; the water moves to
where
there is room for it, and no wall has ever been built that could make it do otherwise.
In the morning we walked along the harbour to the place where the boats are repaired. There was one with
its name
painted over, another without a mast, and a third that had been bought, sold and bought again, they said,
by the
same two brothers. What do you do with a boat that is too large for one person and too small for three?
You wait.
How many people live in the village? About four hundred in winter, two thousand in summer, 1,250 on a
good day.
Question: which of these numbers is the largest? Answer: the second one. Question: what is 12 + 30?
Answer: 42.
Write a short story about a lighthouse. Explain why the sky is blue. List three things that you can see
at night.
"""


def make_checkpoint(family: Family, path: Path, *, seed: int = 0, mtp: bool = False) -> Path:
    """Write a checkpoint of random weights that vLLM and transformers load from disk.

    The same seed gives the same files, byte for byte. The weights never emit the end-of-text token, nor any
    byte outside ASCII.

    Args:
        family: whose architecture to copy; ``qwen3.5`` has 6 Gated DeltaNet and 2 attention layers,
            ``nemotron-h`` has 7 Mamba2, 2 attention and 6 MLP layers. The others are smaller, and made by transformers
            (`tidepool.testing.tiny_library`); ``qwen3.5-vl`` sees images.
        path: directory to write, made if it is not there.
        seed: of the random weights.
        mtp: whether ``qwen3.5`` gets a head that drafts a token, mostly the right one. The rest is as without.

    Returns:
        ``path``.
    """
    config, make_weights = _FAMILIES[family]
    if mtp:
        if family != "qwen3.5":
            raise ValueError(f"Only qwen3.5 has a head that drafts tokens here, not {family}.")
        config = config | {"mtp_num_hidden_layers": 1}
    path.mkdir(parents=True, exist_ok=True)
    sees = "vision_config" in config
    tokenizer = _make_tokenizer(_SPECIAL_TOKENS + _VISION_TOKENS if sees else _SPECIAL_TOKENS)
    tokenizer.save(str(path / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": _SPECIAL_TOKENS[_END],
        "pad_token": _SPECIAL_TOKENS[_END],
        "model_max_length": MAX_POSITIONS,
        "clean_up_tokenization_spaces": False,
        "chat_template": _CHAT_TEMPLATE,
    }
    if sees:
        names = ("vision_bos_token", "vision_eos_token", "image_token", "video_token")
        tokenizer_config["extra_special_tokens"] = dict(zip(names, _VISION_TOKENS, strict=True))
        _write_json(path / "preprocessor_config.json", _IMAGE_CONFIG)
        _write_json(path / "video_preprocessor_config.json", _VIDEO_CONFIG)
    _write_json(path / "tokenizer_config.json", tokenizer_config)
    _write_json(path / "config.json", config)
    _write_json(path / "generation_config.json", {"eos_token_id": _END, "pad_token_id": _END})

    silent = _silent_tokens(tokenizer)
    weights = make_weights(Init(seed, [token for token in range(VOCAB_SIZE) if token not in silent]), config)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


# Tokenizer --------------------------------------------------------------------------------------------------


def _make_tokenizer(special_tokens: Sequence[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True) for token in special_tokens],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    return tokenizer


def _silent_tokens(tokenizer: Tokenizer) -> list[int]:
    """Ids that the model must not emit, so that its text can be read: all but printable ASCII."""
    silent = []
    for token in range(VOCAB_SIZE):
        text = tokenizer.decode([token])  # special tokens decode to nothing
        if not text or not all(char.isascii() and (char.isprintable() or char == "\n") for char in text):
            silent.append(token)
    return silent


# Weights ----------------------------------------------------------------------------------------------------


class Init:
    """Draws weights, in a fixed order, from one seeded generator."""

    def __init__(self, seed: int, spoken: list[int]) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self.spoken = spoken
        """Tokens that the model may emit."""

    def vocabulary(self, loudness: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings with this standard deviation, and the head that follows each token by its successor in a cycle."""
        tokens = self.normal(VOCAB_SIZE, _HIDDEN, std=loudness)
        before, after = self.cycle()
        head = torch.zeros_like(tokens)
        head[after] = tokens[before] * (_LOGIT_SCALE / loudness / math.sqrt(_HIDDEN))
        return tokens, head

    def cycle(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The spoken tokens in random order, and after each its successor in a cycle."""
        order = torch.tensor(self.spoken)[torch.randperm(len(self.spoken), generator=self._generator)]
        return order, order.roll(-1)

    def normal(self, *shape: int, std: float) -> torch.Tensor:
        """Normally distributed numbers."""
        return (torch.randn(*shape, generator=self._generator) * std).bfloat16()

    def uniform(self, *shape: int, low: float, high: float) -> torch.Tensor:
        """Evenly distributed numbers."""
        return torch.rand(*shape, generator=self._generator) * (high - low) + low

    def linear(self, outputs: int, inputs: int, *, gain: float = 1.0) -> torch.Tensor:
        """A weight that keeps the variance of its input, times ``gain`` squared."""
        return self.normal(outputs, inputs, std=gain / math.sqrt(inputs))

    def decay(self, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``A_log`` and ``dt_bias`` for states that forget within some 10 to 1,000 tokens, head by head."""
        rate = torch.exp(self.uniform(heads, low=math.log(1e-3), high=math.log(1e-1)))
        a = self.uniform(heads, low=1.0, high=4.0)
        step = rate / a
        inverse_softplus = step + torch.log(-torch.expm1(-step))
        return torch.log(a), inverse_softplus.bfloat16()


def _qwen_weights(init: Init, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    head_dim = config["head_dim"]
    q_dim = config["num_attention_heads"] * head_dim
    kv_dim = config["num_key_value_heads"] * head_dim
    v_heads = config["linear_num_value_heads"]
    key_dim = config["linear_num_key_heads"] * config["linear_key_head_dim"]
    value_dim = v_heads * config["linear_value_head_dim"]
    mlp = config["intermediate_size"]
    ones, zeros = torch.ones, torch.zeros  # most norms of this family multiply by one plus their weight

    weights = _embeddings(init, _QWEN_LOUDNESS, "model.embed_tokens.weight", "model.norm.weight", zeros)
    layers = [(f"model.layers.{index}.", kind) for index, kind in enumerate(config["layer_types"])]
    for index in range(config.get("mtp_num_hidden_layers", 0)):
        layers.append((f"mtp.layers.{index}.", "full_attention"))
        # The head looks at the last token alone, like the model without its layers, and then at its own attention.
        passed_on = torch.cat([torch.eye(_HIDDEN) * _QWEN_LOUDNESS, zeros(_HIDDEN, _HIDDEN)], dim=1)
        weights["mtp.fc.weight"] = passed_on.bfloat16()
        for norm in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
            weights[f"mtp.{norm}.weight"] = zeros(_HIDDEN).bfloat16()
    for layer, kind in layers:
        weights[layer + "input_layernorm.weight"] = zeros(_HIDDEN).bfloat16()
        weights[layer + "post_attention_layernorm.weight"] = zeros(_HIDDEN).bfloat16()
        if kind == "linear_attention":
            mixer = layer + "linear_attn."
            weights[mixer + "in_proj_qkv.weight"] = init.linear(2 * key_dim + value_dim, _HIDDEN)
            weights[mixer + "in_proj_z.weight"] = init.linear(value_dim, _HIDDEN)
            weights[mixer + "in_proj_b.weight"] = init.linear(v_heads, _HIDDEN)
            weights[mixer + "in_proj_a.weight"] = init.linear(v_heads, _HIDDEN, gain=0.5)
            weights[mixer + "conv1d.weight"] = init.normal(2 * key_dim + value_dim, 1, _CONV_WIDTH, std=0.5)
            weights[mixer + "A_log"], weights[mixer + "dt_bias"] = init.decay(v_heads)
            weights[mixer + "norm.weight"] = ones(config["linear_value_head_dim"]).bfloat16()
            weights[mixer + "out_proj.weight"] = init.linear(_HIDDEN, value_dim, gain=2.0)
        else:
            mixer = layer + "self_attn."
            weights[mixer + "q_proj.weight"] = init.linear(2 * q_dim, _HIDDEN)  # queries and output gates
            weights[mixer + "k_proj.weight"] = init.linear(kv_dim, _HIDDEN)
            weights[mixer + "v_proj.weight"] = init.linear(kv_dim, _HIDDEN)
            weights[mixer + "q_norm.weight"] = ones(head_dim).bfloat16()
            weights[mixer + "k_norm.weight"] = zeros(head_dim).bfloat16()
            weights[mixer + "o_proj.weight"] = init.linear(_HIDDEN, q_dim, gain=4.0)
        weights[layer + "mlp.gate_proj.weight"] = init.linear(mlp, _HIDDEN)
        weights[layer + "mlp.up_proj.weight"] = init.linear(mlp, _HIDDEN)
        weights[layer + "mlp.down_proj.weight"] = init.linear(_HIDDEN, mlp)
    return weights


def _nemotron_weights(init: Init, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    head_dim = config["head_dim"]
    q_dim = config["num_attention_heads"] * head_dim
    kv_dim = config["num_key_value_heads"] * head_dim
    heads = config["mamba_num_heads"]
    inner = heads * config["mamba_head_dim"]
    conv = inner + 2 * config["n_groups"] * config["ssm_state_size"]
    mlp = config["intermediate_size"]
    ones = torch.ones

    weights = _embeddings(init, 1.9, "backbone.embeddings.weight", "backbone.norm_f.weight", ones)
    for index, kind in enumerate(config["hybrid_override_pattern"]):
        layer = f"backbone.layers.{index}."
        mixer = layer + "mixer."
        weights[layer + "norm.weight"] = ones(_HIDDEN).bfloat16()
        if kind == "M":
            weights[mixer + "in_proj.weight"] = init.linear(inner + conv + heads, _HIDDEN)
            weights[mixer + "conv1d.weight"] = init.normal(conv, 1, _CONV_WIDTH, std=0.5)
            weights[mixer + "conv1d.bias"] = init.normal(conv, std=0.1)
            weights[mixer + "A_log"], weights[mixer + "dt_bias"] = init.decay(heads)
            weights[mixer + "D"] = ones(heads).bfloat16()
            weights[mixer + "norm.weight"] = ones(inner).bfloat16()
            weights[mixer + "out_proj.weight"] = init.linear(_HIDDEN, inner)
        elif kind == "*":
            weights[mixer + "q_proj.weight"] = init.linear(q_dim, _HIDDEN, gain=2.0)
            weights[mixer + "k_proj.weight"] = init.linear(kv_dim, _HIDDEN)
            weights[mixer + "v_proj.weight"] = init.linear(kv_dim, _HIDDEN)
            weights[mixer + "o_proj.weight"] = init.linear(_HIDDEN, q_dim, gain=2.0)
        else:
            weights[mixer + "up_proj.weight"] = init.linear(mlp, _HIDDEN)
            weights[mixer + "down_proj.weight"] = init.linear(_HIDDEN, mlp)
    return weights


def _embeddings(
    init: Init, loudness: float, embedding: str, final_norm: str, norm: Callable[[int], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What surrounds the layers: by itself, every token is followed by its successor in one long cycle.

    What the layers remember has to outvote that, and does so every few tokens. So outputs depend on every byte
    of the caches, and yet the best token mostly leads by far: rounding differences, which a batch of another
    shape brings, seldom change the output.

    ``loudness`` is the standard deviation of embeddings; what the layers add to them is the same whatever it is.
    """
    tokens, head = init.vocabulary(loudness)
    return {embedding: tokens, final_norm: norm(_HIDDEN).bfloat16(), "lm_head.weight": head}


# Configurations ---------------------------------------------------------------------------------------------


_COMMON_CONFIG: dict[str, Any] = {
    "dtype": "bfloat16",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": _HIDDEN,
    "max_position_embeddings": MAX_POSITIONS,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": _END,
    "pad_token_id": _END,
    # 512 bytes per token and attention layer.
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}

_QWEN_CONFIG: dict[str, Any] = _COMMON_CONFIG | {
    "architectures": ["Qwen3_5ForCausalLM"],
    "model_type": "qwen3_5_text",
    "num_hidden_layers": 8,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2,
    "full_attention_interval": 4,
    "intermediate_size": 256,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "attn_output_gate": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
    # A state of 268,288 bytes: 256 KiB in float32 and the convolution's 3 x 1,024 in bfloat16.
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": _CONV_WIDTH,
    "mamba_ssm_dtype": "float32",
}

_NEMOTRON_CONFIG: dict[str, Any] = _COMMON_CONFIG | {
    "architectures": ["NemotronHForCausalLM"],
    "model_type": "nemotron_h",
    "hybrid_override_pattern": "M-M*-MM-M*-M-M-",
    "num_hidden_layers": 15,
    "intermediate_size": 384,
    "mlp_hidden_act": "relu2",
    "layer_norm_epsilon": 1e-5,
    # A state of 334,592 bytes: 320 KiB in float32 and the convolution's 3 x 1,152 in bfloat16.
    "mamba_num_heads": 8,
    "mamba_head_dim": 80,
    "ssm_state_size": 128,
    "n_groups": 2,
    "expand": 5,
    "conv_kernel": _CONV_WIDTH,
    "use_conv_bias": True,
    "chunk_size": 128,
    "mamba_hidden_act": "silu",
    "mamba_ssm_cache_dtype": "float32",
}

_DELTA_LAYERS: dict[str, Any] = {
    key: value for key, value in _QWEN_CONFIG.items() if key.startswith("linear_") or key == "mamba_ssm_dtype"
}
_DELTA_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
}
_VISION_CONFIG: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
    "out_hidden_size": _HIDDEN,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [],
}
_IMAGE_CONFIG: dict[str, Any] = {
    "image_processor_type": "Qwen2VLImageProcessorFast",
    "processor_class": "Qwen3VLProcessor",
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    # Sides of 64 to 256 pixels: an image is 4 to 64 tokens.
    "size": {"shortest_edge": 64 * 64, "longest_edge": 256 * 256},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
_VIDEO_CONFIG = {key: value for key, value in _IMAGE_CONFIG.items() if key != "image_processor_type"} | {
    "video_processor_type": "Qwen3VLVideoProcessor"
}
_MAMBA_LAYERS: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 64,
    "mamba_n_groups": 1,
    "mamba_d_state": 128,
    "mamba_d_conv": _CONV_WIDTH,
    "mamba_expand": 4,
    "mamba_chunk_size": 128,
}
_GRANITE_CONFIG: dict[str, Any] = (
    _COMMON_CONFIG
    | _MAMBA_LAYERS
    | {
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "model_type": "granitemoehybrid",
        "num_hidden_layers": 8,
        "layer_types": (["mamba"] * 3 + ["attention"]) * 2,
        "intermediate_size": 64,
        "shared_intermediate_size": 256,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "position_embedding_type": "nope",
        "attention_multiplier": 0.125,
    }
)

_LFM2_CONFIG: dict[str, Any] = _COMMON_CONFIG | {
    "architectures": ["Lfm2ForCausalLM"],
    "model_type": "lfm2",
    "head_dim": _HIDDEN // _COMMON_CONFIG["num_attention_heads"],
    "block_dim": _HIDDEN,
    "conv_dim": _HIDDEN,
    "tie_word_embeddings": True,
    "num_hidden_layers": 8,
    "layer_types": ["conv", "conv", "full_attention", "conv"] * 2,
    "intermediate_size": 256,
    "block_auto_adjust_ff_dim": False,
    "conv_L_cache": 3,
}

_LIBRARY_CONFIGS: dict[Family, dict[str, Any]] = {
    "qwen3.5-vl": {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "dtype": "bfloat16",
        "tie_word_embeddings": False,
        "text_config": _QWEN_CONFIG
        | {
            "rope_parameters": _QWEN_CONFIG["rope_parameters"] | {"mrope_interleaved": True, "mrope_section": [3, 3, 2]}
        },
        "vision_config": _VISION_CONFIG,
    }
    | {f"{role}_token_id": len(_SPECIAL_TOKENS) + index for index, role in enumerate(_VISION_ROLES)},
    "qwen3.5-moe": _COMMON_CONFIG
    | _DELTA_LAYERS
    | _DELTA_EXPERTS
    | {
        "architectures": ["Qwen3_5MoeForCausalLM"],
        "model_type": "qwen3_5_moe_text",
        "num_hidden_layers": 8,
        "rope_parameters": _QWEN_CONFIG["rope_parameters"],
    },
    "qwen3-next": _COMMON_CONFIG
    | _DELTA_LAYERS
    | _DELTA_EXPERTS
    | {
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        "num_hidden_layers": 8,
        "intermediate_size": 256,
        "rope_parameters": _QWEN_CONFIG["rope_parameters"],
    },
    "falcon-h1": _COMMON_CONFIG
    | _MAMBA_LAYERS
    | {
        "architectures": ["FalconH1ForCausalLM"],
        "model_type": "falcon_h1",
        "num_hidden_layers": 4,
        "intermediate_size": 256,
        "mamba_d_ssm": 512,
    },
    "granite-4-h": _GRANITE_CONFIG,
    "granite-4-h-moe": _GRANITE_CONFIG | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "zamba2": _COMMON_CONFIG
    | {
        "architectures": ["Zamba2ForCausalLM"],
        "model_type": "zamba2",
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "num_hidden_layers": 9,
        "layers_block_type": ["mamba", "mamba", "hybrid"] * 3,
        "mamba_d_state": 64,
        "mamba_d_conv": _CONV_WIDTH,
        "mamba_expand": 4,
        "mamba_ngroups": 1,
        "n_mamba_heads": 8,
        "num_mem_blocks": 2,
        "adapter_rank": 16,
        "use_mem_rope": True,
        "intermediate_size": 256,
        "chunk_size": 128,
    },
    "lfm2": _LFM2_CONFIG,
    "lfm2-moe": _LFM2_CONFIG
    | {
        "architectures": ["Lfm2MoeForCausalLM"],
        "model_type": "lfm2_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "num_dense_layers": 2,
    },
}

_FAMILIES: dict[Family, tuple[dict[str, Any], Callable[[Init, dict[str, Any]], dict[str, torch.Tensor]]]] = {
    "qwen3.5": (_QWEN_CONFIG, _qwen_weights),
    "nemotron-h": (_NEMOTRON_CONFIG, _nemotron_weights),
} | {family: (config, library_weights) for family, config in _LIBRARY_CONFIGS.items()}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

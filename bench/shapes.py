"""Small hybrid models by their configurations alone, for engines without a model: nothing has weights here.

Like `tidepool.testing.tiny`'s, their states are as large as some hundred tokens of attention, and layers don't divide
evenly.
"""

from __future__ import annotations

from typing import Any

_COMMON: dict[str, Any] = {
    "dtype": "bfloat16",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "max_position_embeddings": 65_536,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-6,
}
_LINEAR: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 4,
    "num_hidden_layers": 8,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2,
}
_NEMOTRON: dict[str, Any] = _COMMON | {
    "architectures": ["NemotronHForCausalLM"],
    "model_type": "nemotron_h",
    "hybrid_override_pattern": "M-M*-MM-M*-M-M-",
    "num_hidden_layers": 15,
    "mlp_hidden_act": "relu2",
    "layer_norm_epsilon": 1e-5,
    "mamba_num_heads": 8,
    "mamba_head_dim": 80,
    "ssm_state_size": 128,
    "n_groups": 2,
    "expand": 5,
    "conv_kernel": 4,
    "use_conv_bias": True,
    "chunk_size": 128,
    "mamba_hidden_act": "silu",
    "mamba_ssm_cache_dtype": "float32",
}

SHAPES: dict[str, dict[str, Any]] = {
    "tiny Qwen3.5": _COMMON
    | _LINEAR
    | {
        "architectures": ["Qwen3_5ForCausalLM"],
        "model_type": "qwen3_5_text",
        "mtp_num_hidden_layers": 1,
        "attn_output_gate": True,
        "mamba_ssm_dtype": "float32",
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
    },
    "tiny Qwen3-Next": _COMMON
    | _LINEAR
    | {
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
        "decoder_sparse_step": 1,
    },
    "tiny Nemotron-H": _NEMOTRON,
    "tiny Nemotron-H, windows": _NEMOTRON | {"sliding_window": 256},
    "tiny Granite 4 H": _COMMON
    | {
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "model_type": "granitemoehybrid",
        "num_hidden_layers": 9,
        "layer_types": ["mamba"] * 4 + ["attention"] + ["mamba"] * 3 + ["attention"],
        "shared_intermediate_size": 256,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "mamba_n_heads": 8,
        "mamba_d_head": 32,
        "mamba_d_state": 128,
        "mamba_n_groups": 1,
        "mamba_expand": 2,
        "mamba_d_conv": 4,
        "mamba_chunk_size": 128,
    },
    "tiny Falcon-H1": _COMMON
    | {
        "architectures": ["FalconH1ForCausalLM"],
        "model_type": "falcon_h1",
        "num_hidden_layers": 4,
        "mamba_n_heads": 8,
        "mamba_d_head": 48,
        "mamba_d_ssm": 384,
        "mamba_d_state": 128,
        "mamba_n_groups": 1,
        "mamba_expand": 2,
        "mamba_d_conv": 4,
        "mamba_chunk_size": 128,
    },
    "tiny Zamba2": _COMMON
    | {
        "architectures": ["Zamba2ForCausalLM"],
        "model_type": "zamba2",
        "num_hidden_layers": 9,
        "layers_block_type": ["mamba", "mamba", "hybrid"] * 3,
        "hybrid_layer_ids": [2, 5, 8],
        "num_key_value_heads": 4,
        "num_mem_blocks": 1,
        "n_mamba_heads": 8,
        "mamba_headdim": 32,
        "mamba_d_state": 64,
        "mamba_ngroups": 1,
        "mamba_expand": 2,
        "mamba_d_conv": 4,
        "adapter_rank": 8,
        "use_shared_attention_adapter": False,
        "use_mem_rope": True,
        "chunk_size": 128,
    },
}
"""HF-style configurations by name."""

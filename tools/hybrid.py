"""The Qwen3.5 text model for training: no caches, the parameter names and the function of transformers' class."""

# torch has no types here, see pyproject.toml.
# mypy: disallow-subclassing-any=False, disallow-untyped-decorators=False

import math
from typing import Any

import torch
from delta_rule import gated_delta_rule
from torch import nn
from torch.nn import functional

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3_5ForCausalLM"],
    "model_type": "qwen3_5_text",
    "dtype": "bfloat16",
    "hidden_size": 192,
    "intermediate_size": 192,
    "num_hidden_layers": 8,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2,
    "full_attention_interval": 4,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
    # 512 bytes per token and attention layer.
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "attn_output_gate": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
    # A state of 268,288 bytes: 256 KiB in float32 and the convolution's 3 x 1,024 in bfloat16.
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "mamba_ssm_dtype": "float32",
}
"""The shipped model's configuration, without the size of its vocabulary."""


class RMSNorm(nn.Module):
    """Normalizes and multiplies by one plus its weight, as this family does."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the module in transformers."""
        return functional.rms_norm(x.float(), x.shape[-1:], 1 + self.weight, self.eps)


class GatedNorm(nn.Module):
    """Normalizes and multiplies by its weight and by the gate's SiLU."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """As the module in transformers."""
        return functional.rms_norm(x, x.shape[-1:], self.weight, self.eps) * functional.silu(gate)


class GatedDeltaNet(nn.Module):
    """A convolution over four tokens, then the gated delta rule."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, self.k_heads = config["hidden_size"], config["linear_num_key_heads"]
        self.v_heads, self.v_size = config["linear_num_value_heads"], config["linear_value_head_dim"]
        self.key_dim, self.value_dim = self.k_heads * config["linear_key_head_dim"], self.v_heads * self.v_size
        self.conv_dim, self.width = 2 * self.key_dim + self.value_dim, config["linear_conv_kernel_dim"]
        self.in_proj_qkv = nn.Linear(hidden, self.conv_dim, bias=False)
        self.in_proj_z = nn.Linear(hidden, self.value_dim, bias=False)
        self.in_proj_b = nn.Linear(hidden, self.v_heads, bias=False)
        self.in_proj_a = nn.Linear(hidden, self.v_heads, bias=False)
        self.conv1d = nn.Conv1d(self.conv_dim, self.conv_dim, self.width, groups=self.conv_dim, bias=False)
        self.A_log = nn.Parameter(torch.zeros(self.v_heads))
        # Heads that at first forget within some 10 to 10,000 tokens.
        rate = torch.logspace(-4, -1, self.v_heads)
        self.dt_bias = nn.Parameter(torch.log(torch.expm1(rate)))
        self.norm = GatedNorm(self.v_size, config["rms_norm_eps"])
        self.out_proj = nn.Linear(self.value_dim, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, hidden size] to the same."""
        batch, tokens, _ = x.shape
        mixed = self.in_proj_qkv(x)
        padded = functional.pad(mixed, (0, 0, self.width - 1, 0))
        taps = self.conv1d.weight.to(mixed.dtype)
        mixed = functional.silu(sum(padded[:, i : i + tokens] * taps[:, 0, i] for i in range(self.width)))
        query, key, value = mixed.split((self.key_dim, self.key_dim, self.value_dim), dim=-1)
        query, key = (
            y.reshape(batch, tokens, self.k_heads, -1).repeat_interleave(self.v_heads // self.k_heads, dim=2)
            for y in (query, key)
        )
        value = value.reshape(batch, tokens, self.v_heads, -1)
        beta = self.in_proj_b(x).float().sigmoid()
        decay = -self.A_log.exp() * functional.softplus(self.in_proj_a(x).float() + self.dt_bias)
        with torch.autocast(x.device.type, enabled=False):
            y = gated_delta_rule(query, key, value, decay, beta)
        gate = self.in_proj_z(x).view(batch, tokens, self.v_heads, -1)
        return self.out_proj(self.norm(y, gate.float()).reshape(batch, tokens, -1))


class Attention(nn.Module):
    """Full attention with normalized queries and keys, partial rotation and an output gate."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, self.size = config["hidden_size"], config["head_dim"]
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.q_proj = nn.Linear(hidden, 2 * self.heads * self.size, bias=False)
        self.k_proj = nn.Linear(hidden, self.kv_heads * self.size, bias=False)
        self.v_proj = nn.Linear(hidden, self.kv_heads * self.size, bias=False)
        self.q_norm = RMSNorm(self.size, config["rms_norm_eps"])
        self.k_norm = RMSNorm(self.size, config["rms_norm_eps"])
        self.o_proj = nn.Linear(self.heads * self.size, hidden, bias=False)
        rope = config["rope_parameters"]
        self.rotated, self.theta = int(self.size * rope["partial_rotary_factor"]), rope["rope_theta"]

    def _rotate(self, x: torch.Tensor) -> torch.Tensor:
        half = self.rotated // 2
        rates = self.theta ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
        angles = torch.arange(x.shape[1], device=x.device, dtype=torch.float32)[:, None, None] * rates
        first, second, rest = x.split((half, half, self.size - self.rotated), dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, hidden size] to the same."""
        batch, tokens, _ = x.shape
        query, gate = self.q_proj(x).view(batch, tokens, self.heads, 2 * self.size).chunk(2, dim=-1)
        query = self._rotate(self.q_norm(query))
        key = self._rotate(self.k_norm(self.k_proj(x).view(batch, tokens, self.kv_heads, self.size)))
        value = self.v_proj(x).view(batch, tokens, self.kv_heads, self.size)
        key, value = (y.repeat_interleave(self.heads // self.kv_heads, dim=2) for y in (key, value))
        query, key, value = (y.transpose(1, 2).to(value.dtype) for y in (query, key, value))
        y = functional.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)
        return self.o_proj((y * gate.sigmoid()).reshape(batch, tokens, -1))


class MLP(nn.Module):
    """Gated SiLU."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, hidden size] to the same."""
        y = functional.silu(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(y)


class Layer(nn.Module):
    """A mixer and an MLP around a float32 residual stream."""

    def __init__(self, config: dict[str, Any], kind: str) -> None:
        super().__init__()
        if kind == "linear_attention":
            self.linear_attn = GatedDeltaNet(config)
        else:
            self.self_attn = Attention(config)
        self.kind = kind
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        self.post_attention_layernorm = RMSNorm(config["hidden_size"], config["rms_norm_eps"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, hidden size] to the same."""
        mixer = self.linear_attn if self.kind == "linear_attention" else self.self_attn
        x = x + mixer(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Hybrid(nn.Module):
    """Tokens to logits; the number of tokens of a text is a multiple of `delta_rule.CHUNK`."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config["vocab_size"], config["hidden_size"]),
                "layers": nn.ModuleList(Layer(config, kind) for kind in config["layer_types"]),
                "norm": RMSNorm(config["hidden_size"], config["rms_norm_eps"]),
            }
        )
        self.lm_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)
        self._start(config["num_hidden_layers"])

    @torch.no_grad()
    def _start(self, layers: int) -> None:
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                continue
            if "embed_tokens" in name:
                std = 0.7
            elif name.endswith("conv1d.weight"):
                std = 0.5
            elif name.endswith(("out_proj.weight", "o_proj.weight", "down_proj.weight")):
                std = 1 / math.sqrt(2 * layers * parameter.shape[1])
            else:
                std = 1 / math.sqrt(parameter.shape[1])
            parameter.normal_(std=std)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[batch, tokens] to [batch, tokens, vocabulary]."""
        table = self.model["embed_tokens"].weight
        # A product: the gradient of a lookup in so few rows is slow.
        x = (tokens[..., None] == torch.arange(len(table), device=table.device)).to(table.dtype) @ table
        for layer in self.model["layers"]:
            x = layer(x)
        return self.lm_head(self.model["norm"](x))

"""Families whose states are delta-rule matrices: Qwen3.5, Qwen3-Next, Kimi Linear, GLM-5 Next."""

from __future__ import annotations

from dataclasses import replace

from tidepool.models.config import Config, ModelConfigError
from tidepool.models.families.common import attention, layer_kinds, model_of
from tidepool.models.mixers import (
    GatedDelta,
    IndexerTail,
    KimiDelta,
    LatentAttention,
    Mixer,
    PooledIndexer,
)
from tidepool.models.model import Layer, Model
from tidepool.models.weights import dense, mixture

_KINDS = {"linear_attention": "state", "full_attention": "attention", "indexed_attention": "attention"}


def qwen3_next(config: Config) -> Model:
    """Qwen3-Next and Qwen3.5, dense and mixture of experts: Gated DeltaNet beside gated attention.

    vLLM keeps the matrices in the config's ``mamba_ssm_dtype``, or in the model's type where there is none.
    """
    hidden, count = config.positive("hidden_size"), config.positive("num_hidden_layers")
    delta = GatedDelta(
        hidden=hidden,
        key_heads=config.positive("linear_num_key_heads"),
        value_heads=config.positive("linear_num_value_heads"),
        key_size=config.positive("linear_key_head_dim"),
        value_size=config.positive("linear_value_head_dim"),
        kernel=config.positive("linear_conv_kernel_dim"),
        split=config.model_type != "qwen3_next",
    )
    gated = attention(config, gated=config.flag("attn_output_gate", default=True))
    if config.has("num_experts"):
        feed_forward = mixture(
            "mlp",
            hidden,
            config.positive("moe_intermediate_size"),
            config.positive("num_experts"),
            config.count("shared_expert_intermediate_size"),
            shared_name="shared_expert",
        )
    else:
        feed_forward = dense("mlp", hidden, config.positive("intermediate_size"))
    layers = [
        Layer({"state": delta} if kind == "state" else {"attention": gated}, feed_forward)
        for kind in _kinds(config, count)
    ]
    state_dtype = config.text("mamba_ssm_dtype") if config.has("mamba_ssm_dtype") else None
    model = model_of(config, "Gated DeltaNet and attention", layers, state_dtype)
    # vLLM takes one for granted, too.
    drafts = config.count("mtp_num_hidden_layers", "num_nextn_predict_layers", default=1)
    return replace(
        model,
        draft_layers=(Layer({"attention": gated}, feed_forward),) * drafts,
        draft_joint=drafts * 2 * hidden * hidden,
    )


def kimi_linear(config: Config) -> Model:
    """Kimi Linear: Kimi Delta Attention beside latent attention; matrices are float32 in vLLM."""
    hidden, count = config.positive("hidden_size"), config.positive("num_hidden_layers")
    linear = Config({"model_type": config.model_type, **config.table("linear_attn_config")})
    delta = KimiDelta(
        hidden,
        linear.positive("num_heads"),
        linear.positive("head_dim"),
        linear.positive("short_conv_kernel_size"),
        full_gate=linear.flag("use_full_rank_gate"),
    )
    latent = _latent(config, gated=config.flag("mla_use_output_gate"))
    dense_layers = config.count("first_k_dense_replace")
    inner = config.positive("moe_intermediate_size")
    feed_forward = mixture(
        "mlp",
        hidden,
        inner,
        config.positive("num_experts"),
        inner * config.count("num_shared_experts"),
        latent=config.positive("routed_expert_hidden_size") if config.has("routed_expert_hidden_size") else None,
        latent_names=("routed_expert_down_proj", "routed_expert_up_proj"),
    )
    full = {index - 1 for index in linear.indices("full_attn_layers")}  # counted from 1
    layers = []
    for index in range(count):
        mixers: dict[str, Mixer] = {"attention": latent} if index in full else {"state": delta}
        is_dense = index < dense_layers
        layers.append(
            Layer(mixers, dense("mlp", hidden, config.positive("intermediate_size")) if is_dense else feed_forward)
        )
    return model_of(config, "Kimi Delta Attention and latent attention", layers, "float32")


def glm5_next(config: Config) -> Model:
    """GLM-5 Next: Kimi Delta Attention beside sparse latent attention with a pooled index."""
    hidden, count = config.positive("hidden_size"), config.positive("num_hidden_layers")
    delta = KimiDelta(
        hidden,
        config.positive("linear_num_heads"),
        config.positive("linear_head_dim"),
        config.positive("linear_conv_kernel_dim"),
    )
    size, pool = config.positive("index_head_dim"), config.positive("index_kpool")
    sparse: dict[str, Mixer] = {
        "attention": _latent(config),
        "index": PooledIndexer(hidden, config.positive("index_n_heads"), size, config.positive("q_lora_rank"), pool),
        "tail": IndexerTail(size, pool),
    }
    inner = config.positive("moe_intermediate_size")
    feed_forward = mixture(
        "mlp", hidden, inner, config.positive("n_routed_experts"), inner * config.count("n_shared_experts")
    )
    dense_layers = config.count("first_k_dense_replace", default=3)
    layers = [
        Layer(
            {"state": delta} if kind == "state" else sparse,
            dense("mlp", hidden, config.positive("intermediate_size")) if index < dense_layers else feed_forward,
        )
        for index, kind in enumerate(_kinds(config, count))
    ]
    model = model_of(config, "Kimi Delta Attention and sparse latent attention", layers, "float32")
    drafts = (Layer(sparse, feed_forward),) * config.count("num_nextn_predict_layers")
    return replace(model, draft_layers=drafts, draft_joint=len(drafts) * 2 * hidden * hidden)


def _latent(config: Config, gated: bool = False) -> LatentAttention:
    return LatentAttention(
        hidden=config.positive("hidden_size"),
        heads=config.positive("num_attention_heads"),
        latent=config.positive("kv_lora_rank"),
        rope=config.count("qk_rope_head_dim"),
        nope=config.positive("qk_nope_head_dim"),
        value=config.positive("v_head_dim"),
        query_latent=config.positive("q_lora_rank") if config.has("q_lora_rank") else None,
        gated=gated,
    )


def _kinds(config: Config, count: int) -> list[str]:
    """Kind of every layer; every ``full_attention_interval``-th is attention where they are not listed."""
    if config.has("layer_types"):
        kinds = layer_kinds(config, _KINDS, "layer_types")
        if len(kinds) != count:
            raise ModelConfigError(f'"layer_types" of the config lists {len(kinds)} layers of {count}.')
        return kinds
    interval = config.positive("full_attention_interval", default=4)
    return ["state" if (index + 1) % interval else "attention" for index in range(count)]

"""Families whose states are Mamba's or a short convolution's.

Nemotron-H, Falcon-H1, Granite 4 hybrids, Bamba, Jamba, Mamba2, LFM2.
"""

from __future__ import annotations

from dataclasses import replace

from tidepool.models.config import Config, ModelConfigError
from tidepool.models.families.common import attention, layer_kinds, model_of
from tidepool.models.mixers import Mamba1, Mamba2, Mixer, ShortConvolution
from tidepool.models.model import Layer, Model
from tidepool.models.weights import Linear, dense, mixture

_PATTERN = {"M": "state", "*": "attention", "-": "mlp", "E": "moe"}
_KINDS = {
    "mamba": "state",
    "linear_attention": "state",
    "conv": "state",
    "attention": "attention",
    "full_attention": "attention",
    "mlp": "mlp",
    "moe": "moe",
}


def nemotron_h(config: Config) -> Model:
    """Nemotron-H and Nemotron 3: Mamba2, attention and feed-forward, each a layer of its own.

    vLLM keeps the matrices in the config's ``mamba_ssm_cache_dtype``, or in float32 where there is none.
    """
    hidden = config.positive("hidden_size")
    mamba = Mamba2(
        hidden=hidden,
        heads=config.positive("mamba_num_heads"),
        head_size=config.positive("mamba_head_dim"),
        groups=config.positive("n_groups"),
        state_size=config.positive("ssm_state_size"),
        kernel=config.positive("conv_kernel"),
        module="mixer",
    )
    if config.has("hybrid_override_pattern"):
        pattern = config.text("hybrid_override_pattern")
        if unknown := set(pattern) - set(_PATTERN):
            raise ModelConfigError(f'"hybrid_override_pattern" of the config has unknown letters: {unknown}.')
        kinds = [_PATTERN[letter] for letter in pattern]
    else:
        kinds = layer_kinds(config, _KINDS, "layers_block_type", "layer_types")
    parts = {
        "state": lambda: Layer({"state": mamba}),
        "attention": lambda: Layer({"attention": attention(config, module="mixer")}),
        "mlp": lambda: Layer({}, dense("mixer", hidden, config.positive("intermediate_size"), gated=False)),
        "moe": lambda: Layer({}, _nemotron_experts(config)),
    }
    made = {kind: parts[kind]() for kind in dict.fromkeys(kinds)}
    layers = [made[kind] for kind in kinds]
    state_dtype = config.text("mamba_ssm_cache_dtype", default="float32")
    model = model_of(config, "Mamba2 and attention", layers, state_dtype)
    heads = config.count("num_nextn_predict_layers")
    head = (
        [_PATTERN.get(letter) for letter in config.text("mtp_hybrid_override_pattern", default="*E")] if heads else []
    )
    if not set(head) <= set(parts):
        raise ModelConfigError('"mtp_hybrid_override_pattern" of the config has unknown letters.')
    drafts = tuple(parts[kind]() for kind in head if kind is not None) * heads
    return replace(model, draft_layers=drafts, draft_joint=heads * 2 * hidden * hidden)


def _nemotron_experts(config: Config) -> tuple[Linear, ...]:
    """Experts without gates; of Super and Ultra they see a latent vector, ``moe_latent_size`` numbers of a token."""
    return mixture(
        "mixer",
        config.positive("hidden_size"),
        config.positive("moe_intermediate_size"),
        config.positive("n_routed_experts"),
        config.count("moe_shared_expert_intermediate_size") * config.count("n_shared_experts", default=1),
        gated=False,
        latent=config.positive("moe_latent_size") if config.has("moe_latent_size") else None,
    )


def falcon_h1(config: Config) -> Model:
    """Falcon-H1: Mamba2 and attention side by side in every layer."""
    hidden = config.positive("hidden_size")
    inner = config.positive("mamba_d_ssm", default=config.positive("mamba_expand", default=2) * hidden)
    mixers: dict[str, Mixer] = {"state": _mamba2(config, inner), "attention": attention(config)}
    layer = Layer(mixers, dense("feed_forward", hidden, config.positive("intermediate_size")))
    return model_of(config, "Mamba2 beside attention", [layer] * config.positive("num_hidden_layers"))


def granite_hybrid(config: Config) -> Model:
    """Granite 4 hybrids: Mamba2 or attention, each with experts and a shared feed-forward part."""
    hidden = config.positive("hidden_size")
    shared, experts = config.count("shared_intermediate_size"), config.count("num_local_experts")
    feed_forward = dense("shared_mlp", hidden, shared) if shared else ()
    if experts:
        feed_forward += mixture("block_sparse_moe", hidden, config.positive("intermediate_size"), experts)
    mamba = _mamba2(config, config.positive("mamba_expand", default=2) * hidden)
    layers = [
        Layer({"state": mamba} if kind == "state" else {"attention": attention(config)}, feed_forward)
        for kind in layer_kinds(config, _KINDS, "layer_types", "layers_block_type")
    ]
    return model_of(config, "Mamba2 and attention", layers)


def bamba(config: Config) -> Model:
    """Bamba: Mamba2, with attention in the layers of ``attn_layer_indices``."""
    hidden = config.positive("hidden_size")
    mamba = _mamba2(config, config.positive("mamba_expand", default=2) * hidden)
    full = set(config.indices("attn_layer_indices"))
    layers = [
        Layer(
            {"attention": attention(config)} if index in full else {"state": mamba},
            dense("feed_forward", hidden, config.positive("intermediate_size")),
        )
        for index in range(config.positive("num_hidden_layers"))
    ]
    return model_of(config, "Mamba2 and attention", layers)


def jamba(config: Config) -> Model:
    """Jamba: Mamba, with attention and experts in every so many-th layer."""
    hidden = config.positive("hidden_size")
    mamba = Mamba1(
        hidden=hidden,
        inner=config.positive("mamba_expand") * hidden,
        state_size=config.positive("mamba_d_state"),
        kernel=config.positive("mamba_d_conv"),
        step_rank=-(-hidden // 16),
    )
    inner = config.positive("intermediate_size")
    experts = mixture("feed_forward", hidden, inner, config.positive("num_experts"))
    attention_period, expert_period = (
        config.positive("attn_layer_period"),
        config.positive("expert_layer_period"),
    )
    layers = []
    for index in range(config.positive("num_hidden_layers")):
        full = index % attention_period == config.count("attn_layer_offset")
        mixed = index % expert_period == config.count("expert_layer_offset")
        layers.append(
            Layer(
                {"attention": attention(config)} if full else {"state": mamba},
                experts if mixed else dense("feed_forward", hidden, inner),
            )
        )
    return model_of(config, "Mamba and attention", layers)


def mamba2(config: Config) -> Model:
    """Mamba2 alone: no attention, so memory doesn't grow with the sequence."""
    mamba = Mamba2(
        hidden=config.positive("hidden_size"),
        heads=config.positive("num_heads"),
        head_size=config.positive("head_dim"),
        groups=config.positive("n_groups"),
        state_size=config.positive("state_size"),
        kernel=config.positive("conv_kernel"),
    )
    return model_of(config, "Mamba2", [Layer({"state": mamba})] * config.positive("num_hidden_layers"))


def lfm2(config: Config) -> Model:
    """LFM2: gated short convolutions and attention."""
    hidden, count = config.positive("hidden_size"), config.positive("num_hidden_layers")
    if config.has("layer_types"):
        kinds = layer_kinds(config, _KINDS, "layer_types")
    else:
        full = set(config.indices("full_attn_idxs"))
        kinds = ["attention" if index in full else "state" for index in range(count)]
    convolution = ShortConvolution(hidden, config.positive("conv_dim", default=hidden), config.positive("conv_L_cache"))
    width = dense("feed_forward", hidden, _lfm2_width(config))
    layers = [
        Layer({"state": convolution} if kind == "state" else {"attention": attention(config)}, width) for kind in kinds
    ]
    return model_of(config, "short convolution and attention", layers)


def _lfm2_width(config: Config) -> int:
    """Feed-forward width: two thirds of the declared one, rounded up, unless that is final."""
    inner = config.positive("block_ff_dim", "intermediate_size")
    if not config.flag("block_auto_adjust_ff_dim"):
        return inner
    multiple = config.positive("block_multiple_of", default=256)
    return -(-(2 * inner // 3) // multiple) * multiple


def _mamba2(config: Config, inner: int) -> Mamba2:
    heads = config.positive("mamba_n_heads")
    if inner % heads:
        raise ModelConfigError(f'{inner} channels don\'t divide among the {heads} heads of "mamba_n_heads".')
    return Mamba2(
        hidden=config.positive("hidden_size"),
        heads=heads,
        head_size=inner // heads,
        groups=config.positive("mamba_n_groups"),
        state_size=config.positive("mamba_d_state"),
        kernel=config.positive("mamba_d_conv"),
    )

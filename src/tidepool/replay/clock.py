"""How long a step of the model takes: a roofline over a GPU's published peaks.

A step takes the longer of its arithmetic at `COMPUTE_SHARE` of the card's peak and its memory traffic at
`BANDWIDTH_SHARE` of the card's bandwidth, and `STEP_OVERHEAD` on top. Arithmetic: two operations for each active weight
and token, and four for each query head's element and each key that a query sees. Traffic: the weights once (of routed
experts those that some token is likely to choose), keys and values of every request's tokens so far, and every
request's states, read and written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tidepool.cache import FullAttention, SlidingWindow, State
from tidepool.gpus import Gpu
from tidepool.models import CacheOptions, Model, model_from_config
from tidepool.models.config import Config
from tidepool.models.mixers import Attention, LatentAttention

COMPUTE_SHARE = 0.5
"""Of the peak that large matrix products of a real model reach."""
BANDWIDTH_SHARE = 0.75
"""Of the peak that reading weights and caches reaches."""
STEP_OVERHEAD = 0.003
"""Seconds of a step that are neither: launches, sampling, the scheduler."""
LINK_SHARE = 1 / 8
"""Of a card's bandwidth that the links between cards have: about NVLink's; PCIe is slower."""
SUM_LATENCY = 10e-6
"""Seconds of a sum over several devices, however small."""


@dataclass(frozen=True)
class Work:
    """What one step does."""

    tokens: int
    """Scheduled in all requests together."""
    pairs: float
    """Sum over these tokens of the tokens that each attends to."""
    context_tokens: int
    """Sum over the step's requests of their tokens once it is done."""
    requests: int


@dataclass(frozen=True)
class CostModel:
    """Seconds of a step on one card."""

    gpu: Gpu
    plain_weights: int
    """Parameters that every token passes, without embeddings and routed experts."""
    expert_weights: int
    """Parameters of all routed experts."""
    expert_share: float
    """Of the routed experts that one token passes, 0 to 1."""
    output_weights: int
    """Parameters of the output embedding, which one token of every request passes."""
    plain_bytes: float
    """Bytes of all weights but routed experts."""
    expert_bytes: float
    """Bytes of all routed experts."""
    head_elements: int
    """Elements of all query heads in all attention layers, keys and values taken as equally long."""
    token_bytes: int
    """Bytes of attention that a token keeps in all layers."""
    state_bytes: int
    """Bytes of a request's states in all layers."""
    states_written: int = 1
    """Of each layer in a step: one, and one more for each draft token."""
    devices: int = 1
    """That share the weights; ``token_bytes`` and ``state_bytes`` are those of one of them."""
    sums: int = 0
    """Over all devices in a step: one behind each part of a layer."""
    sum_bytes: int = 0
    """Bytes of a token in each."""

    def seconds(self, work: Work) -> float:
        """How long a step takes."""
        active = self.plain_weights + self.expert_weights * self.expert_share
        flops = 2 * (active * work.tokens + self.output_weights * work.requests) + 4 * self.head_elements * work.pairs
        touched = 1 - (1 - self.expert_share) ** work.tokens
        traffic = (
            (self.plain_bytes + self.expert_bytes * touched) / self.devices
            + self.token_bytes * work.context_tokens
            + (1 + self.states_written) * self.state_bytes * work.requests
        )
        compute = flops / (self.devices * self.gpu.flops * COMPUTE_SHARE)
        memory = traffic / (self.gpu.bandwidth * BANDWIDTH_SHARE)
        return max(compute, memory) + self._sum_seconds(work.tokens) + STEP_OVERHEAD

    def _sum_seconds(self, tokens: int) -> float:
        """What sums over several devices take: each sends and gets all but its own part twice."""
        if self.devices == 1:
            return 0.0
        sent = 2 * (1 - 1 / self.devices) * self.sum_bytes * tokens
        return self.sums * (SUM_LATENCY + sent / (self.gpu.bandwidth * LINK_SHARE))


def cost_model(config: Mapping[str, Any], gpu: Gpu, options: CacheOptions = CacheOptions()) -> CostModel:  # noqa: B008
    """The costs of a model with this HF-style configuration, on each of the devices that it is cut for.

    Raises:
        ModelConfigError: the model can't be read.
    """
    model = model_from_config(config)
    caches = model.layer_caches(options).values()
    experts = sum(layer.experts for layer in model.layers)
    keys = Config(config)
    expert_bytes = experts * model.expert_bytes_each
    return CostModel(
        gpu=gpu,
        plain_weights=model.parameters - model.embedding - experts,
        expert_weights=experts,
        expert_share=_expert_share(keys) if experts else 0.0,
        output_weights=keys.positive("hidden_size") * keys.positive("vocab_size"),
        plain_bytes=model.weight_bytes() - expert_bytes,
        expert_bytes=expert_bytes,
        head_elements=_head_elements(model),
        token_bytes=sum(c.bytes_per_token for c in caches if isinstance(c, FullAttention | SlidingWindow)),
        state_bytes=sum(c.bytes for c in caches if isinstance(c, State)),
        states_written=1 + options.speculative_tokens,
        devices=options.tp,
        sums=sum(bool(layer.mixers) + bool(layer.feed_forward) for layer in model.layers),
        sum_bytes=2 * model.hidden,
    )


def _head_elements(model: Model) -> int:
    """Query heads times their size, over all layers; a latent layer attends in its compressed space."""
    elements = 0
    for layer in model.layers:
        for mixer in layer.mixers.values():
            if isinstance(mixer, Attention):
                elements += mixer.heads * mixer.head_size
            elif isinstance(mixer, LatentAttention):
                elements += mixer.heads * (mixer.latent + mixer.rope)
    return elements


def _expert_share(config: Config) -> float:
    """Routed experts that a token passes, of all there are."""
    chosen = config.positive("num_experts_per_tok", "num_experts_per_token")
    return min(1.0, chosen / config.positive("num_experts", "num_local_experts", "n_routed_experts"))

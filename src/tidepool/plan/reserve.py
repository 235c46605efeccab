"""What vLLM needs of a card beside weights and KV cache: a model of its own measurement at start.

vLLM runs one step of the largest size before it makes the cache, and takes off what that step needed at most, what
stays allocated afterwards, and an estimate of the CUDA graphs. Each part here has a cause; docs/plan.md names it, and
holds the sum against public logs.
"""

from __future__ import annotations

from dataclasses import dataclass

from tidepool.gpus import Gpu
from tidepool.models import Layer, Model
from tidepool.models.weights import Linear

GIB = 1 << 30
SMALL_STEP = (2_048, 256)
"""Tokens of a step and requests at once, as vLLM has them on most cards."""
RUNTIME = int(0.35 * GIB)
"""Workspaces of attention kernels, rotary tables, and what the allocator rounds up."""
PEER = int(0.4 * GIB)
"""Buffers for each other device of a tensor parallel group, up to three."""
HOST = 3 * GIB
"""The process itself, where processor and card share memory."""
IMAGE_COPIES = 3
"""Of an image's float32 patches, which the process keeps on its own side; they count where memory is shared."""
EXPERT_WORKSPACE = int(0.8 * GIB)
"""Of FlashInfer's CUTLASS kernels for experts."""
GRAPH_LAYER = int(0.225 * (1 << 20))
"""One layer in one CUDA graph."""
LOGIT_BYTES = 2 + 3 * 4
"""Of one logit of one request while a token is drawn: as the model gives it, and three times in float32."""


@dataclass(frozen=True)
class Reserve:
    """Bytes of one device, by cause."""

    activations: int
    """The most that the largest step needs at once."""
    graphs: int
    runtime: int
    communication: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.activations + self.graphs + self.runtime + self.communication


@dataclass(frozen=True)
class Step:
    """The largest step of an engine."""

    tokens: int
    """vLLM's ``max_num_batched_tokens``."""
    requests: int
    """vLLM's ``max_num_seqs``."""
    eager: bool = False
    """Whether there are no CUDA graphs."""
    vision: bool = True
    """Whether the model's vision tower is there."""


def reserve(model: Model, gpu: Gpu, step: Step, tp: int = 1, pp: int = 1, draft_tokens: int = 0) -> Reserve:
    """What one device of a card needs.

    Raises:
        ModelConfigError: the size of the vision tower isn't known.
    """
    layers = -(-len(model.layers) // pp)
    experts = any(layer.experts for layer in model.layers)
    images = _images(model, step)
    graphs = 0 if step.eager else layers * graph_count(step, gpu, draft_tokens) * GRAPH_LAYER
    return Reserve(
        activations=max(images.activations, images.outputs + max(_forward(model, step, tp), _sampling(model, step))),
        graphs=graphs + (EXPERT_WORKSPACE if gpu.blackwell and experts else 0),
        runtime=RUNTIME + (HOST + IMAGE_COPIES * images.patches if gpu.unified else 0),
        communication=PEER * min(tp - 1, 3),
    )


def graph_count(step: Step, gpu: Gpu, draft_tokens: int = 0) -> int:
    """CUDA graphs that vLLM captures by default: one for each size of a step in pieces, one for each of decoding."""
    query = 1 + draft_tokens
    largest = min(2 * step.requests * query, gpu.graph_tokens, step.tokens)
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, largest + 1, 16)]
    pieces = [size for size in sizes if size <= largest]
    return len(pieces) + len([size for size in pieces if size <= step.requests * query])


def default_step(gpu: Gpu | None) -> tuple[int, int]:
    """``max_num_batched_tokens`` and ``max_num_seqs`` of a server where the user gives neither.

    Without a card they are those of a small one.
    """
    if gpu is None or not gpu.many:
        return SMALL_STEP
    return (16_384 if gpu.gib >= 160 else 8_192), 1_024


@dataclass(frozen=True)
class _Images:
    """Bytes of the images that vLLM reads together to measure memory."""

    activations: int = 0
    outputs: int = 0
    """What the tower makes of them, which stays until the step has ended."""
    patches: int = 0
    """The images themselves, in float32."""


def _images(model: Model, step: Step) -> _Images:
    """As many of the largest size as the step has tokens for. Tensor parallel devices measured as much as one."""
    tower = model.vision if step.vision else None
    if tower is None:
        return _Images()
    count = max(1, min(step.tokens // tower.image_tokens, step.requests))
    return _Images(
        count * tower.activation_bytes(model.numerics.model_bytes),
        count * tower.image_tokens * tower.merger[-1].outputs * model.numerics.model_bytes,
        count * tower.patches * tower.patch_numbers * 4,
    )


def _forward(model: Model, step: Step, tp: int) -> int:
    """A step of the largest size in the layer that needs the most: its own numbers, beside four vectors of a token."""
    widest = max(_numbers(layer, tp, model.experts_per_token) for layer in model.layers)
    return step.tokens * (4 * model.hidden + widest) * model.numerics.model_bytes


def _sampling(model: Model, step: Step) -> int:
    """A token drawn for as many requests as may run, from logits of the whole vocabulary; the step's output stays."""
    hidden = step.tokens * model.hidden * model.numerics.model_bytes
    return step.requests * model.vocabulary * LOGIT_BYTES + hidden


def _numbers(layer: Layer, tp: int, chosen: int) -> int:
    """Numbers that the part of a layer that makes the most of them makes of a token, its output not counted."""
    # The output projection comes last; what it reads of a feed-forward part is an activation, made like the rest.
    mixers = [sum(linear.outputs for linear in mixer.linears[:-1]) // tp for mixer in layer.mixers.values()]
    plain = [linear for linear in layer.feed_forward if not linear.expert and not linear.whole]
    routed = [linear for linear in layer.feed_forward if linear.expert]
    inner = sum(_width(linear) for linear in plain) // tp
    if routed:
        inner += chosen * (routed[0].inputs + sum(_width(linear) for linear in routed) // tp)
    return max([*mixers, inner])


def _width(linear: Linear) -> int:
    return linear.inputs if linear.name.endswith("down_proj") else linear.outputs

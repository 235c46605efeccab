"""A model as a plan sees it: layers with their caches and weights, cut into pipeline stages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tidepool.cache.spec import LayerCache
from tidepool.models.config import ModelConfigError
from tidepool.models.mixers import WINDOWS, Attention, CacheOptions, LatentAttention, Mixer, Numerics
from tidepool.models.quantization import Quantization
from tidepool.models.vision import Vision, read_vision
from tidepool.models.weights import Linear, parameters


@dataclass(frozen=True)
class Layer:
    """One decoder layer."""

    mixers: dict[str, Mixer]
    """By short name; none in a feed-forward layer, two where attention and state run side by side."""
    feed_forward: tuple[Linear, ...] = ()
    """Matrices of the feed-forward part, all experts included."""

    @property
    def linears(self) -> tuple[Linear, ...]:
        """All its matrices."""
        return (*(linear for mixer in self.mixers.values() for linear in mixer.linears), *self.feed_forward)

    @property
    def other(self) -> int:
        """Weights beside the matrices, which no method quantizes."""
        return sum(mixer.other for mixer in self.mixers.values())

    @property
    def parameters(self) -> int:
        """All its weights but norms and biases."""
        return parameters(self.linears) + self.other

    @property
    def experts(self) -> int:
        """Parameters of routed experts, a part of ``parameters``."""
        return parameters(linear for linear in self.feed_forward if linear.expert)


@dataclass(frozen=True)
class Model:
    """A language model: shapes only, no weights."""

    family: str
    """What it is made of, in words."""
    model_type: str
    """Its type in HF configurations."""
    layers: tuple[Layer, ...]
    hidden: int
    """Numbers of a token between layers."""
    vocabulary: int
    tied: bool
    """Whether input and output embedding are the same."""
    max_tokens: int
    """The longest sequence that the model was made for, in tokens."""
    numerics: Numerics
    quantization: Quantization = field(default_factory=Quantization)
    """How the checkpoint stores its matrices."""
    draft_layers: tuple[Layer, ...] = ()
    """Of the head that drafts tokens (MTP); they count only where it is used."""
    draft_joint: int = 0
    """Parameters that join a token's embedding and its hidden numbers before the draft layers."""
    experts_per_token: int = 0
    """Routed experts that a token passes in a layer that has some."""
    vision_config: Mapping[str, Any] = field(default_factory=dict)
    """The configuration of its vision tower; empty where there is none."""

    @property
    def parameters(self) -> int:
        """All weights but norms and biases, which are under 0.1%; no vision tower, no draft layers."""
        return self.embedding + sum(layer.parameters for layer in self.layers)

    @property
    def embedding(self) -> int:
        """Parameters of the input embedding, and of the output one where it is not the same."""
        return (1 if self.tied else 2) * self.vocabulary * self.hidden

    @property
    def vision(self) -> Vision | None:
        """Its vision tower.

        Raises:
            ModelConfigError: there is one whose size isn't known here.
        """
        return read_vision(self.vision_config, self.hidden)

    @property
    def draft_parameters(self) -> int:
        """Of the head that drafts tokens."""
        return self.draft_joint + sum(layer.parameters for layer in self.draft_layers)

    @property
    def expert_bytes_each(self) -> float:
        """Bytes of one parameter of a routed expert in the checkpoint, on average."""
        found = [
            (linear, self.quantization.bytes(linear, index, self.numerics.model_bytes))
            for index, layer in enumerate(self.layers)
            for linear in layer.feed_forward
            if linear.expert
        ]
        total = parameters(linear for linear, _ in found)
        return sum(each for _, each in found) / total if total else self.numerics.model_bytes

    @property
    def has_attention(self) -> bool:
        """Whether some layer keeps something of every token, or of those in a window."""
        return any(isinstance(m, Attention | LatentAttention) for layer in self.layers for m in layer.mixers.values())

    @property
    def hybrid(self) -> bool:
        """Whether states lie beside attention."""
        kinds = {name for layer in self.layers for name in layer.mixers}
        return "state" in kinds and self.has_attention

    @property
    def latent(self) -> bool:
        """Whether attention is latent (MLA)."""
        return any(isinstance(mixer, LatentAttention) for layer in self.layers for mixer in layer.mixers.values())

    def layer_caches(self, options: CacheOptions) -> dict[str, LayerCache]:
        """What every layer keeps on one device, by layer name.

        Raises:
            ModelConfigError: a layer can't be cut or typed as ``options`` ask, or draft layers are asked for and the
                model has none.
        """
        self._check_layers(options.layer_kv_dtypes)
        if options.mtp and not self.draft_layers:
            raise ModelConfigError("No layers of this model are known to draft tokens: leave --mtp out.")
        layers = self.layers + (self.draft_layers if options.mtp else ())
        return {
            f"layers.{index}.{name}": mixer.cache(_options_of(index, mixer, options), self.numerics)
            for index, layer in enumerate(layers)
            for name, mixer in layer.mixers.items()
        }

    def _check_layers(self, layer_kv_dtypes: Sequence[tuple[int | str, str]]) -> None:
        mixers = {index: layer.mixers.values() for index, layer in enumerate(self.layers)}
        attention = [
            index for index, each in mixers.items() if any(isinstance(m, Attention | LatentAttention) for m in each)
        ]
        windowed = any(isinstance(m, Attention) and m.window for each in mixers.values() for m in each)
        for layer, _ in layer_kv_dtypes:
            if layer == WINDOWS and not windowed:
                raise ModelConfigError("This model has no layers with a sliding window.")
            if layer != WINDOWS and layer not in attention:
                raise ModelConfigError(
                    f"Layer {layer} has no attention whose KV cache could be typed; layers with it: "
                    f"{', '.join(map(str, attention)) or 'none'}."
                )

    def stages(self, pp: int, options: CacheOptions) -> list[dict[str, LayerCache]]:
        """What every layer keeps, one dict for each pipeline stage; draft layers are on the last one."""
        caches = self.layer_caches(options)
        bounds = stage_bounds(len(self.layers), pp)
        bounds[-1] = (bounds[-1][0], len(self.layers) + len(self.draft_layers))
        return [
            {name: cache for name, cache in caches.items() if first <= int(name.split(".")[1]) < end}
            for first, end in bounds
        ]

    def weight_bytes(self, tp: int = 1, pp: int = 1, *, vision: bool = False, drafts: bool = False) -> int:
        """Estimate of the weights on the fullest device, in bytes.

        The first stage holds the input embedding and the vision tower, the last one the output embedding and the head
        that drafts.

        Args:
            tp: devices that share each layer.
            pp: pipeline stages.
            vision: whether the vision tower counts.
            drafts: whether the head that drafts counts.

        Raises:
            ModelConfigError: the checkpoint is quantized in a way that isn't known here, or the tower's size is not.
        """
        each = self.numerics.model_bytes
        stages = [0.0] * pp
        for stage, (first, end) in enumerate(stage_bounds(len(self.layers), pp)):
            stages[stage] += sum(
                self._bytes(layer.linears, first + index, tp) + layer.other * each / tp
                for index, layer in enumerate(self.layers[first:end])
            )
        table = self.vocabulary * self.hidden
        stages[0] += table * each / tp
        if not self.tied:
            stages[-1] += self._bytes((Linear("lm_head", self.hidden, self.vocabulary),), None, tp)
        elif pp > 1:
            stages[-1] += table * each / tp
        if vision and (tower := self.vision):
            stages[0] += self._bytes(tower.linears, None, tp) + tower.other * each / tp
        if drafts:
            stages[-1] += self.draft_joint * each / tp
            stages[-1] += sum(
                self._bytes(layer.linears, index, tp, draft=True) + layer.other * each / tp
                for index, layer in enumerate(self.draft_layers)
            )
        return int(max(stages))

    def _bytes(self, linears: Iterable[Linear], layer: int | None, tp: int, *, draft: bool = False) -> float:
        """Bytes of matrices on one of ``tp`` devices."""
        each = self.numerics.model_bytes
        return sum(self.quantization.bytes(one, layer, each, draft=draft) / (1 if one.whole else tp) for one in linears)


def stage_bounds(layers: int, pp: int) -> list[tuple[int, int]]:
    """First layer and end of every pipeline stage; layers left over go to the stages before the last."""
    if not 1 <= pp <= layers:
        raise ModelConfigError(f"A model of {layers} layers can't be cut into {pp} pipeline stages.")
    sizes = [layers // pp] * pp
    for index in range(layers % pp):
        sizes[-(index + 2)] += 1
    ends = [sum(sizes[: stage + 1]) for stage in range(pp)]
    return [(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def _options_of(index: int, mixer: Mixer, options: CacheOptions) -> CacheOptions:
    """The options of one layer."""
    windowed = isinstance(mixer, Attention) and mixer.window
    chosen = [dtype for layer, dtype in options.layer_kv_dtypes if layer == index or (layer == WINDOWS and windowed)]
    return replace(options, kv_dtype=chosen[-1], layer_kv_dtypes=()) if chosen else options

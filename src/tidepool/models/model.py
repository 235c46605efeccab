"""A model as a plan sees it: layers with their caches and weights, cut into pipeline stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tidepool.cache.spec import LayerCache
from tidepool.models.config import ModelConfigError
from tidepool.models.mixers import WINDOWS, Attention, CacheOptions, LatentAttention, Mixer, Numerics


@dataclass(frozen=True)
class Layer:
    """One decoder layer."""

    mixers: dict[str, Mixer]
    """By short name; none in a feed-forward layer, two where attention and state run side by side."""
    feed_forward: int = 0
    """Parameters of the feed-forward part, all experts included."""
    experts: int = 0
    """Parameters of routed experts, a part of ``feed_forward``."""


@dataclass(frozen=True)
class Model:
    """A language model: shapes only, no weights."""

    family: str
    layers: tuple[Layer, ...]
    embedding: int
    """Parameters of the input embedding, and of the output one where it is not the same."""
    max_tokens: int
    """The longest sequence that the model was made for, in tokens."""
    numerics: Numerics
    weight_bytes_each: float
    """Bytes of one parameter in the checkpoint."""
    expert_bytes_each: float
    """Bytes of one parameter of a routed expert in the checkpoint."""
    draft_layers: tuple[Layer, ...] = ()
    """Of the head that drafts tokens (MTP); they count only where it is used."""

    @property
    def parameters(self) -> int:
        """All weights but norms and biases, which are under 0.1%; no vision tower, no draft layers."""
        return self.embedding + sum(_parameters(layer) for layer in self.layers)

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

    def weight_bytes(self, tp: int = 1, pp: int = 1) -> int:
        """Estimate of the weights on the fullest device, in bytes.

        Parameters of its pipeline stage over ``tp``, times bytes each: of the checkpoint's type, with
        routed experts in their own where they are quantized. The first stage holds the input embedding, the
        last one the output's.
        """
        bounds = stage_bounds(len(self.layers), pp)
        stages = [0.0] * pp
        for stage, (first, end) in enumerate(bounds):
            for layer in self.layers[first:end]:
                plain = _parameters(layer) - layer.experts
                stages[stage] += plain * self.weight_bytes_each + layer.experts * self.expert_bytes_each
        each = self.embedding * self.numerics.model_bytes / (1 if pp == 1 else 2)
        stages[0] += each
        if pp > 1:
            stages[-1] += each
        return int(max(stages) / tp)


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


def _parameters(layer: Layer) -> int:
    return layer.feed_forward + sum(mixer.parameters for mixer in layer.mixers.values())

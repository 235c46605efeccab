"""What mixes tokens in a layer: its cache, and its weights.

Every mixer gives the layer cache of `tidepool.cache` on one device, and its weights by name. State
shapes follow vLLM 0.32's state shape calculator; a test compares them with vLLM's own model classes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from tidepool.cache.spec import FullAttention, LayerCache, SlidingWindow, State
from tidepool.cache.state_format import StateFormat, packed_page_bytes
from tidepool.models.config import ModelConfigError
from tidepool.models.dtypes import head_bytes, latent_bytes, state_bytes
from tidepool.models.weights import Linear


@dataclass(frozen=True)
class CacheOptions:
    """How a deployment keeps its caches."""

    kv_dtype: str = "auto"
    """Of attention; ``auto`` is the model's own type."""
    state_dtype: str = "auto"
    """Of the recurrent part of a state; ``auto`` is what vLLM 0.32 chooses for the model."""
    tp: int = 1
    """Tensor parallel size."""
    copies: int = 1
    """States that a running request holds in every state layer."""
    speculative_tokens: int = 0
    """Draft tokens of a step: convolution states get as many columns more."""
    layer_kv_dtypes: tuple[tuple[int | str, str], ...] = ()
    """``kv_dtype`` of single layers, by number, or of all with a sliding window by `WINDOWS`; the last word counts."""
    mtp: bool = False
    """Whether the model's own draft layers (MTP) are used, and keep a cache too."""
    step_tokens: int = 1
    """Tokens that may be under way at once, which layers with a window hold beside it."""
    checkpoint_states: StateFormat = "same"
    """In which format tidepool keeps states that are only cached, if any are."""


WINDOWS = "sliding_window"
"""Names all layers with a sliding window, as in vLLM's ``kv_cache_dtype_skip_layers``."""


@dataclass(frozen=True)
class Numerics:
    """Number types of a model."""

    model_bytes: int
    """Bytes of one number of weights and activations."""
    state_dtype: str
    """What ``state_dtype="auto"`` means."""


class Mixer(Protocol):
    """A token mixer of one layer."""

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Its matrices, which a checkpoint may quantize, by name; on all devices together."""

    @property
    def other(self) -> int:
        """All its other weights: convolutions, numbers a head, norms."""

    def cache(self, options: CacheOptions, numerics: Numerics) -> LayerCache:
        """What it keeps on one device."""


@dataclass(frozen=True)
class Attention:
    """Attention that keeps a key and a value for every token, or for those in ``window``."""

    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    window: int | None = None
    gated: bool = False
    """Whether queries come with an output gate of their size."""
    module: str = "self_attn"
    other: int = 0

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Projections of queries (and gates), keys, values and output."""
        queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        return (
            Linear(f"{self.module}.q_proj", self.hidden, (2 if self.gated else 1) * queries),
            Linear(f"{self.module}.k_proj", self.hidden, keys),
            Linear(f"{self.module}.v_proj", self.hidden, keys),
            Linear(f"{self.module}.o_proj", queries, self.hidden),
        )

    def cache(self, options: CacheOptions, numerics: Numerics) -> LayerCache:
        """Bytes per token: KV heads of the device (one at least, then replicated) times bytes per head."""
        _share(self.heads, options.tp, "attention heads")
        if self.kv_heads % options.tp and options.tp % self.kv_heads:
            raise ModelConfigError(
                f"{self.kv_heads} heads of keys and values neither divide among {options.tp} devices nor these among "
                "them: choose another --tp."
            )
        kv_heads = max(1, self.kv_heads // options.tp)
        per_token = kv_heads * head_bytes(options.kv_dtype, self.head_size, self.head_size, numerics.model_bytes)
        if self.window is None:
            return FullAttention(per_token)
        return SlidingWindow(per_token, self.window, options.step_tokens)


@dataclass(frozen=True)
class LatentAttention:
    """Latent attention (MLA): one compressed vector for every token, whole on every device."""

    hidden: int
    heads: int
    latent: int
    rope: int
    nope: int
    value: int
    query_latent: int | None = None
    gated: bool = False
    """Whether the output is gated, by a projection of its size."""
    other: int = 0

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Down and up projections of the latent, queries (directly or over a latent), gate and output."""
        queries, down, values = self.heads * (self.nope + self.rope), self.query_latent, self.heads * self.value
        query: tuple[Linear, ...] = (Linear("self_attn.q_proj", self.hidden, queries),)
        if down is not None:
            query = (
                Linear("self_attn.q_a_proj", self.hidden, down, whole=True),
                Linear("self_attn.q_b_proj", down, queries),
            )
        return (
            *query,
            Linear("self_attn.kv_a_proj_with_mqa", self.hidden, self.latent + self.rope, whole=True),
            Linear("self_attn.kv_b_proj", self.latent, self.heads * (self.nope + self.value)),
            *((Linear("self_attn.g_proj", self.hidden, values),) if self.gated else ()),
            Linear("self_attn.o_proj", values, self.hidden),
        )

    def cache(self, options: CacheOptions, numerics: Numerics) -> LayerCache:
        """Bytes per token: the latent and the rotary part."""
        _share(self.heads, options.tp, "attention heads")
        return FullAttention(latent_bytes(options.kv_dtype, self.latent + self.rope, numerics.model_bytes))


@dataclass(frozen=True)
class PooledIndexer:
    """The index of a sparse attention layer: one fp8 key and its fp32 scale for every ``pool`` tokens."""

    hidden: int
    heads: int
    head_size: int
    query_latent: int
    pool: int

    other: int = 0

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Projections of queries, keys, head weights and the pool's gate."""
        return (
            Linear("self_attn.indexer.wq_b", self.query_latent, self.heads * self.head_size, whole=True),
            Linear("self_attn.indexer.wk", self.hidden, 2 * self.head_size, whole=True),
            Linear("self_attn.indexer.weights_proj", self.hidden, self.heads, whole=True),
        )

    def cache(self, options: CacheOptions, numerics: Numerics) -> LayerCache:
        """Bytes per token, rounded up to whole bytes."""
        return FullAttention(-(-(self.head_size + 4) // self.pool))


@dataclass(frozen=True)
class IndexerTail:
    """Keys and gates of the pool that is still filling, in bfloat16: one ring for every request."""

    head_size: int
    pool: int
    linears: tuple[Linear, ...] = ()
    other: int = 0

    def cache(self, options: CacheOptions, numerics: Numerics) -> LayerCache:
        """A ring of one pool, or as many (a power of two) as the draft tokens of a step may touch."""
        pools = -(-(self.pool + options.speculative_tokens) // self.pool)
        ring = self.pool * (1 << (pools - 1).bit_length())
        return State(ring * 2 * self.head_size * 2)


@dataclass(frozen=True)
class GatedDelta:
    """Gated DeltaNet: a convolution over keys, queries and values, and a matrix for every value head."""

    hidden: int
    key_heads: int
    value_heads: int
    key_size: int
    value_size: int
    kernel: int
    split: bool = True
    """Whether a checkpoint names the parts of the input projection one by one, as Qwen3.5's do."""

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Input projections (queries, keys, values, gate, two numbers a head) and output."""
        keys, values = self.key_heads * self.key_size, self.value_heads * self.value_size
        inputs = {"qkvz": 2 * keys + 2 * values, "ba": 2 * self.value_heads}
        if self.split:
            inputs = {"qkv": 2 * keys + values, "z": values, "b": self.value_heads, "a": self.value_heads}
        return (
            *(Linear(f"linear_attn.in_proj_{name}", self.hidden, size) for name, size in inputs.items()),
            Linear("linear_attn.out_proj", values, self.hidden),
        )

    @property
    def other(self) -> int:
        """The convolution."""
        return (2 * self.key_heads * self.key_size + self.value_heads * self.value_size) * self.kernel

    def cache(self, options: CacheOptions, numerics: Numerics) -> LayerCache:
        """``(kernel - 1) x channels`` in the model's type, ``value heads x value x key`` in the state's."""
        channels = 2 * self.key_heads * self.key_size + self.value_heads * self.value_size
        rows = _share(self.value_heads, options.tp, "value heads") * self.value_size
        return _state(options, numerics, channels, self.kernel, rows, self.key_size)


@dataclass(frozen=True)
class KimiDelta:
    """Kimi Delta Attention: Gated DeltaNet with a gate for every channel; as many key as value heads."""

    hidden: int
    heads: int
    head_size: int
    kernel: int
    full_gate: bool = False
    """Whether the output gate is one full projection and not two of low rank."""

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Queries, keys, values, output, low-rank gates, one number a head."""
        inner = self.heads * self.head_size
        gate: tuple[Linear, ...] = (
            Linear("self_attn.g_a_proj", self.hidden, self.head_size, whole=True),
            Linear("self_attn.g_b_proj", self.head_size, inner),
        )
        if self.full_gate:
            gate = (Linear("self_attn.g_proj", self.hidden, inner),)
        return (
            *(Linear(f"self_attn.{name}_proj", self.hidden, inner) for name in "qkv"),
            Linear("self_attn.f_a_proj", self.hidden, self.head_size, whole=True),
            Linear("self_attn.f_b_proj", self.head_size, inner),
            *gate,
            Linear("self_attn.b_proj", self.hidden, self.heads),
            Linear("self_attn.o_proj", inner, self.hidden),
        )

    @property
    def other(self) -> int:
        """The convolution."""
        return 3 * self.heads * self.head_size * self.kernel

    def cache(self, options: CacheOptions, numerics: Numerics) -> LayerCache:
        """``(kernel - 1) x channels`` in the model's type and ``heads x size x size`` in the state's."""
        rows = _share(self.heads, options.tp, "heads") * self.head_size
        return _state(options, numerics, 3 * self.heads * self.head_size, self.kernel, rows, self.head_size)


@dataclass(frozen=True)
class Mamba2:
    """Mamba2: a convolution over inputs, B and C, and a matrix for every head."""

    hidden: int
    heads: int
    head_size: int
    groups: int
    state_size: int
    kernel: int
    module: str = "mamba"

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Input projection (gate, inputs, B, C, one number a head) and output."""
        inner = self.heads * self.head_size
        return (
            Linear(f"{self.module}.in_proj", self.hidden, inner + self._channels + self.heads),
            Linear(f"{self.module}.out_proj", inner, self.hidden),
        )

    @property
    def other(self) -> int:
        """Convolution with bias, norm, three numbers a head."""
        return self._channels * (self.kernel + 1) + self.heads * self.head_size + 3 * self.heads

    @property
    def _channels(self) -> int:
        return self.heads * self.head_size + 2 * self.groups * self.state_size

    def cache(self, options: CacheOptions, numerics: Numerics) -> LayerCache:
        """``(kernel - 1) x channels`` in the model's type and ``heads x size x state`` in the state's.

        Groups that don't divide among the devices are replicated until they do.
        """
        groups = self.groups if self.groups % options.tp == 0 else options.tp
        channels = self.heads * self.head_size + 2 * groups * self.state_size
        rows = _share(self.heads, options.tp, "heads") * self.head_size
        if options.copies > 1 + options.speculative_tokens:
            # With prefix caching vLLM's Mamba2 layers export a checkpoint from within a step, to a block of its own.
            options = replace(options, copies=options.copies + 1)
        return _state(options, numerics, channels, self.kernel, rows, self.state_size)


@dataclass(frozen=True)
class Mamba1:
    """Mamba: a convolution over the inputs, and ``state_size`` numbers for every channel."""

    hidden: int
    inner: int
    state_size: int
    kernel: int
    step_rank: int

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Input and gate, step sizes with B and C, output."""
        return (
            Linear("mamba.in_proj", self.hidden, 2 * self.inner),
            Linear("mamba.x_proj", self.inner, self.step_rank + 2 * self.state_size),
            Linear("mamba.dt_proj", self.step_rank, self.inner),
            Linear("mamba.out_proj", self.inner, self.hidden),
        )

    @property
    def other(self) -> int:
        """Convolution with bias, A, D, the bias of step sizes."""
        return self.inner * (self.kernel + 1 + self.state_size + 1 + 1)

    def cache(self, options: CacheOptions, numerics: Numerics) -> LayerCache:
        """``(kernel - 1) x channels`` in the model's type and ``channels x state`` in the state's."""
        rows = _share(self.inner, options.tp, "channels")
        return _state(replace(options, speculative_tokens=0), numerics, self.inner, self.kernel, rows, self.state_size)


@dataclass(frozen=True)
class ShortConvolution:
    """A gated short convolution: its state is the last ``kernel - 1`` inputs, in the model's type."""

    hidden: int
    channels: int
    kernel: int

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Two gates and the input, output."""
        return (
            Linear("conv.in_proj", self.hidden, 3 * self.channels),
            Linear("conv.out_proj", self.channels, self.hidden),
        )

    @property
    def other(self) -> int:
        """The convolution."""
        return self.channels * self.kernel

    def cache(self, options: CacheOptions, numerics: Numerics) -> LayerCache:
        """``(kernel - 1) x channels``."""
        plain = CacheOptions(tp=options.tp, copies=options.copies)
        return _state(plain, numerics, self.channels, self.kernel, 0, 0)


def _state(options: CacheOptions, numerics: Numerics, channels: int, kernel: int, rows: int, numbers: int) -> State:
    """A convolution of ``channels`` on all devices, and ``rows`` of ``numbers`` of recurrent state on this one."""
    columns = kernel - 1 + options.speculative_tokens
    convolution = columns * _share(channels, options.tp, "convolution channels") * numerics.model_bytes
    each = state_bytes(options.state_dtype, numerics.state_dtype)
    packed = packed_page_bytes(
        options.checkpoint_states, rest=convolution, rows=rows, numbers=numbers, number_bytes=each
    )
    return State(convolution + rows * numbers * each, options.copies, packed)


def _share(count: int, tp: int, what: str) -> int:
    if count % tp:
        raise ModelConfigError(f"{count} {what} don't divide among {tp} devices: choose another --tp.")
    return count // tp

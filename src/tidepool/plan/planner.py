"""The plan: one model on one kind of device, its memory divided in three ways."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from tidepool.cache import (
    CacheConfigError,
    FullAttention,
    Group,
    LayerCache,
    PackedState,
    State,
    StateFormat,
    block_align,
    group_layers,
    packed_groups,
)
from tidepool.capacity.memory import ElasticMemory, Memory, StockMemory
from tidepool.capacity.predict import predict_stages
from tidepool.command_line import UsageError
from tidepool.models import COMPARED_KV_DTYPES, CacheOptions, Model, ModelConfigError
from tidepool.plan import served
from tidepool.plan.account import Account, Requests, account, admit
from tidepool.plan.inputs import Card
from tidepool.plan.stock import VLLM_VERSIONS, export_tokens, graph_refusal, startup_lines, stock_memory
from tidepool.sides import TITLES, Side

SHORT_REQUEST = 12
"""Tokens of the request whose cost a plan names."""
REQUEST_COUNTS = (1, 8, 64)
"""Running requests beside which a plan counts tokens, besides the most that may run."""
DTYPE_REQUESTS = 8
"""Running requests beside which KV cache types are compared."""
CURVE_POINTS = 24
"""Points of capacity against number of requests."""


@dataclass(frozen=True)
class PlanOptions:
    """How the model is served."""

    kv_bytes: int
    """KV memory of one device."""
    block_tokens: int = 16
    prefix_caching: bool = True
    """As vLLM has it for hybrid models; without attention it is off."""
    kv_dtype: str = "auto"
    layer_kv_dtypes: tuple[tuple[int | str, str], ...] = ()
    """Of single layers, see `CacheOptions`."""
    state_dtype: str = "auto"
    tp: int = 1
    pp: int = 1
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2_048
    max_model_len: int | None = None
    speculative_tokens: int = 0
    mtp: bool = False
    """Whether the model's own head drafts them."""
    contexts: tuple[int, ...] = (1_000, 8_000, 32_000, 128_000)
    mix: tuple[Requests, ...] = (Requests(32, 2_100), Requests(2, 33_000))
    vllm_version: str = VLLM_VERSIONS[0]
    """Series of the vLLM that stock is."""
    enforce_eager: bool = False
    """Whether there are no CUDA graphs."""
    checkpoint_states: StateFormat = "same"
    """In which format the elastic partition keeps states that are only cached."""
    host_bytes: int = 0
    """Host memory behind the pools, of all ranks together; 0 for none."""

    def __post_init__(self) -> None:
        for name in ("kv_bytes", "block_tokens", "tp", "pp", "max_num_seqs", "max_num_batched_tokens"):
            if getattr(self, name) <= 0:
                option = {"block_tokens": "block-size"}.get(name, name.replace("_", "-"))
                raise UsageError(f"{option} must be positive, not {getattr(self, name):,}.")
        if len(str(self.speculative_tokens)) > 5:
            raise UsageError(f"No drafter makes {self.speculative_tokens:,} tokens in a step.")
        if self.max_model_len is not None and self.max_model_len <= 0:
            raise UsageError(f"max-model-len must be positive, not {self.max_model_len:,}.")
        if self.speculative_tokens < 0:
            raise UsageError(f"The number of speculative tokens can't be negative ({self.speculative_tokens}).")
        if self.vllm_version not in VLLM_VERSIONS:
            raise UsageError(f"vllm-version is {' or '.join(VLLM_VERSIONS)}, not {self.vllm_version!r}.")
        if self.host_bytes and not self.prefix_caching:
            raise UsageError("Host memory is for the prefix cache: leave out --no-prefix-caching or --host-memory.")
        if self.mtp and not self.speculative_tokens:
            raise UsageError("Say with --speculative-tokens how many tokens --mtp drafts in a step.")

    @property
    def in_flight_tokens(self) -> int:
        """Tokens that may be under way at once: vLLM plans the next step while one runs, on every pipeline stage."""
        return (self.pp + 1) * self.max_num_batched_tokens

    def cache_options(self, kv_dtype: str | None = None) -> CacheOptions:
        """What the layers need to know.

        States are those that a request may hold at once, which is what vLLM and tidepool reckon with at start: one, one
        more with prefix caching, one per draft token.
        """
        return CacheOptions(
            kv_dtype=kv_dtype or self.kv_dtype,
            state_dtype=self.state_dtype,
            tp=self.tp,
            copies=1 + int(self.prefix_caching) + self.speculative_tokens,
            speculative_tokens=self.speculative_tokens,
            layer_kv_dtypes=self.layer_kv_dtypes,
            mtp=self.mtp,
            step_tokens=self.in_flight_tokens,
            checkpoint_states=self.checkpoint_states if self.prefix_caching else "same",
        )


@dataclass(frozen=True)
class Column:
    """Answers for one way of dividing the memory."""

    memory: Memory
    tokens: dict[int, int | None]
    """Running requests to the most tokens that they hold; 0: they don't fit; None: tokens take no memory."""
    concurrency: dict[int, int]
    """Tokens of a request to how many run at once."""
    max_requests: int
    """How many of the shortest requests run at once, each with all the states that it may hold."""
    max_decoding: int
    """How many of them run while each holds its running state alone, as prompts too short for a checkpoint do."""
    pinned_by_short: int
    """Bytes of the blocks that a request of `SHORT_REQUEST` tokens holds."""
    longest: int
    """Tokens of the longest request that fits, at most the longest that the model was made for."""
    admitted: list[Requests]
    """Requests of the mix that run at once."""
    account: Account
    """Where the bytes go while they do."""
    curve: list[tuple[int, int]]
    """Running requests and tokens that they hold."""
    cached_states: int | None = None
    """States that the prefix cache holds at most, where it holds nothing else; None without prefix caching."""


@dataclass(frozen=True)
class DtypeRow:
    """Tokens beside the same number of requests for one KV cache type."""

    kv_dtype: str
    also: tuple[str, ...]
    """Types of the same size."""
    token_bytes: int
    """Bytes of one token in all attention layers."""
    tokens: dict[Side, int]


@dataclass(frozen=True)
class HostPlan:
    """What host memory holds, which tidepool cuts into extents like the device's."""

    rank_bytes: int
    """Of one rank."""
    extents: int
    """The null extent included."""
    prompts: dict[int, int]
    """Tokens of a prompt to how many such prompts are held at most, each with one state at its end."""


@dataclass(frozen=True)
class CapacityPlan:
    """All answers about one model."""

    model_name: str
    source: str
    family: str
    parameters: int
    options: PlanOptions
    max_model_len: int
    card: Card | None
    fallbacks: list[str] = field(default_factory=list)
    """Why tidepool would leave an engine like this to vLLM; none where it serves it."""
    startup: list[str] = field(default_factory=list)
    """What stock vLLM says of its KV cache when it starts."""
    refusal: str = ""
    """Why stock vLLM doesn't start on a GPU; empty where it does."""
    beyond: list[int] = field(default_factory=list)
    """Tokens of requests that were asked for and are longer than the longest request."""
    model_tokens: int = 0
    """The longest sequence that the model was made for."""
    columns: dict[Side, Column] = field(default_factory=dict)
    missing: dict[Side, str] = field(default_factory=dict)
    """Why a way of dividing the memory has no column."""
    host: HostPlan | None = None
    """Host memory behind tidepool's pools, if there is any."""
    dtypes: list[DtypeRow] = field(default_factory=list)
    dtype_requests: int = DTYPE_REQUESTS
    """Running requests beside which `dtypes` counts tokens."""

    def starts(self, kind: Side) -> bool:
        """Whether an engine of this column starts as it is planned, on tidepool's memory where it is tidepool's."""
        return not (self.refusal and self.card) if kind == "stock" else not self.fallbacks


def make_plan(
    model_name: str, source: str, model: Model, options: PlanOptions, card: Card | None = None
) -> CapacityPlan:
    """Answer everything about one model.

    Raises:
        UsageError: not one request fits the memory.
        ModelConfigError: the model can't be cut or its cache not be typed as asked.
        CacheConfigError: the cache can't be laid out.
    """
    max_model_len = options.max_model_len or model.max_tokens
    if options.kv_dtype == "auto" and model.quantization.kv_dtype:
        options = replace(options, kv_dtype=model.quantization.kv_dtype)
    if not model.has_attention:
        options = replace(options, prefix_caching=False)
    beside = min(DTYPE_REQUESTS, options.max_num_seqs)
    stages = model.stages(options.pp, options.cache_options())
    columns: dict[Side, Column] = {}
    missing: dict[Side, str] = {}
    for kind in TITLES:
        try:
            if kind == "stock" and (lacking := served.stock_lacks(_formats(options))):
                raise CacheConfigError(lacking)
            memory = divide(kind, model, stages, options, max_model_len)
        except CacheConfigError as error:
            if kind == "elastic":
                raise UsageError(str(error)) from error
            missing[kind] = str(error)
            continue
        columns[kind] = _column(memory, options)
    stock = columns["stock"].memory if "stock" in columns else None
    assert stock is None or isinstance(stock, StockMemory)
    return CapacityPlan(
        model_name=model_name,
        source=source,
        family=model.family,
        parameters=model.parameters,
        options=options,
        max_model_len=max_model_len,
        card=card,
        fallbacks=_fallbacks(model, options, card),
        startup=startup_lines(stock, options.in_flight_tokens) if stock else [],
        refusal=graph_refusal(stock) if stock and not options.enforce_eager else "",
        beyond=sorted({length for length in _lengths(options) if length > max_model_len}),
        model_tokens=model.max_tokens,
        columns=columns,
        missing=missing,
        host=_host(columns["elastic"].memory, options) if options.host_bytes else None,
        dtypes=[] if options.layer_kv_dtypes else _dtypes(model, options, max_model_len, beside),
        dtype_requests=beside,
    )


def _formats(options: PlanOptions) -> list[str]:
    """KV cache dtypes, the general one first."""
    return [options.kv_dtype, *dict.fromkeys(dtype for _, dtype in options.layer_kv_dtypes)]


def _lengths(options: PlanOptions) -> list[int]:
    return [*options.contexts, *(item.tokens for item in options.mix)]


def _fallbacks(model: Model, options: PlanOptions, card: Card | None) -> list[str]:
    return served.reasons(
        gpu=card is not None,
        hybrid=model.hybrid,
        latent=model.latent,
        formats=_formats(options),
        prefix_caching=options.prefix_caching,
        drafts=options.speculative_tokens > 0,
        own_head=options.mtp,
        family=model.model_type,
        tp=options.tp,
        pp=options.pp,
    )


def divide(
    kind: Side,
    model: Model,
    stages: Sequence[Mapping[str, LayerCache]],
    options: PlanOptions,
    max_model_len: int,
) -> Memory:
    """Divide the memory one way.

    Raises:
        CacheConfigError: not one request fits.
    """
    if kind == "stock":
        memory = stock_memory(
            stages,
            options.kv_bytes,
            options.max_num_seqs,
            max_model_len,
            block_tokens=options.block_tokens,
            latent=model.latent,
            token_bytes=_token_bytes(model, options) if options.layer_kv_dtypes else None,
            export_tokens=export_tokens(model.family, options.vllm_version, options.prefix_caching),
        )
        if not memory.holds([(1, 1)]):
            need = (1 + sum(memory.needs([(1, 1)]))) * memory.block_bytes
            raise CacheConfigError(f"One request needs {need:,} bytes: a block for every group and the null block.")
        return memory
    groups = [plan_groups(stage, options.block_tokens) for stage in stages]
    if kind == "elastic":
        groups = [(*stage, *packed_groups(stage)) for stage in groups]
    return predict_stages(groups, options.kv_bytes, kind, options.max_num_seqs, max_model_len)


def _token_bytes(model: Model, options: PlanOptions) -> int:
    """What vLLM takes a token to keep in an attention layer: it knows one dtype when it inflates the block."""
    caches = model.layer_caches(replace(options.cache_options(), layer_kv_dtypes=())).values()
    return max((cache.bytes_per_token for cache in caches if isinstance(cache, FullAttention)), default=0)


def plan_groups(layers: Mapping[str, LayerCache], block_tokens: int) -> tuple[Group, ...]:
    """One group for each layer cache, its blocks aligned as the plugin aligns them."""
    groups = group_layers(layers, block_tokens)
    return tuple(replace(group, align=block_align(group.page_bytes)) for group in groups)


def _column(memory: Memory, options: PlanOptions) -> Column:
    most = memory.requests_of(1)
    counts = [count for count in REQUEST_COUNTS if count < options.max_num_seqs] + [options.max_num_seqs]
    admitted = admit(memory, options.mix)
    longest = memory.tokens_with(1)
    return Column(
        memory=memory,
        tokens={count: memory.tokens_with(count) for count in counts},
        concurrency={
            tokens: memory.requests_of(tokens) for tokens in options.contexts if tokens <= memory.max_model_len
        },
        max_requests=most,
        max_decoding=_decoding(memory, options).requests_of(1),
        pinned_by_short=memory.pinned_by(SHORT_REQUEST),
        longest=memory.max_model_len if longest is None else min(longest, memory.max_model_len),
        admitted=admitted,
        account=account(memory, admitted, options.block_tokens),
        curve=[(count, memory.tokens_with(count) or 0) for count in _curve_counts(options.max_num_seqs)],
        cached_states=_cached_states(memory) if options.prefix_caching else None,
    )


def _cached_states(memory: Memory) -> int | None:
    """States of all layers that fit, if nothing else is there; None in a model without."""
    prompts = [group for group in _of_prompts(memory).groups if isinstance(group.cache, State)]
    if isinstance(memory, StockMemory):
        return (memory.pool_blocks - 1) // len(prompts) if prompts else None
    return min((group.blocks for group in prompts), default=None)


def _decoding(memory: Memory, options: PlanOptions) -> Memory:
    """The same memory, of requests that hold no state for the prefix cache."""
    return _with_states(memory, 1 + options.speculative_tokens)


def _with_states(memory: Memory, copies: int) -> Memory:
    """The same memory, of requests that hold at most so many states."""
    groups = (
        replace(group, cache=replace(group.cache, copies=min(copies, group.cache.copies)))
        if isinstance(group.cache, State)
        else group
        for group in memory.groups
    )
    return replace(memory, groups=tuple(groups))


def _of_prompts(memory: Memory) -> Memory:
    """The same memory, of prompts that are only cached: one state each, packed if states are."""
    packs = any(isinstance(group.cache, PackedState) for group in memory.groups)
    caches = (
        State(group.cache.bytes)
        if isinstance(group.cache, PackedState)
        else PackedState(group.cache.bytes)
        if packs and isinstance(group.cache, State) and group.cache.packed_bytes
        else group.cache
        for group in memory.groups
    )
    groups = tuple(replace(group, cache=cache) for group, cache in zip(memory.groups, caches, strict=True))
    return _with_states(replace(memory, groups=groups), 1)


def _host(device: Memory, options: PlanOptions) -> HostPlan:
    """What host memory holds: extents as large as the device's, and of each prompt its attention and one state.

    Raises:
        UsageError: not one prompt.
    """
    host = _of_prompts(device)
    assert isinstance(host, ElasticMemory)
    rank_bytes = options.host_bytes // (options.tp * options.pp)
    extents = rank_bytes // host.extent_bytes
    most = max(1, extents * max(host.blocks_per_extent))
    host = replace(host, budget_bytes=rank_bytes, extents=extents, max_num_seqs=most)
    if not host.holds([(1, 1)]):
        raise UsageError(
            f"host-memory is too small: {rank_bytes:,} bytes of a rank are {extents:,} extents of "
            f"{host.extent_bytes:,} bytes, one of them null, and one prompt takes more than the others."
        )
    lengths = [tokens for tokens in options.contexts if tokens <= host.max_model_len]
    return HostPlan(rank_bytes, extents, {tokens: host.requests_of(tokens) for tokens in lengths})


def _curve_counts(last: int) -> list[int]:
    """Numbers of requests from 1 to ``last``, evenly spaced by ratio."""
    steps = min(CURVE_POINTS, last) - 1
    return sorted({round(last ** (step / steps)) for step in range(steps + 1)}) if steps else [1]


def _dtypes(model: Model, options: PlanOptions, max_model_len: int, requests: int) -> list[DtypeRow]:
    """The same question for every KV cache type that the attention can have; one row for each size."""
    rows: dict[int, DtypeRow] = {}
    for kv_dtype in COMPARED_KV_DTYPES:
        if kv_dtype == "auto" and model.quantization.kv_dtype:
            continue
        try:
            stages = model.stages(options.pp, options.cache_options(kv_dtype))
        except ModelConfigError:
            continue
        memories: dict[Side, Memory] = {}
        for kind in TITLES:
            if kind == "stock" and served.stock_lacks([kv_dtype]):
                continue
            try:
                memories[kind] = divide(kind, model, stages, options, max_model_len)
            except CacheConfigError:
                continue
        token_bytes = sum(group.token_bytes for group in memories["elastic"].groups) if "elastic" in memories else 0
        if token_bytes in rows:
            rows[token_bytes] = replace(rows[token_bytes], also=(*rows[token_bytes].also, kv_dtype))
        elif token_bytes:
            tokens = {kind: memory.tokens_with(requests) or 0 for kind, memory in memories.items()}
            rows[token_bytes] = DtypeRow(kv_dtype, (), token_bytes, tokens)
    return list(rows.values())

"""What one mode of a replay is asked to do, and what it reports: plain data that crosses the process border as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from tidepool import sides
from tidepool.cache import StateFormat
from tidepool.command_line import UsageError
from tidepool.models import CacheOptions
from tidepool.sides import Side
from tidepool.vllm_plugin.settings import Eviction, QueueOrder

Mode = Literal["stock", "fixed", "elastic", "bound"]
"""``bound`` is stock vLLM with a model of the same attention and no states."""
MODES: tuple[Mode, ...] = get_args(Mode)

GPU_KERNEL_BLOCK = 16
"""Tokens; the smallest block of vLLM's GPU attention kernels."""

TITLES: dict[Mode, str] = {mode: "attention only" if mode == "bound" else sides.TITLES[mode] for mode in MODES}
"""How modes are called in tables."""


@dataclass(frozen=True)
class Job:
    """One mode over one workload."""

    mode: Mode
    config: dict[str, Any]
    """HF-style configuration of the model."""
    gpu: str
    """Whose roofline the clock follows."""
    kv_bytes: int
    trace: str | None
    """A file to read, or None for a generated workload."""
    workload: str | None
    """A workload to generate, or None for a trace."""
    requests: int | None
    """How many of them; None for all."""
    seed: int
    rate: float
    """Arrivals come so many times as fast as recorded."""
    max_num_seqs: int
    max_num_batched_tokens: int
    eviction: Eviction = "returns"
    """What tidepool evicts by."""
    queue: QueueOrder = "fcfs"
    """Who goes first with tidepool of requests that wait."""
    checkpoint_states: StateFormat = "same"
    """In which format tidepool's elastic partition keeps states that are only cached."""
    block_size: int = GPU_KERNEL_BLOCK
    """Tokens of an attention block; stock vLLM with states enlarges it."""
    layer_kv_dtypes: tuple[tuple[int | str, str], ...] = ()
    """How single attention layers keep their tokens, see `tidepool.models.CacheOptions`."""
    host_bytes: int = 0
    """Host memory behind the device's; the bound has none."""
    host_bandwidth: float = 50e9
    """Bytes a second between the two, in each direction."""
    drop_reasoning: float = 0.0
    """Share of the answers that come back in no prompt, of those that would."""
    max_model_len: int | None = None
    """Tokens of the longest request that is served; None for the workload's longest."""
    tp: int = 1
    """Tensor parallel size; the memory is that of one device."""
    kv_dtype: str = "auto"
    """How all attention layers keep their tokens, see `tidepool.models.CacheOptions`."""
    prefix_caching: bool = True
    draft_tokens: int = 0
    """Tokens drafted in a step for each request."""
    acceptance: float = 0.0
    """How likely it is of a draft token to be accepted where those before it were, 0 to 1."""
    tokenizer: str | None = None
    """Model directory or ``tokenizer.json`` for a trace of text; None where words stand for tokens."""

    def __post_init__(self) -> None:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise UsageError(
                f"--max-num-batched-tokens ({self.max_num_batched_tokens:,}) must be at least --max-num-seqs "
                f"({self.max_num_seqs:,}): vLLM gives every running request a token."
            )
        if not 0 <= self.drop_reasoning <= 1:
            raise UsageError(f"--drop-reasoning must be from 0 to 1, not {self.drop_reasoning:g}.")
        if not 0 <= self.draft_tokens <= 1_000:
            raise UsageError(f"--speculative-tokens must be from 0 to 1,000, not {self.draft_tokens:,}.")
        if not 0 <= self.acceptance <= 1:
            raise UsageError(f"--acceptance must be from 0 to 1, not {self.acceptance:g}.")
        if self.host_bytes and not self.prefix_caching:
            raise UsageError("Host memory is for the prefix cache: leave out --no-prefix-caching or --host-memory.")

    @property
    def side(self) -> Side:
        """Whose memory it runs on."""
        return "stock" if self.mode == "bound" else self.mode

    def cache_options(self) -> CacheOptions:
        """How its layers keep their tokens, on one device."""
        return CacheOptions(
            kv_dtype=self.kv_dtype,
            layer_kv_dtypes=self.layer_kv_dtypes,
            tp=self.tp,
            speculative_tokens=self.draft_tokens,
        )

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Job:
        """What JSON made of its fields."""
        return cls(**content | {"layer_kv_dtypes": tuple(map(tuple, content["layer_kv_dtypes"]))})


USES = ("states", "attention", "cached_states", "cached_attention", "padding", "idle")
"""Uses of the KV memory, in the order in which a `Sample` gives their bytes; they add up to the budget."""


@dataclass(frozen=True)
class Sample:
    """One look at the engine."""

    seconds: float
    """Of virtual time."""
    running: int
    waiting: int
    hit_tokens: int
    """So far."""
    prompt_tokens: int
    """Of requests scheduled so far."""
    uses: tuple[int, ...]
    """Bytes by use, see `USES`."""


@dataclass(frozen=True)
class GroupLayout:
    """A KV cache group as the engine planned it."""

    kind: Literal["state", "attention", "packed state"]
    layers: int
    block_tokens: int
    block_bytes: int
    """What one block takes of the memory."""
    natural_bytes: int
    """What it would without padding."""


@dataclass(frozen=True)
class HostFigures:
    """What went to host memory and came back."""

    loaded_bytes: int
    stored_bytes: int
    stalled: float
    """Seconds that steps waited for copies to the host, before blocks were reused."""
    loaded_tokens: int
    """Hit tokens that had to be loaded."""
    waited: float
    """Seconds that requests waited for loads, all together."""


@dataclass(frozen=True)
class Spread:
    """Mean and percentiles of seconds."""

    mean: float
    p50: float
    p95: float
    p99: float


@dataclass(frozen=True)
class Result:
    """What one mode measured. Seconds are of virtual time unless said otherwise."""

    mode: Mode
    requests: int
    prompt_tokens: int
    hit_tokens: int
    """Prompt tokens found in the prefix cache when a request was first scheduled; later resumptions don't count."""
    output_tokens: int
    ttft: Spread
    """From arrival to the first token."""
    tpot: Spread | None
    """From one token of an answer to the next, a mean for each request; None if all answers have one token."""
    e2e: Spread
    """From arrival to the last token."""
    makespan: float
    """From the first arrival to the last token."""
    preemptions: int
    running_mean: float
    """Over virtual time."""
    running_peak: int
    extents_moved: int | None
    """Extents that changed hands; None where there are no extents."""
    extents: int | None
    extent_bytes: int | None
    steps: int
    scheduler_mean: float
    """Processor seconds of a step."""
    scheduler_median: float
    """Processor seconds of a step."""
    wall_seconds: float
    """Real seconds that the replay took, without starting the engine."""
    block_tokens: int
    """Tokens of an attention block."""
    groups: list[GroupLayout] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    host: HostFigures | None = None

    @property
    def hit_rate(self) -> float:
        """Hit tokens of all prompt tokens, 0 to 1."""
        return self.hit_tokens / self.prompt_tokens

    @property
    def output_rate(self) -> float:
        """Generated tokens a second."""
        return self.output_tokens / self.makespan

    @property
    def request_rate(self) -> float:
        """Finished requests a second."""
        return self.requests / self.makespan

    def to_dict(self) -> dict[str, Any]:
        """As JSON, rates included."""
        rates = {"hit_rate": self.hit_rate, "output_rate": self.output_rate, "request_rate": self.request_rate}
        return rates | asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Result:
        """Read what `to_dict` made."""
        fields = {key: content[key] for key in cls.__dataclass_fields__}
        for key in ("ttft", "tpot", "e2e"):
            fields[key] = fields[key] and Spread(**fields[key])
        fields["groups"] = [GroupLayout(**group) for group in fields["groups"]]
        fields["samples"] = [Sample(**sample | {"uses": tuple(sample["uses"])}) for sample in fields["samples"]]
        fields["host"] = fields["host"] and HostFigures(**fields["host"])
        return cls(**fields)

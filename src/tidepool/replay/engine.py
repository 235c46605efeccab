"""An engine core without a model.

Everything of vLLM's that decides about memory is real: configuration, planning, scheduler, KV cache manager, and the
plugin. Layer specs come from the model's own class, built on the meta device. Only `NoModelExecutor` is ours: it
answers every step at once with made-up tokens and leaves it to the caller what time a step would have taken.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from vllm import SamplingParams
from vllm.config.vllm import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.utils.torch_utils import get_dtype_size
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.core import EngineCore
from vllm.v1.executor.abstract import Executor
from vllm.v1.kv_cache_interface import AttentionSpec, SlidingWindowSpec
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput

from tidepool.cache import StateFormat
from tidepool.models import WINDOWS
from tidepool.models.dtypes import head_bytes
from tidepool.replay.architectures import ARCHITECTURES
from tidepool.replay.drafts import Drafts
from tidepool.replay.job import GPU_KERNEL_BLOCK
from tidepool.replay.link import Link
from tidepool.replay.trace import GENERATED_TOKEN
from tidepool.running.engine import require_side
from tidepool.sides import Side, switch
from tidepool.vllm_plugin.deciding import layer_specs_of
from tidepool.vllm_plugin.settings import Eviction, QueueOrder


@dataclass(frozen=True)
class EngineShape:
    """What an engine without a model is made of. Sizes are tokens and bytes."""

    hf_config: dict[str, Any]
    """An HF-style model configuration."""
    kv_bytes: int
    side: Side
    host_bytes: int = 0
    """Host memory behind the device's: tidepool's, or with stock vLLM its own offloading."""
    max_num_seqs: int = 256
    max_model_len: int = 131_072
    max_num_batched_tokens: int = 8_192
    prefix_caching: bool = True
    eviction: Eviction = "returns"
    queue: QueueOrder = "fcfs"
    checkpoint_states: StateFormat = "same"
    block_size: int = GPU_KERNEL_BLOCK
    """Tokens of an attention block; stock vLLM with states enlarges it."""
    change_specs: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    """Makes other layers of the model's, both given as layer name to vLLM's KVCacheSpec."""
    tp: int = 1
    """Tensor parallel size: one device of so many is built, for all keep the same."""
    drafts: Drafts | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of vLLM's EngineArgs; they win over the fields above. With a drafter among them memory is kept
    for drafts, and none are made."""


class GpuBlocks:
    """Stands in for a GPU attention backend where block sizes are asked for."""

    @staticmethod
    def get_supported_kernel_block_sizes(spec: Any = None) -> list[MultipleOf]:
        """Multiples of 16 tokens, as on GPUs."""
        return [MultipleOf(GPU_KERNEL_BLOCK)]

    @staticmethod
    def customize_spec(spec: Any) -> Any:
        """Plain keys and values."""
        return AttentionBackend.customize_spec(spec)


class NoModelExecutor(Executor):  # type: ignore[misc]
    """Builds the model on the meta device for its specs, and samples what `add_request` says."""

    shape: EngineShape

    def _init_executor(self) -> None:
        self.answers = defaultdict(lambda: iter(()))
        build_on_meta_device(self.vllm_config, self.shape.tp)
        prepare_gpu_blocks(self.vllm_config)
        specs = layer_specs_of(self.vllm_config)
        self.specs = self.shape.change_specs(specs) if self.shape.change_specs else specs

    def determine_available_memory(self) -> list[int]:
        """The budget, in bytes."""
        return [self.shape.kv_bytes]

    def get_kv_cache_specs(self) -> list[dict[str, Any]]:
        """One worker's."""
        return [self.specs]

    def get_supported_kv_cache_layouts(self) -> list[list[str]]:
        """One worker's: the layout of tidepool's arena, or the one that stock vLLM's offloading asks for."""
        stock_host = self.shape.host_bytes and self.shape.side == "stock"
        return [[(KVCacheLayout.LBHNC if stock_host else KVCacheLayout.BLHNC).name]]

    def set_kv_cache_layout(self, layout_name: str, *interleave: int) -> None:
        """As real executors do. vLLM 0.33 also tells how context parallelism interleaves tokens."""
        self.cache_config.kv_cache_layout = layout_name

    def initialize_from_config(self, kv_cache_configs: Any) -> None:
        """Nothing to allocate."""

    def compile_or_warm_up_model(self) -> None:
        """Nothing to warm up."""

    def collective_rpc(self, *args: Any, **kwargs: Any) -> list[Any]:
        """No worker has anything to say."""
        return [None]

    def check_health(self) -> None:
        """Always well."""

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
        """Answer a step at once."""
        scheduled = list(scheduler_output.num_scheduled_tokens)
        output = ModelRunnerOutput(
            req_ids=scheduled,
            req_id_to_index={req_id: index for index, req_id in enumerate(scheduled)},
            sampled_token_ids=self.sample(scheduler_output, scheduled),
        )
        if self.link is not None:
            self.waited = self.link.step(scheduler_output.kv_connector_metadata)
            output.kv_connector_output = self.link.report()
        return _Done(output) if non_block else output

    def sample(self, scheduler_output: Any, scheduled: Sequence[str]) -> list[list[int]]:
        """A token for every request whose prompt this step completes, and one for each accepted draft."""
        scheduler, drafts = self.scheduler, self.shape.drafts
        tokens: list[list[int]] = []
        for req_id in scheduled:
            request = scheduler.requests[req_id]
            # num_computed_tokens has been advanced past this step's tokens already.
            made = int(request.num_computed_tokens >= request.num_tokens)
            if made and drafts:
                drafted = len(scheduler_output.scheduled_spec_decode_tokens.get(req_id, ()))
                made += drafts.accepted(req_id, request.num_tokens, drafted)
            tokens.append([next(self.answers[req_id], GENERATED_TOKEN) for _ in range(made)])
        return tokens

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        """Drafts for the next step, of every request that runs; the scheduler leaves out those that still read."""
        if self.shape.drafts is None:
            return None
        running = [request.request_id for request in self.scheduler.running]
        return DraftTokenIds(running, [[GENERATED_TOKEN] * self.shape.drafts.tokens for _ in running])

    scheduler: Any = None
    """Set once the engine core has one."""
    link: Link | None = None
    """To host memory; set by the replay."""
    waited: float = 0.0
    """Seconds that the last step waited for the link before it began."""
    answers: defaultdict[str, Iterator[int]]
    """What each request will still generate."""


class _Done:
    """A future that is done."""

    def __init__(self, output: Any) -> None:
        self._output = output

    def result(self, timeout: float | None = None) -> Any:
        return self._output


def make_engine(shape: EngineShape) -> EngineCore:
    """An engine core of this shape, in this process.

    The side is chosen by the environment variable ``TIDEPOOL``, which this sets. Where tidepool falls back to vLLM,
    it is stock vLLM's all the same: `make_checked_engine` is for what compares.
    """
    os.environ |= switch(shape.side) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    with tempfile.TemporaryDirectory(prefix="tidepool-") as folder:
        named = shape.hf_config.get("architectures") or [ARCHITECTURES[shape.hf_config["model_type"]]]
        hf_config = {"architectures": named, "dtype": "bfloat16"}
        Path(folder, "config.json").write_text(json.dumps(hf_config | shape.hf_config), encoding="utf-8")
        arguments: dict[str, Any] = {
            "model": folder,
            "skip_tokenizer_init": True,
            "max_model_len": shape.max_model_len,
            "max_num_seqs": shape.max_num_seqs,
            "max_num_batched_tokens": shape.max_num_batched_tokens,
            "enable_prefix_caching": shape.prefix_caching,
            "enable_chunked_prefill": True,
            "enforce_eager": True,
            "async_scheduling": False,
            "block_size": shape.block_size,
            "additional_config": {
                "tidepool": {
                    "eviction": shape.eviction,
                    "queue": shape.queue,
                    "checkpoint_states": shape.checkpoint_states,
                }
            },
            "language_model_only": True,
            "kv_offloading_size": shape.host_bytes / (1 << 30) or None,
            "tensor_parallel_size": shape.tp,
            "distributed_executor_backend": "mp" if shape.tp > 1 else None,
        }
        if shape.drafts:
            drafts = {"num_speculative_tokens": shape.drafts.tokens, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
            arguments["speculative_config"] = {"method": "ngram"} | drafts
        vllm_config = EngineArgs(**arguments | dict(shape.options)).create_engine_config()
        executor = type("SizedExecutor", (NoModelExecutor,), {"shape": shape})
        engine = EngineCore(vllm_config, executor, log_stats=True)
    engine.model_executor.scheduler = engine.scheduler
    return engine


def make_checked_engine(shape: EngineShape) -> EngineCore:
    """An engine core of this shape whose memory is the side's.

    Raises:
        NotServedError: it is another, as where tidepool falls back to vLLM.
    """
    engine = make_engine(shape)
    require_side(shape.side, engine)
    return engine


def typed_layers(
    specs: Mapping[str, Any], layer_kv_dtypes: Sequence[tuple[int | str, str]], kv_dtype: str = "auto"
) -> dict[str, Any]:
    """The specs of layers that keep their tokens in other formats: packed, as vLLM's own packing backends declare it.

    Args:
        specs: layer name to vLLM's KVCacheSpec.
        layer_kv_dtypes: see `tidepool.models.CacheOptions`.
        kv_dtype: of the other attention layers.
    """
    made = dict(specs)
    for name, spec in specs.items():
        if not isinstance(spec, AttentionSpec):
            continue
        keys = [extract_layer_index(name), *([WINDOWS] if isinstance(spec, SlidingWindowSpec) else [])]
        dtype = next((dtype for layer, dtype in reversed(layer_kv_dtypes) if layer in keys), kv_dtype)
        if dtype != "auto":
            each = head_bytes(dtype, spec.head_size, spec.head_size_v, get_dtype_size(spec.dtype))
            made[name] = replace(spec, state_content_bytes=each)
    return made


def add_request(
    engine: EngineCore,
    req_id: str,
    prompt: list[int],
    output_tokens: int,
    answer: Iterable[int] = (),
    salt: str | None = None,
) -> None:
    """Queue a request that will generate ``output_tokens`` tokens: those of ``answer``, as far as it goes."""
    engine.model_executor.answers[req_id] = iter(answer)
    request = EngineCoreRequest(
        request_id=req_id,
        prompt_token_ids=prompt,
        mm_features=None,
        sampling_params=SamplingParams(max_tokens=output_tokens, ignore_eos=True),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=salt,
        data_parallel_rank=None,
    )
    engine.add_request(*engine.preprocess_add_request(request))


def prepare_gpu_blocks(vllm_config: Any) -> None:
    """Set block sizes as after loading a model on a GPU: through vLLM's inflation, or the plugin in its place."""
    if not vllm_config.model_config.is_hybrid:
        return

    class GpuPlatform(type(current_platform)):  # type: ignore[misc]
        @classmethod
        def _find_non_ssm_backends(cls, config: Any) -> list[Any]:
            return [GpuBlocks]

    GpuPlatform._align_hybrid_block_size(vllm_config, GpuBlocks)


def build_on_meta_device(vllm_config: Any, tp: int = 1) -> None:
    """Build one device's part of the model without its weights, which registers its layers in the configuration."""
    from vllm.distributed import (
        get_tp_group,
        init_distributed_environment,
        initialize_model_parallel,
        model_parallel_is_initialized,
    )
    from vllm.model_executor.model_loader.utils import initialize_model

    with set_current_vllm_config(vllm_config):
        if not model_parallel_is_initialized():
            with tempfile.TemporaryDirectory(prefix="tidepool-") as folder:
                init_distributed_environment(1, 0, f"file://{folder}/store", 0, "gloo")
                initialize_model_parallel()
        # Layers ask the group how many devices they are cut for; nothing is sent between them.
        get_tp_group().world_size = tp
        default = torch.get_default_dtype()
        torch.set_default_dtype(vllm_config.model_config.dtype)
        try:
            with torch.device("meta"):
                initialize_model(vllm_config)
        finally:
            torch.set_default_dtype(default)

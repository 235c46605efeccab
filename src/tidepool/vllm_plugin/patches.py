"""The patches: where vLLM offers no other way in. Each dispatches on one engine's configuration, so that engines which
tidepool doesn't serve go vLLM's way in the same process. Every name patched is listed in docs/design.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def install() -> None:
    """Patch vLLM in this process, once; the caller has checked its version."""
    from vllm.v1.core import kv_cache_utils

    if getattr(kv_cache_utils, "_tidepool_installed", False):
        return
    kv_cache_utils._tidepool_installed = True
    _patch_settings()
    _patch_attention_backend()
    _patch_planning()
    _patch_scheduler()
    _patch_workers()


def _wrap(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace ``owner.name`` by ``make(original)``."""
    original = getattr(owner, name)
    setattr(owner, name, functools.wraps(original)(make(original)))


def _patch_settings() -> None:
    """Refuse wrong settings where the user's arguments are read, before any process starts."""
    from vllm.engine.arg_utils import EngineArgs

    from tidepool.vllm_plugin.asked import note_asked
    from tidepool.vllm_plugin.settings import check_kv, read_settings

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
            settings = read_settings(self.additional_config)
            config = original(self, *args, **kwargs)
            cache = config.cache_config
            skipped = cache.kv_cache_dtype_skip_layers
            check_kv(settings.kv, config.device_config.device_type, cache.cache_dtype, skipped)
            note_asked(self, config, settings)
            return config

        return create_engine_config

    _wrap(EngineArgs, "create_engine_config", make)


def _patch_attention_backend() -> None:
    """Let an engine on the CPU choose its attention backend: vLLM's platform knows one there, whatever is asked for.

    The choice is made here rather than in the platform, since vLLM remembers what that answers, and two engines of one
    process may keep keys and values in different formats.
    """
    from vllm.v1.attention import selector

    def select(original: Callable[..., Any]) -> Callable[..., Any]:
        def _cached_get_attn_backend(backend: Any, attn_selector_config: Any, *args: Any, **kwargs: Any) -> Any:
            from vllm.config import get_current_vllm_config

            from tidepool.vllm_plugin.settings import read_settings

            vllm_config = get_current_vllm_config()
            kv = read_settings(vllm_config.additional_config).kv
            skipped = vllm_config.cache_config.kv_cache_dtype_skip_layers
            plain = attn_selector_config.has_sliding_window and "sliding_window" in skipped
            if kv is None or plain:
                return original(backend, attn_selector_config, *args, **kwargs)
            from tidepool.tqkv.backend import choose
            from tidepool.tqkv.formats import FORMATS

            return choose(FORMATS[kv], attn_selector_config)

        return _cached_get_attn_backend

    _wrap(selector, "_cached_get_attn_backend", select)


def _patch_planning() -> None:
    from vllm.platforms import current_platform
    from vllm.platforms.interface import Platform
    from vllm.v1.core import kv_cache_utils as utils

    from tidepool.vllm_plugin import planning
    from tidepool.vllm_plugin.capacity import publish_capacity
    from tidepool.vllm_plugin.gates import NO_STATES
    from tidepool.vllm_plugin.settings import read_settings
    from tidepool.vllm_plugin.startup import log_start

    inflate = Platform.__dict__["_align_hybrid_block_size"].__func__

    def align_hybrid_block_size(cls: Any, vllm_config: Any, backend_cls: Any) -> None:
        stock = functools.partial(inflate, cls, backend_cls=backend_cls)
        if not planning.keep_pages_natural(cls, vllm_config, stock):
            inflate(cls, vllm_config, backend_cls)

    Platform._align_hybrid_block_size = classmethod(align_hybrid_block_size)

    platform = type(current_platform)
    update_block_size = platform.update_block_size_for_backend.__func__

    def update_block_size_for_backend(cls: Any, vllm_config: Any) -> None:
        update_block_size(cls, vllm_config)
        model_config = vllm_config.model_config
        if model_config and not model_config.is_hybrid:
            planning.step_aside(vllm_config, read_settings(vllm_config.additional_config), NO_STATES)
        elif model_config and not cls._find_non_ssm_backends(vllm_config):
            # vLLM aligns nothing on a pipeline stage without attention. The others wait for its word.
            planning.keep_pages_natural(cls, vllm_config, None)

    platform.update_block_size_for_backend = classmethod(update_block_size_for_backend)

    stock_grouping, stock_configure = utils.get_kv_cache_groups, utils.get_kv_cache_config_from_groups

    def groups(original: Callable[..., Any]) -> Callable[..., Any]:
        def get_kv_cache_groups(vllm_config: Any, kv_cache_spec: Any) -> Any:
            if planning.receive_plan(vllm_config, kv_cache_spec) is None:
                return original(vllm_config, kv_cache_spec)
            return planning.group_by_layer_cache(kv_cache_spec)

        return get_kv_cache_groups

    def bytes_per_block(original: Callable[..., Any]) -> Callable[..., Any]:
        def _pool_bytes_per_block(vllm_config: Any, kv_cache_groups: Any) -> int:
            if planning.plan_of(vllm_config) is None:
                return int(original(vllm_config, kv_cache_groups))
            return planning.extent_bytes(vllm_config, kv_cache_groups)

        return _pool_bytes_per_block

    def longest_request(original: Callable[..., Any]) -> Callable[..., Any]:
        def _max_memory_usage_bytes_from_groups(vllm_config: Any, kv_cache_groups: Any) -> int:
            if planning.plan_of(vllm_config) is None:
                return int(original(vllm_config, kv_cache_groups))
            extents = planning.extents_of_longest_request(vllm_config, kv_cache_groups)
            return extents * int(utils._pool_bytes_per_block(vllm_config, kv_cache_groups))

        return _max_memory_usage_bytes_from_groups

    def configure(original: Callable[..., Any]) -> Callable[..., Any]:
        def get_kv_cache_config_from_groups(vllm_config: Any, kv_cache_groups: Any, available_memory: int) -> Any:
            plan = planning.plan_of(vllm_config)
            if plan is None:
                return original(vllm_config, kv_cache_groups, available_memory)
            return planning.make_kv_cache_config(vllm_config, plan, kv_cache_groups, available_memory)

        return get_kv_cache_config_from_groups

    def concurrency(original: Callable[..., Any]) -> Callable[..., Any]:
        def get_max_concurrency_for_kv_cache_config(vllm_config: Any, kv_cache_config: Any) -> float:
            if not isinstance(kv_cache_config, planning.TidepoolKVCacheConfig):
                return float(original(vllm_config, kv_cache_config))
            return planning.max_concurrency(vllm_config, kv_cache_config)

        return get_max_concurrency_for_kv_cache_config

    def capacity(original: Callable[..., Any]) -> Callable[..., Any]:
        def update_kv_cache_capacity(vllm_config: Any, kv_cache_config: Any) -> None:
            original(vllm_config, kv_cache_config)
            if isinstance(kv_cache_config, planning.TidepoolKVCacheConfig):
                log_start(vllm_config, kv_cache_config, stock_grouping, stock_configure)

        return update_kv_cache_capacity

    def init_caches(original: Callable[..., Any]) -> Callable[..., Any]:
        def _initialize_kv_caches(self: Any, vllm_config: Any) -> Any:
            config = original(self, vllm_config)
            if isinstance(config, planning.TidepoolKVCacheConfig):
                publish_capacity(vllm_config, config)
            return config

        return _initialize_kv_caches

    def configs(original: Callable[..., Any]) -> Callable[..., Any]:
        def get_kv_cache_configs(vllm_config: Any, kv_cache_specs: Any, available_memory: Any) -> Any:
            planning.agree(vllm_config, kv_cache_specs, available_memory)
            return original(vllm_config, kv_cache_specs, available_memory)

        return get_kv_cache_configs

    def scheduler_config(original: Callable[..., Any]) -> Callable[..., Any]:
        def generate_scheduler_kv_cache_config(kv_cache_configs: Any) -> Any:
            config = original(kv_cache_configs)
            if isinstance(config, planning.TidepoolKVCacheConfig):
                planning.over_stages(config, kv_cache_configs)
            return config

        return generate_scheduler_kv_cache_config

    def layout(original: Callable[..., Any]) -> Callable[..., Any]:
        def resolve_kv_cache_layout(vllm_config: Any, supported_layouts: Any, kv_cache_specs: Any = None) -> Any:
            if planning.has_plan(kv_cache_specs or ()):
                # vLLM wants all ranks to name the same layouts, but a pipeline stage without attention names them all,
                # and one with attention those that its kernels take.
                supported_layouts = [min(supported_layouts, key=len)]
            return original(vllm_config, supported_layouts, kv_cache_specs)

        return resolve_kv_cache_layout

    from vllm.v1.engine import core

    _wrap(utils, "get_kv_cache_groups", groups)
    _wrap(utils, "_pool_bytes_per_block", bytes_per_block)
    _wrap(utils, "_max_memory_usage_bytes_from_groups", longest_request)
    _wrap(utils, "get_kv_cache_config_from_groups", configure)
    _wrap(utils, "get_max_concurrency_for_kv_cache_config", concurrency)
    _wrap(core, "resolve_kv_cache_layout", layout)
    _wrap(core, "get_kv_cache_configs", configs)
    _wrap(core, "generate_scheduler_kv_cache_config", scheduler_config)
    _wrap(core, "update_kv_cache_capacity", capacity)
    _wrap(core.EngineCore, "_initialize_kv_caches", init_caches)


def _patch_scheduler() -> None:
    from vllm.v1.core import kv_cache_manager
    from vllm.v1.core.sched import scheduler
    from vllm.v1.request import RequestStatus

    from tidepool.cache import LARGE_STEP
    from tidepool.vllm_plugin import states
    from tidepool.vllm_plugin.capacity import MeteredKVCacheManager
    from tidepool.vllm_plugin.coordinator import make_coordinator
    from tidepool.vllm_plugin.planning import TidepoolKVCacheConfig, plan_of

    def coordinator(original: Callable[..., Any]) -> Callable[..., Any]:
        def get_kv_cache_coordinator(*, kv_cache_config: Any, **kwargs: Any) -> Any:
            served = isinstance(kv_cache_config, TidepoolKVCacheConfig)
            return (make_coordinator if served else original)(kv_cache_config=kv_cache_config, **kwargs)

        return get_kv_cache_coordinator

    def manager(original: type) -> Callable[..., Any]:
        def make_kv_cache_manager(*, kv_cache_config: Any, **kwargs: Any) -> Any:
            served = isinstance(kv_cache_config, TidepoolKVCacheConfig)
            return (MeteredKVCacheManager if served else original)(kv_cache_config=kv_cache_config, **kwargs)

        return make_kv_cache_manager

    def split(original: Callable[..., Any]) -> Callable[..., Any]:
        def _mamba_block_aligned_split(
            self: Any,
            request: Any,
            num_new_tokens: int,
            num_new_local_computed_tokens: int = 0,
            num_external_computed_tokens: int = 0,
        ) -> int:
            cached = num_new_local_computed_tokens, num_external_computed_tokens
            if plan_of(self.vllm_config) is None:
                return int(original(self, request, num_new_tokens, *cached))
            start = request.num_computed_tokens + sum(cached)
            prompt_end = max(request.num_prompt_tokens, request.num_tokens - 1)
            if start >= prompt_end:
                return num_new_tokens
            spacing = self.kv_cache_manager.block_pool.checkpoint_tokens
            large = self.max_num_scheduled_tokens >= LARGE_STEP * spacing
            few = large and num_new_tokens < min(spacing, prompt_end - start)
            if few and request.status != RequestStatus.RUNNING and self._inflight_prefills:
                # What another prompt has left of a large step: to begin with so little would hold memory for nothing.
                return 0
            return int(self.kv_cache_manager.step_end(request, start, start + num_new_tokens, prompt_end)) - start

        return _mamba_block_aligned_split

    _wrap(scheduler.Scheduler, "_mamba_block_aligned_split", split)
    _wrap(kv_cache_manager, "get_kv_cache_coordinator", coordinator)
    scheduler.KVCacheManager = manager(scheduler.KVCacheManager)
    states.register()


def _patch_workers() -> None:
    from vllm.config.compilation import CompilationConfig
    from vllm.model_executor.layers.mamba.checkpoint import MambaPrefillCheckpointBuilder
    from vllm.platforms import current_platform
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from tidepool.vllm_plugin.planning import TidepoolKVCacheConfig, plan_of, send_plan
    from tidepool.vllm_plugin.worker import arena_bytes_of, limit_requests, states_within_steps

    def specs(original: Callable[..., Any]) -> Callable[..., Any]:
        def get_kv_cache_spec(self: Any) -> Any:
            layers = original(self)
            send_plan(self.vllm_config, layers)
            return layers

        return get_kv_cache_spec

    def init_cache(original: Callable[..., Any]) -> Callable[..., Any]:
        def initialize_kv_cache(self: Any, kv_cache_config: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(kv_cache_config, TidepoolKVCacheConfig):
                limit_requests(self, kv_cache_config)
            return original(self, kv_cache_config, *args, **kwargs)

        return initialize_kv_cache

    def graph_sizes(original: Callable[..., Any]) -> Callable[..., Any]:
        def resolve_cudagraph_mode_and_sizes(self: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(kwargs.get("kv_cache_config"), TidepoolKVCacheConfig):
                # vLLM refuses more requests than num_blocks, which counts extents; `limit_requests` has seen to it.
                kwargs["max_num_reqs"] = None
            return original(self, *args, **kwargs)

        return resolve_cudagraph_mode_and_sizes

    def init_zeroing(original: Callable[..., Any]) -> Callable[..., Any]:
        def _init_kv_zero_meta(self: Any) -> None:
            # vLLM's zeroing kernel takes all groups to have num_blocks blocks. In its place the second runner uses
            # what is set here, and the first what `zero_blocks` below calls.
            if isinstance(self.kv_cache_config, TidepoolKVCacheConfig):
                self.kv_block_zeroer = arena_bytes_of(self)
            else:
                original(self)

        return _init_kv_zero_meta

    def zero_blocks(original: Callable[..., Any]) -> Callable[..., Any]:
        def _zero_block_ids(self: Any, block_ids: list[int]) -> None:
            arena = arena_bytes_of(self)
            if arena is None:
                original(self, block_ids)
            else:
                arena.apply(block_ids)

        return _zero_block_ids

    def copy_blocks(original: Callable[..., Any]) -> Callable[..., Any]:
        def update(self: Any, scheduler_output: Any) -> Any:
            copies = scheduler_output.kv_cache_block_copies
            if copies and (arena := arena_bytes_of(self)) is not None:
                # Before the copies come the zeroing and poisoning that vLLM does inside.
                scheduler_output.kv_cache_block_copies = None
                result = original(self, scheduler_output)
                # Ray hands the same object on to the next pipeline stage.
                scheduler_output.kv_cache_block_copies = copies
                arena.copy(copies)
                return result
            return original(self, scheduler_output)

        return update

    def saved_within(original: Callable[..., Any]) -> Callable[..., Any]:
        def build(self: Any, m: Any, request_rows: list[int]) -> Any:
            plan = plan_of(self.vllm_config)
            if plan is None:
                return original(self, m, request_rows)
            return states_within_steps(self.vllm_config, plan, self.kv_cache_spec, m, request_rows)

        return build

    _wrap(MambaPrefillCheckpointBuilder, "build", saved_within)
    _wrap(CompilationConfig, "resolve_cudagraph_mode_and_sizes", graph_sizes)
    _wrap(GPUModelRunner, "get_kv_cache_spec", specs)
    _wrap(GPUModelRunner, "initialize_kv_cache", init_cache)
    _wrap(GPUModelRunner, "_init_kv_zero_meta", init_zeroing)
    _wrap(GPUModelRunner, "_zero_block_ids", zero_blocks)
    _wrap(GPUModelRunner, "_update_states", copy_blocks)
    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_model_runner import CPUModelRunner

        _wrap(CPUModelRunner, "_zero_block_ids", zero_blocks)
    if current_platform.is_cuda():
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner as SecondGPUModelRunner

        _wrap(SecondGPUModelRunner, "get_kv_cache_spec", specs)
        _wrap(SecondGPUModelRunner, "initialize_kv_cache", init_cache)
        _wrap(SecondGPUModelRunner, "_init_kv_zero_meta", init_zeroing)
        _wrap(SecondGPUModelRunner, "update_requests", copy_blocks)

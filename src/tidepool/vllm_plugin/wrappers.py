"""What stands in place of vLLM's functions; `tidepool.vllm_plugin.patches` says where, and why.

Each wrapper gets vLLM's own function first, then the arguments, which keep vLLM's names. It looks at the configuration
of the engine at hand, so that engines which tidepool doesn't serve go vLLM's way in the same process.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from typing import Any

from vllm.v1.request import RequestStatus

from tidepool.cache import LARGE_STEP
from tidepool.vllm_plugin import planning
from tidepool.vllm_plugin.asked import ask_for_host_memory, asked_of, note_asked
from tidepool.vllm_plugin.capacity import MeteredKVCacheManager, publish_capacity
from tidepool.vllm_plugin.coordinator import TidepoolKVCacheManager, make_coordinator
from tidepool.vllm_plugin.deciding import keep_pages_natural
from tidepool.vllm_plugin.gates import NO_STATES
from tidepool.vllm_plugin.observing import Reporter, take_samples
from tidepool.vllm_plugin.planning import TidepoolKVCacheConfig, own_connector
from tidepool.vllm_plugin.ranks import agree, over_stages, settle
from tidepool.vllm_plugin.serving_plan import attach_plan, carries_plan, fall_back, plan_of
from tidepool.vllm_plugin.settings import check_kv, read_settings
from tidepool.vllm_plugin.startup import log_start
from tidepool.vllm_plugin.worker import arena_bytes_of, limit_requests, states_within_steps

Function = Callable[..., Any]

# Settings: where the user's arguments are read ----------------------------------------------------------------


def create_engine_config(original: Function, engine_args: Any, *args: Any, **kwargs: Any) -> Any:
    """Refuse wrong settings before any process starts, and note what the user asked for."""
    settings = read_settings(engine_args.additional_config)
    ask_for_host_memory(engine_args, settings)
    config = original(engine_args, *args, **kwargs)
    cache = config.cache_config
    check_kv(settings.kv, config.device_config.device_type, cache.cache_dtype, cache.kv_cache_dtype_skip_layers)
    note_asked(engine_args, config, settings)
    return config


def choose_attention_backend(
    original: Function, backend: Any, attn_selector_config: Any, *args: Any, **kwargs: Any
) -> Any:
    """The attention backend of a layer whose keys and values are kept in a format of tidepool's.

    Chosen here rather than in the platform, since vLLM remembers what that answers, and two engines of one process may
    keep keys and values in different formats.
    """
    from vllm.config import get_current_vllm_config

    vllm_config = get_current_vllm_config()
    kv = read_settings(vllm_config.additional_config).kv
    skipped = vllm_config.cache_config.kv_cache_dtype_skip_layers
    if kv is None or (attn_selector_config.has_sliding_window and "sliding_window" in skipped):
        return original(backend, attn_selector_config, *args, **kwargs)
    from tidepool.tqkv.backend import choose
    from tidepool.tqkv.formats import FORMATS

    return choose(FORMATS[kv], attn_selector_config)


# Workers, with the model loaded -------------------------------------------------------------------------------


def align_hybrid_block_size(original: Function, platform: Any, vllm_config: Any, backend_cls: Any) -> None:
    """Keep pages natural in place of the inflation, or fall back."""
    inflate = functools.partial(original, platform, backend_cls=backend_cls)
    if not keep_pages_natural(platform, vllm_config, inflate):
        inflate(vllm_config)


def update_block_size(original: Function, platform: Any, vllm_config: Any) -> None:
    """Speak up where vLLM inflates nothing: on models without states, and on pipeline stages without attention."""
    original(platform, vllm_config)
    model_config = vllm_config.model_config
    if model_config and not model_config.is_hybrid:
        fall_back(vllm_config, read_settings(vllm_config.additional_config), NO_STATES)
    elif model_config and not platform._find_non_ssm_backends(vllm_config):
        # The other stages wait for this one's word.
        keep_pages_natural(platform, vllm_config, None)


def get_kv_cache_spec(original: Function, runner: Any) -> Any:
    """Send the plan with the layers' specs."""
    specs = original(runner)
    attach_plan(runner.vllm_config, specs)
    return specs


# The engine core: planning ------------------------------------------------------------------------------------


def resolve_layout(original: Function, vllm_config: Any, supported_layouts: Any, kv_cache_specs: Any = None) -> Any:
    """Let ranks name different layouts.

    vLLM wants the same of all, but a pipeline stage without attention names every layout, and one with attention those
    that its kernels take.
    """
    if carries_plan(kv_cache_specs or ()):
        supported_layouts = [min(supported_layouts, key=len)]
    return original(vllm_config, supported_layouts, kv_cache_specs)


def take_over_and_plan(original: Function, vllm_config: Any, kv_cache_specs: Any, available_memory: Any) -> Any:
    """Take over the workers' plan, and settle what all ranks have in common."""
    agree(vllm_config, kv_cache_specs)
    return plan_memory(original, vllm_config, kv_cache_specs, available_memory)


def take_over(original: Function, vllm_config: Any, kv_cache_specs: Any) -> Any:
    """Take over the workers' plan, before anyone asks how the layers are grouped."""
    agree(vllm_config, kv_cache_specs)
    return original(vllm_config, kv_cache_specs)


def plan_memory(original: Function, vllm_config: Any, kv_cache_specs: Any, available_memory: Any, *groups: Any) -> Any:
    """Settle what all ranks have in common."""
    if plan_of(vllm_config) is not None and (asked := asked_of(vllm_config).max_num_seqs) is not None:
        # A worker in this process has lowered it for the small cache with which it measured CUDA graphs.
        vllm_config.scheduler_config.max_num_seqs = asked
    settle(vllm_config, kv_cache_specs, available_memory)
    if plan_of(vllm_config) is not None:
        own_connector(vllm_config)
    return original(vllm_config, kv_cache_specs, available_memory, *groups)


def name_builder(original: Function, platform: Any, vllm_config: Any) -> str:
    """tidepool's builder, for the engines that it serves."""
    if plan_of(vllm_config) is None:
        return str(original(platform, vllm_config))
    return "tidepool.vllm_plugin.builder.TidepoolBuilder"


def get_kv_cache_groups(original: Function, vllm_config: Any, kv_cache_spec: Any) -> Any:
    """One group for each layer cache."""
    if plan_of(vllm_config) is None:
        return original(vllm_config, kv_cache_spec)
    return planning.group_by_layer_cache(kv_cache_spec)


def bytes_per_block(original: Function, vllm_config: Any, kv_cache_groups: Any) -> int:
    """An extent's bytes."""
    if plan_of(vllm_config) is None:
        return int(original(vllm_config, kv_cache_groups))
    return planning.extent_bytes(vllm_config, kv_cache_groups)


def bytes_of_longest_request(original: Function, *arguments: Any) -> int:
    """In whole extents. From 0.33 on a builder comes before the configuration and the groups."""
    vllm_config, groups = arguments[-2:]
    if plan_of(vllm_config) is None:
        return int(original(*arguments))
    return planning.extents_of_longest_request(vllm_config, groups) * planning.extent_bytes(vllm_config, groups)


def get_kv_cache_config(original: Function, vllm_config: Any, kv_cache_groups: Any, available_memory: int) -> Any:
    """The arena and its views."""
    plan = plan_of(vllm_config)
    if plan is None:
        return original(vllm_config, kv_cache_groups, available_memory)
    extents = vllm_config.cache_config.num_gpu_blocks_override
    if extents is None:
        extents = available_memory // planning.extent_bytes(vllm_config, kv_cache_groups)
    return planning.make_kv_cache_config(vllm_config, plan, kv_cache_groups, extents)


def get_max_concurrency(original: Function, vllm_config: Any, kv_cache_config: Any) -> float:
    """Of requests that share extents."""
    if not isinstance(kv_cache_config, TidepoolKVCacheConfig):
        return float(original(vllm_config, kv_cache_config))
    return planning.max_concurrency(vllm_config, kv_cache_config)


def scheduler_kv_cache_config(original: Function, kv_cache_configs: Any) -> Any:
    """Bytes are sums over the pipeline stages."""
    config = original(kv_cache_configs)
    if isinstance(config, TidepoolKVCacheConfig):
        over_stages(config, kv_cache_configs)
    return config


def update_capacity(original: Function, vllm_config: Any, kv_cache_config: Any) -> None:
    """Log the block at start."""
    original(vllm_config, kv_cache_config)
    if isinstance(kv_cache_config, TidepoolKVCacheConfig):
        log_start(vllm_config, kv_cache_config)


def initialize_kv_caches(original: Function, core: Any, vllm_config: Any) -> Any:
    """Name as ``num_gpu_blocks`` what others reckon with, once vLLM doesn't any more."""
    config = original(core, vllm_config)
    if isinstance(config, TidepoolKVCacheConfig):
        publish_capacity(vllm_config, config)
    return config


# The engine core: scheduling ----------------------------------------------------------------------------------


def make_kv_cache_coordinator(original: Function, *, kv_cache_config: Any, **kwargs: Any) -> Any:
    """A coordinator with a pool for each group."""
    served = isinstance(kv_cache_config, TidepoolKVCacheConfig)
    return (make_coordinator if served else original)(kv_cache_config=kv_cache_config, **kwargs)


def make_connector(original: Function, factory: Any, config: Any, role: Any, kv_cache_config: Any) -> Any:
    """Host memory behind the pools in place of vLLM's own offloading."""
    if isinstance(kv_cache_config, TidepoolKVCacheConfig):
        from tidepool.vllm_plugin.host_connector import HostConnector

        return HostConnector(config, role, kv_cache_config)
    return original(factory, config, role, kv_cache_config)


def make_kv_cache_manager(original: Function, *, kv_cache_config: Any, **kwargs: Any) -> Any:
    """A manager whose block ids carry their group."""
    served = isinstance(kv_cache_config, TidepoolKVCacheConfig)
    return (MeteredKVCacheManager if served else original)(kv_cache_config=kv_cache_config, **kwargs)


def make_stats(original: Function, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    """What tidepool counts goes along."""
    stats = original(scheduler, *args, **kwargs)
    manager = scheduler.kv_cache_manager
    if stats is not None and isinstance(manager, MeteredKVCacheManager):
        manager.reporter = manager.reporter or Reporter(scheduler)
        manager.reporter.attach(stats)
    return stats


def tokens_of_step(
    original: Function,
    scheduler: Any,
    request: Any,
    num_new_tokens: int,
    num_new_local_computed_tokens: int = 0,
    num_external_computed_tokens: int = 0,
) -> int:
    """Where the steps of a prompt end."""
    cached = num_new_local_computed_tokens, num_external_computed_tokens
    if plan_of(scheduler.vllm_config) is None:
        return int(original(scheduler, request, num_new_tokens, *cached))
    start = request.num_computed_tokens + sum(cached)
    prompt_end = max(request.num_prompt_tokens, request.num_tokens - 1)
    if start >= prompt_end:
        return num_new_tokens
    spacing = scheduler.kv_cache_manager.block_pool.checkpoint_tokens
    large = scheduler.max_num_scheduled_tokens >= LARGE_STEP * spacing
    few = large and num_new_tokens < min(spacing, prompt_end - start)
    if few and request.status != RequestStatus.RUNNING and scheduler._inflight_prefills:
        # What another prompt has left of a large step: to begin with so little would hold memory for nothing.
        return 0
    return int(scheduler.kv_cache_manager.step_end(request, start, start + num_new_tokens, prompt_end)) - start


def schedule(original: Function, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    """Know what waits, and let it go in the order that the user wants."""
    manager = scheduler.kv_cache_manager
    known = isinstance(manager, TidepoolKVCacheManager) and isinstance(scheduler.waiting, deque)
    if known and scheduler.waiting:
        manager.order_waiting(scheduler.waiting)
    output = original(scheduler, *args, **kwargs)
    if known and scheduler.waiting:
        manager.note_waiting(scheduler.waiting)
    return output


# The front end -----------------------------------------------------------------------------------------------


def record_stats(original: Function, loggers: Any, scheduler_stats: Any, *args: Any, **kwargs: Any) -> None:
    """What tidepool counted goes to Prometheus, before vLLM takes it for a connector's."""
    engine = kwargs.get("engine_idx", args[2] if len(args) > 2 else None)
    take_samples(scheduler_stats, engine or 0)
    original(loggers, scheduler_stats, *args, **kwargs)


# Workers, with memory -----------------------------------------------------------------------------------------


def resolve_graph_sizes(original: Function, compilation_config: Any, *args: Any, **kwargs: Any) -> Any:
    """Let more requests run than there are extents; `limit_requests` has seen to it that their states fit."""
    if isinstance(kwargs.get("kv_cache_config"), TidepoolKVCacheConfig):
        kwargs["max_num_reqs"] = None
    return original(compilation_config, *args, **kwargs)


def initialize_kv_cache(original: Function, runner: Any, kv_cache_config: Any, *args: Any, **kwargs: Any) -> Any:
    """No more requests than states."""
    if isinstance(kv_cache_config, TidepoolKVCacheConfig):
        limit_requests(runner, kv_cache_config)
    return original(runner, kv_cache_config, *args, **kwargs)


def prepare_zeroing(original: Function, runner: Any) -> None:
    """Put the arena in place of the kernel that zeroes blocks.

    The second runner zeroes with what is set here, the first with what `zero_blocks` calls.
    """
    if isinstance(runner.kv_cache_config, TidepoolKVCacheConfig):
        runner.kv_block_zeroer = arena_bytes_of(runner)
    else:
        original(runner)


def zero_blocks(original: Function, runner: Any, block_ids: list[int]) -> None:
    """Zero and poison by group."""
    arena = arena_bytes_of(runner)
    if arena is None:
        original(runner, block_ids)
    else:
        arena.apply(block_ids)


def copy_blocks(original: Function, runner: Any, scheduler_output: Any) -> Any:
    """Copy by group."""
    copies = scheduler_output.kv_cache_block_copies
    if not copies or (arena := arena_bytes_of(runner)) is None:
        return original(runner, scheduler_output)
    # Before the copies come the zeroing and poisoning that vLLM does inside.
    scheduler_output.kv_cache_block_copies = None
    result = original(runner, scheduler_output)
    # Ray hands the same object on to the next pipeline stage.
    scheduler_output.kv_cache_block_copies = copies
    arena.copy(copies)
    return result


def prefill_checkpoints(original: Function, builder: Any, m: Any, request_rows: list[int]) -> Any:
    """Save states inside steps where the scheduler has it."""
    plan = plan_of(builder.vllm_config)
    if plan is None:
        return original(builder, m, request_rows)
    return states_within_steps(builder.vllm_config, plan, builder.kv_cache_spec, m, request_rows)

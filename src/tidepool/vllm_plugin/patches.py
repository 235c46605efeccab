"""The patches that let vLLM serve engines on tidepool's memory: where vLLM offers no other way in.

docs/design.md shows this table, and docs/versions.md says how to take it to another version of vLLM.
"""

from __future__ import annotations

from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from tidepool.vllm_plugin import wrappers
from tidepool.vllm_plugin.attention import AttentionManager
from tidepool.vllm_plugin.compat import WORKAROUNDS
from tidepool.vllm_plugin.patching import Patch, apply, check, needed_here
from tidepool.vllm_plugin.planning import ATTENTION_ROLE, STATES_ROLE
from tidepool.vllm_plugin.states import StateManager

_OLD, _NEW = ("0.32",), ("0.33",)
_BUILDER = "0.33, which asks the builder"
_NATURAL = "vLLM plans natural pages"
_GROUPED_IDS = "vLLM's lists of block ids name groups"
_ONE_COUNT = "vLLM takes every group to have num_blocks blocks"

PATCHES: tuple[Patch, ...] = (
    Patch(
        "vllm.engine.arg_utils:EngineArgs.create_engine_config",
        wrappers.create_engine_config,
        "self, usage_context=, headless=",
        "refuses wrong settings before anything starts, and notes what the user asked for",
        "no hook sees arguments before vLLM overwrites them",
        "vLLM tells defaults from decisions",
    ),
    Patch(
        "vllm.v1.attention.selector:_cached_get_attn_backend",
        wrappers.choose_attention_backend,
        "backend, attn_selector_config, num_heads=, *, _run_kv_cache_dtype=",
        "chooses the attention backend of the setting kv",
        "the CPU platform knows one backend, whatever is asked for",
        "the CPU platform honours attention_config.backend",
    ),
    Patch(
        "vllm.platforms.interface:Platform._align_hybrid_block_size",
        wrappers.align_hybrid_block_size,
        "cls, vllm_config, backend_cls",
        "decides, and keeps pages natural in place of the inflation",
        "vLLM inflates every hybrid model's blocks",
        _NATURAL,
    ),
    Patch(
        "platform:update_block_size_for_backend",
        wrappers.update_block_size,
        "cls, vllm_config",
        "decides where vLLM inflates nothing: models without states, pipeline stages without attention",
        "vLLM asks nobody there",
        _NATURAL,
    ),
    Patch(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner.get_kv_cache_spec",
        wrappers.get_kv_cache_spec,
        "self",
        "attaches the plan to the layers' specs",
        "nothing else goes from the workers to the engine core before memory is planned",
        "the engine core plans by what it knows itself",
    ),
    Patch(
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner.get_kv_cache_spec",
        wrappers.get_kv_cache_spec,
        "self",
        "the same in the second runner",
        "as above",
        "as above",
        device="cuda",
    ),
    Patch(
        "vllm.v1.engine.core:resolve_kv_cache_layout",
        wrappers.resolve_layout,
        "vllm_config, supported_layouts, kv_cache_specs=",
        "lets ranks name different layouts",
        "vLLM wants the same of all, and a stage without attention names every layout",
        "vLLM takes the layouts that all ranks name",
    ),
    Patch(
        "vllm.v1.engine.core:get_kv_cache_configs",
        wrappers.take_over_and_plan,
        "vllm_config, kv_cache_specs, available_memory",
        "takes over the plan, and settles what all ranks have in common",
        "vLLM plans each rank by itself and lowers num_blocks, which fixed shares don't follow",
        "0.33, where two rows share this",
        series=_OLD,
    ),
    Patch(
        "vllm.v1.engine.core:get_global_kv_cache_groups",
        wrappers.take_over,
        "vllm_config, kv_cache_specs",
        "takes over the plan",
        "nobody else sees the specs that come from the workers",
        "the engine core plans by what it knows itself",
        series=_NEW,
    ),
    Patch(
        "vllm.v1.engine.core:get_kv_cache_configs",
        wrappers.plan_memory,
        "vllm_config, kv_cache_specs, available_memory, global_kv_cache_groups",
        "settles what all ranks have in common",
        "vLLM plans each rank by itself and lowers num_blocks, which fixed shares don't follow",
        "the builder is told every rank's memory",
        series=_NEW,
    ),
    Patch(
        "platform:get_kv_cache_config_builder_cls",
        wrappers.name_builder,
        "cls, vllm_config",
        "names the builder of the memory of engines that tidepool serves",
        "the hook is a method of the platform, and a general plugin isn't one",
        "plugins can name a builder",
        series=_NEW,
    ),
    Patch(
        "vllm.v1.core.kv_cache_utils:get_kv_cache_groups",
        wrappers.get_kv_cache_groups,
        "vllm_config, kv_cache_spec",
        "one group for each layer cache",
        "vLLM splits layers into groups of one size",
        _BUILDER,
        series=_OLD,
    ),
    Patch(
        "vllm.v1.core.kv_cache_utils:_pool_bytes_per_block",
        wrappers.bytes_per_block,
        "vllm_config, kv_cache_groups",
        "an extent's bytes",
        "vLLM has one size of blocks",
        _BUILDER,
        series=_OLD,
    ),
    Patch(
        "vllm.v1.core.kv_cache_utils:get_kv_cache_config_from_groups",
        wrappers.get_kv_cache_config,
        "vllm_config, kv_cache_groups, available_memory",
        "lays out the arena",
        "vLLM gives every group the same blocks",
        _BUILDER,
        series=_OLD,
    ),
    Patch(
        "vllm.v1.core.kv_cache_utils:_max_memory_usage_bytes_from_groups",
        wrappers.bytes_of_longest_request,
        "vllm_config, kv_cache_groups",
        "counts a request in whole extents",
        "vLLM counts its blocks, which groups don't share",
        "the builder is asked for it too",
        series=_OLD,
    ),
    Patch(
        "vllm.v1.core.kv_cache_planning:_max_memory_usage_bytes_from_groups",
        wrappers.bytes_of_longest_request,
        "builder, vllm_config, kv_cache_groups",
        "counts a request in whole extents",
        "vLLM counts its blocks, which groups don't share",
        "the builder is asked for it too",
        series=_NEW,
    ),
    Patch(
        "vllm.v1.core.kv_cache_utils:get_max_concurrency_for_kv_cache_config",
        wrappers.get_max_concurrency,
        "vllm_config, kv_cache_config",
        "counts requests that share extents",
        "vLLM counts its blocks, which groups don't share",
        "the builder is asked for it too",
    ),
    Patch(
        "vllm.v1.engine.core:generate_scheduler_kv_cache_config",
        wrappers.scheduler_kv_cache_config,
        "kv_cache_configs",
        "bytes are sums over pipeline stages",
        "vLLM's scheduler gets a copy of one rank's",
        "the scheduler needs no bytes",
    ),
    Patch(
        "vllm.v1.engine.core:update_kv_cache_capacity",
        wrappers.update_capacity,
        "vllm_config, kv_cache_config",
        "logs the block at start",
        "it is the first moment at which all is known",
        "vLLM has a hook there",
    ),
    Patch(
        "vllm.v1.engine.core:EngineCore._initialize_kv_caches",
        wrappers.initialize_kv_caches,
        "self, vllm_config",
        "names as num_gpu_blocks what others reckon with (metrics.md)",
        "what is told to others is read from num_gpu_blocks, which counts extents until here",
        "vLLM tells tokens",
    ),
    Patch(
        "vllm.v1.core.kv_cache_manager:get_kv_cache_coordinator",
        wrappers.make_kv_cache_coordinator,
        "kv_cache_config, max_model_len, max_in_flight_tokens, use_eagle, enable_caching, enable_kv_cache_events, "
        "dcp_world_size, pcp_world_size, scheduler_block_size, hash_block_size, metrics_collector=, "
        "num_prefill_lookahead=, allow_partial_hash_hits=",
        "makes a coordinator with a pool for each group",
        "vLLM's has one pool",
        "vLLM lets a KVCacheConfig name its coordinator",
        series=_OLD,
    ),
    Patch(
        "vllm.v1.core.kv_cache_manager:get_kv_cache_coordinator",
        wrappers.make_kv_cache_coordinator,
        "kv_cache_config, max_model_len, max_in_flight_tokens, use_eagle, enable_caching, enable_kv_cache_events, "
        "dcp_world_size, pcp_world_size, scheduler_block_size, hash_block_size, metrics_collector=, "
        "num_hash_lookahead_tokens=, num_prefill_lookahead=, allow_partial_hash_hits=",
        "makes a coordinator with a pool for each group",
        "vLLM's has one pool",
        "vLLM lets a KVCacheConfig name its coordinator",
        series=_NEW,
    ),
    Patch(
        "vllm.v1.core.sched.scheduler:KVCacheManager",
        wrappers.make_kv_cache_manager,
        "kv_cache_config, max_model_len, scheduler_block_size, hash_block_size, max_in_flight_tokens=, "
        "enable_caching=, use_eagle=, num_prefill_lookahead=, log_stats=, enable_kv_cache_events=, dcp_world_size=, "
        "pcp_world_size=, metrics_collector=, watermark=, enable_mamba_shared_prefix_checkpoint=",
        "makes a manager whose block ids carry their group",
        _GROUPED_IDS.replace("name", "don't name"),
        _GROUPED_IDS,
        series=_OLD,
    ),
    Patch(
        "vllm.v1.core.sched.scheduler:KVCacheManager",
        wrappers.make_kv_cache_manager,
        "kv_cache_config, max_model_len, scheduler_block_size, hash_block_size, max_in_flight_tokens=, "
        "enable_caching=, use_eagle=, num_hash_lookahead_tokens=, num_prefill_lookahead=, log_stats=, "
        "enable_kv_cache_events=, dcp_world_size=, pcp_world_size=, metrics_collector=, watermark=, "
        "enable_mamba_shared_prefix_checkpoint=",
        "makes a manager whose block ids carry their group",
        _GROUPED_IDS.replace("name", "don't name"),
        _GROUPED_IDS,
        series=_NEW,
    ),
    Patch(
        "vllm.distributed.kv_transfer.kv_connector.factory:KVConnectorFactory.create_connector",
        wrappers.make_connector,
        "cls, config, role, kv_cache_config",
        "makes the connector of host memory behind the pools in place of vLLM's own offloading",
        "whether tidepool serves an engine is known only once its model is loaded",
        "vLLM names connectors when it makes them",
    ),
    Patch(
        "vllm.v1.core.sched.scheduler:Scheduler._mamba_block_aligned_split",
        wrappers.tokens_of_step,
        "self, request, num_new_tokens, num_new_local_computed_tokens=, num_external_computed_tokens=",
        "where the steps of a prompt end",
        "vLLM ends them at multiples of a block",
        "vLLM asks the manager",
    ),
    Patch(
        "vllm.v1.core.sched.scheduler:Scheduler.schedule",
        wrappers.schedule,
        "self, throttle_prefills=",
        "knows which requests wait, and lets those with much in the cache go first where the user wants it",
        "vLLM asks nobody before a request's turn has come",
        "vLLM lets a plugin order the waiting queue",
    ),
    Patch(
        "vllm.v1.core.sched.scheduler:Scheduler.make_stats",
        wrappers.make_stats,
        "self, spec_decoding_stats=, kv_connector_stats=, cudagraph_stats=, perf_stats=, ec_connector_stats=",
        "sends what it counts with vLLM's stats (metrics.md)",
        "stats have no place for other allocators'",
        "plugins can add stats",
    ),
    Patch(
        "vllm.v1.metrics.loggers:StatLoggerManager.record",
        wrappers.record_stats,
        "self, scheduler_stats, iteration_stats, mm_cache_stats=, engine_idx=",
        "takes it off again, for Prometheus",
        "plugins' stat loggers aren't asked for by vllm.LLM, and switch vLLM's stats on where they are off",
        "as above",
    ),
    Patch(
        "vllm.config.compilation:CompilationConfig.resolve_cudagraph_mode_and_sizes",
        wrappers.resolve_graph_sizes,
        "self, min_cg_support, min_cg_attn_backend, uniform_decode_query_len=, use_v2_model_runner=, "
        "kv_cache_config=, max_num_reqs=, is_profiling=, piecewise_capture_available=",
        "lets more requests run than there are extents",
        "vLLM refuses more requests than num_blocks",
        "vLLM counts blocks of states",
    ),
    Patch(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner.initialize_kv_cache",
        wrappers.initialize_kv_cache,
        "self, kv_cache_config, is_profiling=, kv_cache_allocation_context=",
        "lowers max_num_seqs to the requests whose states fit",
        "vLLM captures graphs for requests that have no state",
        "vLLM counts blocks of states",
    ),
    Patch(
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner.initialize_kv_cache",
        wrappers.initialize_kv_cache,
        "self, kv_cache_config, is_profiling=, kv_cache_allocation_context=",
        "the same in the second runner",
        "as above",
        "as above",
        device="cuda",
    ),
    Patch(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._init_kv_zero_meta",
        wrappers.prepare_zeroing,
        "self",
        "leaves vLLM's zeroing kernel out",
        _ONE_COUNT,
        _GROUPED_IDS,
    ),
    Patch(
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner._init_kv_zero_meta",
        wrappers.prepare_zeroing,
        "self",
        "puts the arena in the place of vLLM's zeroing kernel, in the second runner",
        _ONE_COUNT,
        _GROUPED_IDS,
        device="cuda",
    ),
    Patch(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._zero_block_ids",
        wrappers.zero_blocks,
        "self, block_ids",
        "zeroes and poisons by group",
        _ONE_COUNT,
        _GROUPED_IDS,
    ),
    Patch(
        "vllm.v1.worker.cpu_model_runner:CPUModelRunner._zero_block_ids",
        wrappers.zero_blocks,
        "self, block_ids",
        "the same on the CPU, which has its own",
        _ONE_COUNT,
        _GROUPED_IDS,
        device="cpu",
    ),
    Patch(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._update_states",
        wrappers.copy_blocks,
        "self, scheduler_output",
        "copies by group",
        _ONE_COUNT,
        _GROUPED_IDS,
    ),
    Patch(
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner.update_requests",
        wrappers.copy_blocks,
        "self, scheduler_output",
        "the same in the second runner",
        _ONE_COUNT,
        _GROUPED_IDS,
        device="cuda",
    ),
    Patch(
        "vllm.model_executor.layers.mamba.checkpoint:MambaPrefillCheckpointBuilder.build",
        wrappers.prefill_checkpoints,
        "self, m, request_rows",
        "where layers save a state inside a step: as the scheduler has it",
        "vLLM works it out from its own block size",
        "the scheduler sends it to the workers",
    ),
)


def check_here() -> None:
    """See whether this process's vLLM is what the patches, and the work-arounds of `compat`, were written for.

    Raises:
        PatchError: it isn't.
    """
    check(needed_here((*PATCHES, *WORKAROUNDS)))


def install() -> None:
    """Patch vLLM in this process, once.

    Raises:
        PatchError: a target isn't as the table says. Nothing has been patched.
    """
    apply(needed_here(PATCHES))
    for role, manager in ((STATES_ROLE, StateManager), (ATTENTION_ROLE, AttentionManager)):
        KVCacheSpecRegistry.register_role_manager(role, manager)


def is_installed() -> bool:
    """Whether vLLM is patched in this process."""
    return all(patch.applied for patch in needed_here(PATCHES))

"""Engines of several formats and kinds of memory, one after the other in one process; run by test_tqkv_engine.py.

Reads a list of jobs on standard input, and writes a list of answers to the file named there.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import quick_kernels
from tidepool.running.engine import core_of

STOCK_BLOCK_TOKENS = 128
"""vLLM's own on the CPU; it inflates the block in steps of so many tokens."""


def main() -> None:
    work = json.load(sys.stdin)
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}
    quick_kernels.install()
    engines: list[Any] = []  # An engine that is collected takes vLLM's process-wide state with it.
    answers = [run(job, engines) for job in work["jobs"]]
    with open(work["answer"], "w", encoding="utf-8") as file:
        json.dump(answers, file)


def run(job: dict[str, Any], engines: list[Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    os.environ |= {"TIDEPOOL": job["side"], "TIDEPOOL_POISON": "1" if job["poison"] else "0"}
    llm = LLM(
        job["model"],
        seed=0,
        kv_cache_memory_bytes=job["kv_bytes"],
        max_model_len=4096,
        max_num_seqs=job["max_num_seqs"],
        max_num_batched_tokens=job["step_tokens"],
        long_prefill_token_threshold=job["chunk_tokens"],
        enable_prefix_caching=job["caching"],
        enforce_eager=True,
        disable_log_stats=False,
        skip_tokenizer_init=True,
        additional_config={"tidepool": {"kv": job["kv"]}},
    )
    engines.append(llm)
    if job["damage"]:
        turn_keys_around(llm)
    sampling = SamplingParams(temperature=0, max_tokens=job["output_tokens"], ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": tokens} for tokens in job["prompts"]]
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    scheduler = core_of(llm.llm_engine).scheduler
    config, block_pool = scheduler.kv_cache_config, scheduler.kv_cache_manager.block_pool
    arena = getattr(block_pool, "arena", None)
    page_bytes = [group.kv_cache_spec.page_size_bytes for group in config.kv_cache_groups]
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "hit_tokens": sum(output.num_cached_tokens or 0 for output in outputs),
        "preemptions": next(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions"),
        "moves": arena.moves if arena else 0,
        "in_use_at_end": block_pool.get_usage(),
        "units": config.num_blocks,
        "blocks": [(config.num_blocks - 1) * pool.blocks_per_extent for pool in arena.pools] if arena else None,
        "groups": [
            [type(group.kv_cache_spec).__name__, group.kv_cache_spec.block_size, page, len(group.layer_names)]
            for group, page in zip(config.kv_cache_groups, page_bytes, strict=True)
        ],
    }


def turn_keys_around(llm: Any) -> None:
    """The deliberate fault: keys are read in the wrong order."""
    for layer in llm.llm_engine.vllm_config.compilation_config.static_forward_context.values():
        if codec := getattr(getattr(layer, "impl", None), "codec", None):
            codec.key_levels = lambda packed, codec=codec: codec.keys.levels(packed[..., : codec.keys.bytes]).flip(-1)


if __name__ == "__main__":
    main()

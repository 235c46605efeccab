"""Cases of cases.py through real vLLM, each through stock and tidepool in turn, all in this process.

Reads a list of jobs on standard input; writes for each either both sides' results or what went wrong to the file that
is named. vLLM's import takes longer than most engines' whole life here.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from typing import Any

import quick_kernels
from tidepool.running.engine import core_of

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}

SIDES = {"stock": ("off", False), "elastic": ("elastic", True)}
"""Of each side, the plugin's switch, and whether it caches prefixes if the case does: stock is the reference."""


def main() -> None:
    job = json.load(sys.stdin)
    quick_kernels.install()
    turn_every_head()
    results: list[dict[str, Any]] = []
    for case in job["cases"]:
        try:
            results.append({side: serve(case, side) for side in SIDES})
        except Exception:
            results.append({"error": traceback.format_exc()})
    with open(job["answer"], "w", encoding="utf-8") as file:
        json.dump(results, file)


def serve(case: dict[str, Any], side: str) -> dict[str, Any]:
    from vllm import LLM

    os.environ["TIDEPOOL"], caches = SIDES[side]
    os.environ["TIDEPOOL_POISON"] = "1"
    llm = LLM(
        model=case["model"],
        max_num_seqs=case["max_num_seqs"],
        # The reference has memory for all.
        kv_cache_memory_bytes=case["kv_bytes"] if caches else 400_000_000,
        enable_prefix_caching=caches and case["caching"],
        enforce_eager=True,
        seed=0,
        disable_log_stats=False,
        max_model_len=2048,
        # Prompts are never cut, so that every side computes the same chunks.
        max_num_batched_tokens=8192,
        **case["engine"],
    )
    core = core_of(llm.llm_engine)
    # The reference finds nothing, so it needn't be asked twice.
    rounds = case["rounds"] if caches else list(dict.fromkeys(case["rounds"]))
    result: dict[str, Any] = {"rounds": [{"asked": name} | ask(llm, case, name) for name in rounds]}
    metrics = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    arena = getattr(core.scheduler.kv_cache_manager.block_pool, "arena", None)
    result |= {
        "served": arena is not None,
        "preemptions": metrics["vllm:num_preemptions"],
        "extents": core.scheduler.kv_cache_config.num_blocks,
        "moves": arena.moves if arena else 0,
        "in_use_at_end": arena.usage().in_use if arena else 0,
    }
    llm.llm_engine.engine_core.shutdown()
    del llm, core, arena
    gc.collect()
    return result


def ask(llm: Any, case: dict[str, Any], name: str) -> dict[str, Any]:
    """Ask all of a case's prompts of this name at once; results as in ../asking.py."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0, max_tokens=case["output_tokens"], ignore_eos=True, detokenize=False, logprobs=20
    )
    prompts: list[dict[str, Any]] = []
    for prompt in case[name]:
        asked: dict[str, Any] = {"prompt_token_ids": prompt["tokens"]}
        if prompt["images"]:
            asked["multi_modal_data"] = {"image": [picture(seed) for seed in prompt["images"]]}
        prompts.append(asked)
    answers, cached = [], []
    for output in llm.generate(prompts, sampling, use_tqdm=False):
        completion = output.outputs[0]
        logprobs = [{token: entry.logprob for token, entry in step.items()} for step in completion.logprobs]
        answers.append({"tokens": list(completion.token_ids), "logprobs": logprobs})
        cached.append(output.num_cached_tokens or 0)
    return {"answers": answers, "cached": cached}


def turn_every_head() -> None:
    """Put vLLM's rotary embedding right for LFM2 on the CPU, on both sides; see docs/families.md."""
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    forward = RotaryEmbedding.forward_cpu

    def forward_cpu(self: Any, positions: Any, query: Any, key: Any = None) -> Any:
        turned, turned_key = forward(self, positions, query.flatten(1), None if key is None else key.flatten(1))
        return turned.view_as(query), None if key is None else turned_key.view_as(key)

    RotaryEmbedding.forward_cpu = forward_cpu


def picture(seed: int) -> Any:
    """A picture of 128 pixels a side: coloured noise in coarse squares."""
    import numpy as np
    from PIL import Image

    squares = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(squares).resize((128, 128), Image.Resampling.NEAREST)


if __name__ == "__main__":
    main()

"""Prompts through a tiny model with and without adapters; run by test_adapters.py.

Reads a job on standard input. For each engine of it (side, prefix caching) and each phase it writes what `asking.ask`
returns to the file that the job names.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import quick_kernels
from asking import ask
from tidepool.running.engine import core_of

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING", "TIDEPOOL_POISON": "1"}


def main() -> None:
    job = json.load(sys.stdin)
    quick_kernels.install()
    results = [serve(job, **engine) for engine in job["engines"]]
    with open(job["answer"], "w", encoding="utf-8") as file:
        json.dump(results, file)


def serve(job: dict[str, Any], side: str, caching: bool) -> list[dict[str, Any]]:
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    os.environ["TIDEPOOL"] = side
    llm = LLM(
        model=job["model"],
        max_model_len=1024,
        max_num_seqs=4,
        kv_cache_memory_bytes=100_000_000,
        enable_prefix_caching=caching,
        enforce_eager=True,
        seed=0,
        enable_lora=True,
        max_loras=2,
        max_lora_rank=8,
    )
    core = core_of(llm.llm_engine)
    assert (getattr(core.scheduler.kv_cache_manager.block_pool, "arena", None) is not None) == (side != "off")
    served = Path(job["served"])
    results = []
    for phase in job["phases"]:
        adapter = None
        if phase["adapter"]:
            # The adapter's files as they are at this time: its place may have held others before.
            place = served / phase["place"]
            shutil.copytree(phase["adapter"], place, dirs_exist_ok=True)
            adapter = LoRARequest(phase["place"], phase["id"], str(place), load_inplace=phase["reload"] == "request")
            if phase["reload"] == "engine":
                adapter.load_inplace = True
                llm.llm_engine.add_lora(adapter)
                adapter.load_inplace = False
        results.append(ask(llm, job["prompts"], output_tokens=8, adapter=adapter))
    core.shutdown()
    del llm, core
    gc.collect()
    shutil.rmtree(served)
    return results


if __name__ == "__main__":
    main()

"""Starts engines that need a certificate, one after the other; run by test_certified.py.

The job names a checkpoint and a folder. Writes what became of each engine: None if tidepool served it, else the reason.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def main() -> None:
    job = json.load(sys.stdin)
    os.environ |= {
        "TIDEPOOL": "elastic",
        "TIDEPOOL_CERTIFY_CPU": "1",
        "TIDEPOOL_CERTIFICATES": job["folder"],
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    from tidepool.certificates import withdraw, write
    from tidepool.running.engine import core_of, start_engine
    from tidepool.vllm_plugin.served import NotServedError
    from tidepool.vllm_plugin.serving_plan import plan_of

    engines: list[Any] = []
    found: dict[str, str | None] = {}

    def start(name: str, **changes: Any) -> None:
        wanted = {"model": job["model"], "kv_cache_memory_bytes": 60_000_000, "max_model_len": 1024} | changes
        try:
            engines.append(start_engine("elastic", **wanted))
            found[name] = None
        except NotServedError as error:
            found[name] = str(error)

    start("none")
    start("allowed", additional_config={"tidepool": {"allow": ["device"]}})
    setup: Any = (plan_of(core_of(engines[-1]).vllm_config) or sys.exit("no plan")).setup
    path = write(setup, "tidepool verify")
    start("covered")
    start("another block", block_size=64)
    start("another dtype", mamba_ssm_cache_dtype="bfloat16")
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
    start("drafts", speculative_config=drafts)
    start(
        "drafts allowed as a device", speculative_config=drafts, additional_config={"tidepool": {"allow": ["device"]}}
    )
    path.write_text(path.read_text()[:-40], encoding="utf-8")
    start("cut")
    withdraw(setup)
    for field in ("vllm", "device", "attention"):
        write(setup._replace(**{field: "another"}), "tidepool verify")
    start("others")
    with open(job["answer"], "w", encoding="utf-8") as file:
        json.dump(found, file)


main()

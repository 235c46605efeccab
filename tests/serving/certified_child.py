"""Starts an engine that needs a certificate; run by test_certified.py.

The job names a checkpoint, the certificates' folder and arguments of vLLM's. Writes the reason why tidepool didn't
serve the engine, None if it did, and then its setup.
"""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    job = json.load(sys.stdin)
    os.environ |= {
        "TIDEPOOL": "elastic",
        "TIDEPOOL_CERTIFY_CPU": "1",
        "TIDEPOOL_CERTIFICATES": job["folder"],
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    from tidepool.running.engine import core_of, start_engine
    from tidepool.vllm_plugin.served import NotServedError
    from tidepool.vllm_plugin.serving_plan import plan_of

    wanted = {"model": job["model"], "kv_cache_memory_bytes": 60_000_000, "max_model_len": 1024}
    reason, setup = None, None
    try:
        plan = plan_of(core_of(start_engine("elastic", **wanted | job["arguments"])).vllm_config)
        setup = plan and plan.setup
    except NotServedError as error:
        reason = str(error)
    with open(job["answer"], "w", encoding="utf-8") as file:
        json.dump([reason, setup], file)


main()

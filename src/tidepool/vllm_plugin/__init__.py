"""The vLLM plugin: per-group pools at natural page sizes for hybrid models.

Entry point of the group ``vllm.general_plugins``; vLLM calls `register` in each of its processes. One file a seam:
`settings` and `gates` decide whether an engine is served, `planning` plans its memory, `pools` and `coordinator` keep
the scheduler's books, `worker` acts on blocks, `patches` ties them to vLLM, `compat` works around defects.
"""

import logging


def register() -> None:
    """Make vLLM able to start engines on tidepool's memory; engines it doesn't serve are unchanged."""
    from vllm.version import __version__

    from tidepool.vllm_plugin.compat import apply_compat
    from tidepool.vllm_plugin.gates import version_gate

    apply_compat()
    if closed := version_gate(__version__):
        logging.getLogger("vllm.tidepool").warning("tidepool steps aside, vLLM's own KV cache is used. %s.", closed)
        return
    from tidepool.vllm_plugin.patches import install

    install()

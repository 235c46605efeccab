"""The vLLM plugin: per-group pools at natural page sizes for hybrid models.

Entry point of the group ``vllm.general_plugins``; vLLM calls `register` in each of its processes. One file a job:

- `settings`, `asked`, `gates`: what the user wants, and what is unsupported;
- `deciding`, `serving_plan`: whether and how an engine is served, and who is told;
- `planning`, `ranks`: how its memory is laid out, on one rank and on several;
- `pools`, `coordinator`, `states`, `events`: the scheduler's books;
- `worker`: what workers do to blocks;
- `patches`, `wrappers`, `patching`, `builder`: how all this is put into vLLM; `compat` works around defects;
- `versions`: what differs between the versions of vLLM that are served.
"""

import logging


def register() -> None:
    """Make vLLM able to start engines on tidepool's memory; engines it doesn't serve are unchanged."""
    from tidepool.vllm_plugin import compat

    compat.platform_plugin()
    if reason := obstacle():
        logging.getLogger("vllm.tidepool").warning("tidepool falls back to vLLM's own KV cache. %s.", reason)
        return
    from tidepool.vllm_plugin import patches

    compat.apply_compat()
    patches.install()


def obstacle() -> str | None:
    """Why tidepool can't be put into this vLLM, as ``name: reason``, or None. Replaces nothing."""
    from vllm.version import __version__

    from tidepool.vllm_plugin.patching import PatchError
    from tidepool.vllm_plugin.versions import unsupported_version

    if unsupported := unsupported_version(__version__):
        return unsupported
    try:
        from tidepool.vllm_plugin import patches

        patches.check_here()
    except (ImportError, PatchError) as error:
        return f"patches: {error}"
    return None

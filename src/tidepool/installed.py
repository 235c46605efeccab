"""Whether vLLM is installed, and what to do if it isn't."""

from __future__ import annotations

from importlib.util import find_spec

NO_VLLM = (
    "vLLM isn't installed here: install tidepool with its extra cpu or cuda, as in pip install '.[cpu]' in a clone."
)


def has_vllm() -> bool:
    """Whether vLLM can be imported, without importing it."""
    return find_spec("vllm") is not None

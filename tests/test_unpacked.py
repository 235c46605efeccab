"""Versions of vLLM that are unpacked beside the installed one."""

from __future__ import annotations

from pathlib import Path
from zipfile import ZipFile

import pytest

from tidepool.running.unpacked import ENV, UnpackError, environment_with, folder_of, unpack


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel of a vLLM that there isn't, where pip finds it, and nothing else."""
    with ZipFile(tmp_path / "vllm-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("vllm/__init__.py", "")
        wheel.writestr("vllm/_C.abi3.so", "compiled")
        wheel.writestr("vllm-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: vllm\nVersion: 0.1.2\n")
        wheel.writestr("vllm-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("vllm-0.1.2.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv(ENV, str(tmp_path / "versions"))


def test_a_wheels_python_files_are_unpacked_once() -> None:
    with pytest.raises(UnpackError, match=r"vLLM 0\.1\.2 isn't here: python -m tidepool\.running\.unpacked 0\.1\.2"):
        environment_with("0.1.2", {})
    folder = unpack("0.1.2")
    assert folder == folder_of("0.1.2")
    files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert files == {"vllm/__init__.py", "vllm-0.1.2+cpu.dist-info/METADATA"}
    assert environment_with("0.1.2", {"PYTHONPATH": "mine"})["PYTHONPATH"] == f"{folder}:mine"
    assert list(folder.parent.iterdir()) == [folder], "the wheel is gone"
    (folder / "mark").touch()
    assert (unpack("0.1.2") / "mark").exists()


def test_what_pip_has_not_got_leaves_nothing() -> None:
    with pytest.raises(UnpackError, match=r"pip can't download vLLM 9\.9\.9"):
        unpack("9.9.9")
    assert not folder_of("9.9.9").exists()

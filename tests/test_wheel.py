"""What a wheel installs is all that a user needs."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since a build leaves files beside the sources; with what this environment has."""
    pytest.importorskip("setuptools", minversion="77")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")
    for name in filter(None, tracked):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), "."]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (built,) = out.glob("*.whl")
    return built


def test_it_holds_the_package_and_nothing_else(wheel: Path) -> None:
    assert wheel.name.startswith("vllm_tidepool-")
    names = zipfile.ZipFile(wheel).namelist()
    held = {Path(name).relative_to("tidepool") for name in names if name.startswith("tidepool/")}
    package = ROOT / "src" / "tidepool"
    there = {
        path.relative_to(package) for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }
    assert held == there
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"tidepool", "vllm_tidepool"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_a_fresh_environment_runs_it(wheel: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path)], check=True)
    # Its dependencies are lent by this environment; tidepool comes from the wheel, which is found first.
    library = tmp_path / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(tmp_path / "bin" / "python"),
        "install",
        "--no-deps",
        "--no-index",
    ]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)
    (library / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def run(*command: str) -> str:
        done = subprocess.run(
            [str(tmp_path / "bin" / command[0]), *command[1:]], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("python", "-c", "import tidepool; print(tidepool.__file__)").strip().startswith(str(library))
    entries = run(
        "python",
        "-c",
        "from importlib.metadata import entry_points as found\n"
        "print({e.load().__name__ for group in ('vllm.general_plugins', 'vllm.platform_plugins')"
        " for e in found(group=group) if 'tidepool' in e.name} ^ {'register', 'platform_plugin'})",
    )
    assert entries.strip() == "set()", "missing or more"
    assert "Nemotron-3-Nano-4B" in run("tidepool", "plan", "--list")
    assert "elastic" in run("tidepool", "plan", "Qwen3.5-4B", "--gpu", "4090")

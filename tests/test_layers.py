"""Dependencies point one way: which part of the package may import which."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src" / "tidepool"

SHARED = {"command_line", "sides", "sizes", "gpus", "page"}
LAYERS: dict[str, set[str]] = {
    "command_line": set(),
    "sides": set(),
    "sizes": {"command_line"},
    "gpus": {"command_line"},
    "page": set(),
    "certificates": set(),
    "cache": set(),
    "tqkv": {"cache"},
    "models": {"cache", "tqkv"},
    "capacity": {"cache", "sides"},
    "metrics": {"cache"},
    "vllm_plugin": {"cache", "tqkv", "capacity", "metrics", "sizes", "certificates"},
    "plan": {"cache", "tqkv", "models", "capacity", "vllm_plugin", *SHARED},
    "running": {"vllm_plugin", "sides", "command_line"},
    "testing": {"vllm_plugin"},
    "compare": {"running", "vllm_plugin", "testing", *SHARED},
    "verify": {"cache", "certificates", "running", "vllm_plugin", "testing", *SHARED},
    "replay": {"cache", "models", "plan", "running", "vllm_plugin", *SHARED},
    "observe": {"cache", "capacity", "metrics", "models", "replay", *SHARED},
    "cli": {"plan", "compare", "verify", "replay", "observe", "vllm_plugin", *SHARED},
    "__main__": {"cli"},
}
"""For each part what it may import, beside itself; a part stands below all that may import it."""


def imports() -> Iterator[tuple[str, str, str]]:
    """Every import of the package's own: place, importing part, imported part."""
    for path in sorted(PACKAGE.rglob("*.py")):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path}: imports name the package"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            for name in names:
                package, _, rest = name.partition(".")
                if package == "tidepool" and not rest.startswith("__"):
                    yield f"{path.relative_to(PACKAGE)}:{node.lineno}", part, rest.partition(".")[0]


def test_imports_point_down() -> None:
    found = list(imports())
    assert {part for _, part, _ in found} >= {"vllm_plugin", "cli"}
    wrong = [
        f"{place}: {part} imports {imported}"
        for place, part, imported in found
        if imported != part and imported not in LAYERS[part]
    ]
    assert not wrong


def test_the_table_has_no_circle_and_nothing_missing() -> None:
    below: set[str] = set()
    for part, allowed in LAYERS.items():
        assert allowed <= below, part
        below.add(part)
    parts = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert below == parts - {"__init__"}


def test_the_plugin_loads_no_catalogue() -> None:
    reached, left = set(), ["vllm_plugin"]
    while left:
        reached.add(part := left.pop())
        left += LAYERS[part] - reached
    assert reached.isdisjoint({"models", "plan"})

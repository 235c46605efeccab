"""Mutation tests of the core and the plugin: which small faults no test notices.

    python tools/mutate.py arena pool --budget 10
    python tools/mutate.py plugin.coordinator --sample 40

makes every mutant of `src/tidepool/cache/arena.py` and `pool.py` in turn, runs their tests against each, and prints
those that survive; then 40 of `src/tidepool/vllm_plugin/coordinator.py`, the same ones each time. A mutant is one
change inside a function or of a field's default: a comparison at its boundary, an operator, a number plus one, a
condition that always or never holds, an operand less, a statement less, min for max.
What isn't run, and so not changed: annotations, asserts, texts of errors, constants of modules and classes.

The tests are run once to time them. Each mutant then meets as many of them as the budget has time for: first the
fastest, then any; hypothesis neither shrinks nor remembers. So the score is what a part of the tests already finds.
Every mutant runs in a fork of a process that has pytest and hypothesis loaded, for the plugin also vLLM, and tidepool
not.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hypothesis.stateful
import pytest

ROOT = Path(__file__).resolve().parent.parent
SIZES = ("cache/spec", "cache/geometry")
MEMORY = ("cache/against_reference", "cache/arena", "cache/arena_stateful", "cache/pool", "cache/reuse")
PLUGIN = "plugin."
SET_UP = 40
"""Seconds that the imports of the plugin and its tests and the making of engines may take."""
SLOW_IMPORTS = ("vllm.v1.engine.core", "vllm.v1.worker.cpu_worker", "vllm.v1.core.sched.scheduler")
REQUESTS = tuple(
    f"vllm_plugin/{name}" for name in ("short_memory", "engine", "state_contents", "waiting_requests", "forks")
)
"""Managers of engine cores without a model, and those cores."""
HOST = ("vllm_plugin/host_copies", "vllm_plugin/events")
TESTS = {
    "spec": SIZES,
    "geometry": SIZES,
    "pool": MEMORY,
    "arena": MEMORY,
    "eviction": (*MEMORY, "cache/eviction"),
    "published": ("cache/published",),
    "reuse": ("cache/reuse",),
    "prompt_ends": ("cache/checkpoints", "cache/retention"),
    "branches": ("cache/branches", "cache/retention"),
    "checkpoints": ("cache/checkpoints", "cache/retention"),
    "retention": ("cache/retention",),
    "growth": ("cache/growth",),
    "plugin.coordinator": (*REQUESTS, "vllm_plugin/observing", *HOST),
    "plugin.pools": (*REQUESTS, *HOST),
    "plugin.states": (*REQUESTS, "speculative/lookups", *HOST),
    "plugin.wrappers": (
        "vllm_plugin/left_to_vllm",
        "vllm_plugin/capacity",
        "vllm_plugin/serving_plan",
        *REQUESTS,
        "vllm_plugin/progress",
    ),
    "plugin.planning": (
        *("vllm_plugin/gates", "vllm_plugin/left_to_vllm", "parallel/planning", "vllm_plugin/serving_plan"),
        *("vllm_plugin/engine", "vllm_plugin/state_contents"),
    ),
    "plugin.host": HOST,
    "plugin.events": ("vllm_plugin/events", "vllm_plugin/engine"),
    "plugin.capacity": ("vllm_plugin/capacity", "vllm_plugin/observing"),
}
"""The modules that are changed, and of each the test files that are its own."""

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.Div: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.LShift: ast.RShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "popitem": "clear"}

Change = tuple[Any, Any, Any]
"""(a node or a list, its attribute or index, what stands there instead)"""


def changes(node: ast.AST) -> Iterator[Change]:
    """Every change of this node itself."""
    match node:
        case ast.Compare(ops=ops):
            yield from ((ops, i, COMPARISONS[type(op)]()) for i, op in enumerate(ops))
        case ast.BinOp(op=op) | ast.AugAssign(op=op):
            yield node, "op", OPERATORS[type(op)]()
        case ast.BoolOp(values=values):
            yield from ((node, "values", [*values[:i], *values[i + 1 :]]) for i in range(len(values)))
        case ast.Constant(value=bool(value)):
            yield node, "value", not value
        case ast.Constant(value=int(value) | float(value)):
            yield node, "value", value + 1
        case ast.Name(id=name) if name in NAMES:
            yield node, "id", NAMES[name]
        case ast.UnaryOp(op=ast.Not()):
            yield node, "op", ast.UAdd()
        case ast.Return(value=ast.AST() as value) if not isinstance(value, ast.Constant):
            yield node, "value", ast.Constant(None)
        case ast.If() | ast.IfExp():
            yield from ((node, "test", ast.Constant(value)) for value in (True, False))
        case ast.comprehension(ifs=ifs):
            yield from ((ifs, i, ast.Constant(True)) for i in range(len(ifs)))
    for body in (getattr(node, name, ()) for name in ("body", "orelse")):
        for i, statement in enumerate(body if isinstance(body, list) else ()):
            target = statement.targets[0] if isinstance(statement, ast.Assign) else None
            call = isinstance(statement, ast.Expr) and not isinstance(statement.value, ast.Constant)
            if call or isinstance(target, ast.Attribute | ast.Subscript) or isinstance(statement, ast.AugAssign):
                yield body, i, ast.Pass()


def sites(node: ast.AST, *, runs: bool = False) -> Iterator[tuple[ast.AST, Change]]:
    """Every change under a node. ``runs`` is whether it lies in a function or a field's default."""
    if runs:
        yield from ((node, change) for change in changes(node))
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list") or (isinstance(node, ast.Raise) and name == "exc"):
            continue
        within = runs or isinstance(node, ast.FunctionDef) or (isinstance(node, ast.AnnAssign) and name == "value")
        for child in value if isinstance(value, list) else [value]:
            strict = isinstance(child, ast.keyword) and child.arg == "strict"
            if isinstance(child, ast.AST) and not isinstance(child, ast.Assert) and not strict:
                yield from sites(child, runs=within)


def mutants(source: str) -> Iterator[tuple[str, str]]:
    """(line and what was changed there, the module's source after it) of every mutant."""
    tree = ast.parse(source)
    for node, (holder, key, new) in sites(tree):
        # Of a statement with others in it only the first line is shown.
        one = isinstance(holder, list)
        old = holder[key] if one else getattr(holder, key)
        shown = old if isinstance(new, ast.Pass) else node
        line = getattr(shown, "lineno", getattr(old, "lineno", 0))
        before = ast.unparse(shown).splitlines()[0]
        (holder.__setitem__ if one else holder.__setattr__)(key, new)
        after = ast.unparse(new if isinstance(new, ast.Pass) else node).splitlines()[0]
        yield f"{line}: {before} -> {after}", ast.unparse(tree)
        (holder.__setitem__ if one else holder.__setattr__)(key, old)


class Fastest:
    """A plugin of pytest: times tests, and keeps the fastest only if their times are known."""

    def __init__(self, times: dict[str, float], budget: float) -> None:
        self.times = times
        self.budget = budget
        self.measured: dict[str, float] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keep the fastest."""
        if not self.times:
            return
        files = [item.path for item in items]
        items.sort(key=lambda item: self.times[item.nodeid])
        # Half of the budget is for the fastest, the rest for any.
        kept = list(self.within(self.budget / 2, items))
        others = [item for item in items[len(kept) :] if self.times[item.nodeid] < self.budget / 2]
        random.Random(0).shuffle(others)
        # Each file's together: pytest makes a file's fixtures anew whenever it comes back to it.
        items[:] = sorted([*kept, *self.within(self.budget / 2, others)], key=lambda item: files.index(item.path))

    def within(self, budget: float, items: Sequence[pytest.Item]) -> Iterator[pytest.Item]:
        """The first of these, until their times add up to the budget."""
        for item in items:
            budget -= self.times[item.nodeid]
            if budget < 0:
                return
            yield item

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        """Note a test's time, with that of the processes that it starts."""
        began = time.perf_counter()
        yield
        self.measured[item.nodeid] = time.perf_counter() - began


def run_tests(copy: Path, files: tuple[str, ...], plugin: Fastest, seconds: float, result: Path) -> int:
    """Run the tests of a copy of the repository in a fork. Returns what pytest does; not 0 if it was ended."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    os.dup2(os.open(result.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    os.dup2(1, 2)
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1,) * 2)
    if "vllm" in sys.modules:
        # vLLM asks for its plugins while it is imported.
        for module in [name for name in sys.modules if name.partition(".")[0] == "tidepool"]:
            del sys.modules[module]
    else:
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30,) * 2)
    sys.dont_write_bytecode = True
    os.environ["PYTHONPATH"] = str(copy / "src")
    sys.path.insert(0, str(copy / "src"))
    os.chdir(copy)
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    hypothesis.settings.register_profile("mutants", phases=phases, database=None, deadline=None, derandomize=True)
    hypothesis.settings.load_profile("mutants")
    paths = ["tests/{}/test_{}.py".format(*name.split("/")) for name in files]
    code = int(pytest.main(["-x", "-p", "no:cacheprovider", *paths], plugins=[plugin]))
    result.write_text(json.dumps(plugin.measured), encoding="utf-8")
    os._exit(code)


def module_path(module: str) -> Path:
    """Where a module lies in the repository."""
    folder, name = ("vllm_plugin", module.removeprefix(PLUGIN)) if module.startswith(PLUGIN) else ("cache", module)
    return Path("src") / "tidepool" / folder / f"{name}.py"


def main() -> None:
    """Print the survivors."""
    core = [module for module in TESTS if not module.startswith(PLUGIN)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", default=core, help=f"of {', '.join(TESTS)}; by default all of the core")
    parser.add_argument("--budget", type=float, default=5, help="seconds of tests that a mutant meets")
    parser.add_argument("--lines", type=int, nargs=2, default=(0, 1 << 30), help="the first and the last to change")
    parser.add_argument("--sample", type=int, help="how many mutants of each module, chosen at random; by default all")
    options = parser.parse_args()
    plugin = [module for module in options.modules if module.startswith(PLUGIN)]
    for module in SLOW_IMPORTS if plugin else ():
        importlib.import_module(module)
    with tempfile.TemporaryDirectory() as name:
        copy, result = Path(name), Path(name) / "result.json"
        shutil.copy(ROOT / "pyproject.toml", copy)
        for folder in ("src", "tests"):
            shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
        began = time.time()
        timed: set[str] = set()
        times: dict[str, float] = {}
        for module in options.modules:
            files = TESTS[module]
            if new := tuple(name for name in files if name not in timed):
                if run_tests(copy, new, Fastest({}, 0), 600, result):
                    sys.exit("The tests fail as it is:\n" + result.with_suffix(".log").read_text(encoding="utf-8"))
                measured = json.loads(result.read_text(encoding="utf-8"))
                print(f"{len(measured)} tests take {sum(measured.values()):.0f} seconds", flush=True)
                timed.update(new)
                times |= measured
            limit = 3 * options.budget + (5 if module not in plugin else SET_UP)
            path = copy / module_path(module)
            source = path.read_text(encoding="utf-8")
            first, last = options.lines
            chosen = [each for each in mutants(source) if first <= int(each[0].split(":")[0]) <= last]
            if options.sample is not None and options.sample < len(chosen):
                chosen = random.Random(0).sample(chosen, options.sample)
            killed = 0
            for what, mutant in chosen:
                path.write_text(mutant, encoding="utf-8")
                if run_tests(copy, files, Fastest(times, options.budget), limit, result):
                    killed += 1
                else:
                    print(f"{module}:{what[:160]}", flush=True)
            path.write_text(source, encoding="utf-8")
            print(f"{module}: {killed} of {len(chosen)} killed, {time.time() - began:.0f} seconds so far", flush=True)


if __name__ == "__main__":
    main()

"""Holds the walls between the rooms of the package by reading every import, without importing anything.

    cli → control → actors → {engines learning weights scheduling rewards tasks dashboard lab}
        → {algo config observability} → {records versions errors}

Imports point down only. Rooms in one pair of braces don't know each other, except that `lab` may use `learning`, that
`observability` judges by the limits a configuration sets, and that the bottom row is one vocabulary. An import inside
a function or under TYPE_CHECKING crosses a wall like any other: it is a dependency all the same. It is only lazy,
which some rooms may be with ray.
"""

import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "rlsys"

ROWS = [
    {"records", "versions", "errors"},
    {"algo", "config", "observability"},
    {"engines", "learning", "weights", "scheduling", "rewards", "tasks", "dashboard", "lab"},
    {"actors"},
    {"control"},
    {"cli_view"},  # what they show
    {"cli_cluster", "cli_dashboard", "cli_lab", "cli_local", "cli_report"},  # commands of one subject, mounted by cli
    {"cli", "__main__", ""},  # "": the package itself, which offers what is public
]
ROW_OF = {room: row for row, rooms in enumerate(ROWS) for room in rooms}
NEIGHBOURS = {("lab", "learning"), ("observability", "config"), ("__main__", "cli")}

# Who may import what from outside. Not named: anybody.
ONLY_IN = {
    "vllm": {"engines"},
    "ray": {"actors", "control", "cli"},
}
LAZILY_IN = {"ray": {"weights", "observability"}, "torch": {"versions"}}
AT_MOST_ONE_MODULE = {("observability", "ray")}
NOT_IN = {
    "torch": {"config", "scheduling", "observability", "dashboard"},
    "transformers": {"config", "scheduling", "observability", "dashboard"},
}
NOTHING_BUT = {"algo": {"torch"}, "records": {"numpy"}, "versions": set[str](), "errors": set[str]()}

LONGEST = 400
"""Lines of a module. A longer one has more than one subject: give the second a file."""


@dataclass(frozen=True)
class Import:
    module: str
    """The importing module, `rlsys.tasks.jsonl`."""
    line: int
    target: str
    """What it imports, `rlsys.config.schema` or `torch.nn`."""
    lazy: bool
    """Inside a function, or only for type checkers."""

    @property
    def place(self) -> str:
        return f"{self.module}, line {self.line}"


def room(module: str) -> str:
    """`tasks` of `rlsys.tasks.jsonl`; the empty string for the package itself."""
    return [*module.split("."), ""][1]


def imports(module: str, tree: ast.AST, *, package: bool = False) -> Iterator[Import]:
    """Every import of a module, wherever it stands. `package`: the source is that of an `__init__.py`."""

    def walk(node: ast.AST, lazy: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            for target in sorted(set(targets(child))):
                yield Import(module, child.lineno, target, lazy)  # type: ignore[attr-defined]
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            typing_only = isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")
            yield from walk(child, lazy or inside or typing_only)

    def targets(node: ast.AST) -> list[str]:
        match node:
            case ast.Import(names=names):
                return [alias.name for alias in names]
            case ast.ImportFrom(module=source, names=names, level=level):
                if level:
                    parents = module.split(".")[: len(module.split(".")) - level + package]
                    source = ".".join([*parents, source] if source else parents)
                # `from rlsys import config` names a room; `from rlsys.config import RunConfig` is in one already.
                inside = source == "rlsys"
                return [f"rlsys.{a.name}" if inside and a.name in ROW_OF else str(source) for a in names]
            case ast.Call(func=function, args=[ast.Constant(value=str(name)), *_]):
                return [name] if ast.unparse(function).endswith("import_module") else []
        return []

    yield from walk(tree, lazy=False)


def broken(found: Import) -> str | None:
    """Why this import is not allowed, or None."""
    here, top = room(found.module), found.target.split(".")[0]
    if here not in ROW_OF:
        return f"{here!r} is no room of the house: give it a row in ROWS, and say why in the commit"
    if top == "rlsys":
        there = room(found.target)
        if there not in ROW_OF:
            return f"{there!r} is no room of the house: give it a row in ROWS, and say why in the commit"
        climb = ROW_OF[there] - ROW_OF[here]
        if here == there or climb < 0 or ROW_OF[there] == 0 or (here, there) in NEIGHBOURS:
            return None
        if climb == 0:
            return f"{here} and {there} are neighbours, which control/build.py wires; move what both need down a row"
        return f"{there or 'rlsys itself'} stands above {here}, and imports point down only"
    if top in sys.stdlib_module_names:
        return None
    if here in LAZILY_IN.get(top, ()):
        return None if found.lazy else f"{here} may import {top} only inside a function"
    if here in NOTHING_BUT and top not in NOTHING_BUT[here]:
        return f"{here} needs nothing but {', '.join(sorted(NOTHING_BUT[here] | {'the standard library'}))}"
    if here in NOT_IN.get(top, ()):
        return f"{here} must work without {top}"
    if top in ONLY_IN and here not in ONLY_IN[top]:
        return f"only {', '.join(sorted(ONLY_IN[top]))} may know {top}"
    return None


def violations(sources: Mapping[str, str]) -> list[str]:
    """What breaks a rule in modules given by file name below the package and source text. One line each."""
    found, said = [], []
    for file, source in sources.items():
        name = ".".join(["rlsys", *Path(file).with_suffix("").parts]).removesuffix(".__init__")
        tree = ast.parse(source)
        found += list(imports(name, tree, package=file.endswith("__init__.py")))
        lines = source.count("\n")
        if lines > LONGEST:
            said.append(f"{name} has {lines} lines; at most {LONGEST}")
        if room(name) not in ("cli", "__main__"):
            said += [
                f"{name}, line {node.lineno}: print(); only the command line prints, others log or raise"
                for node in ast.walk(tree)
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
            ]
    said += [f"{one.place}: imports {one.target}: {why}" for one in found if (why := broken(one))]
    for here, top in sorted(AT_MOST_ONE_MODULE):
        modules = sorted({one.module for one in found if room(one.module) == here and one.target.split(".")[0] == top})
        if len(modules) > 1:
            said.append(f"{' and '.join(modules)} import {top}: {here} has one sink for it")
    return said


def test_the_package_keeps_to_the_house_rules() -> None:
    sources = {str(path.relative_to(PACKAGE)): path.read_text("utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
    assert len(sources) > 10
    problems = violations(sources)
    assert not problems, "\n" + "\n".join(problems)


@pytest.mark.parametrize(
    ("file", "source", "said"),
    [
        ("algo/x.py", "import rlsys.tasks.base", "tasks stands above algo, and imports point down only"),
        ("tasks/x.py", "from rlsys.rewards import base", "tasks and rewards are neighbours"),
        ("tasks/x.py", "from rlsys import rewards", "tasks and rewards are neighbours"),
        ("tasks/x.py", "from ..rewards.base import f", "tasks and rewards are neighbours"),
        ("tasks/__init__.py", "from ..rewards import f", "tasks and rewards are neighbours"),
        ("learning/x.py", "from rlsys.lab import f", "learning and lab are neighbours"),
        ("config/x.py", "def f():\n    from rlsys.algo import g", "config and algo are neighbours"),
        ("config/x.py", "if TYPE_CHECKING:\n    from rlsys.algo import g", "config and algo are neighbours"),
        ("records.py", "from rlsys.config import RunConfig", "config stands above records"),
        ("actors/x.py", "from rlsys import train", "rlsys itself stands above actors"),
        ("actors/x.py", "import_module('rlsys.control.loop')", "control stands above actors"),
        ("utils/x.py", "import os", "'utils' is no room of the house"),
        ("tasks/x.py", "import rlsys.utils", "'utils' is no room of the house"),
        ("control/x.py", "def f():\n    import vllm.config", "only engines may know vllm"),
        ("learning/x.py", "import ray", "only actors, cli, control may know ray"),
        ("learning/x.py", "def f():\n    import ray", "only actors, cli, control may know ray"),
        ("weights/x.py", "import ray", "weights may import ray only inside a function"),
        ("scheduling/x.py", "from torch import nn", "scheduling must work without torch"),
        ("config/x.py", "class A:\n    def f(self):\n        import torch", "config must work without torch"),
        ("algo/x.py", "import numpy as np", "algo needs nothing but the standard library, torch"),
        ("versions.py", "import torch", "versions may import torch only inside a function"),
        ("errors.py", "import torch", "errors needs nothing but the standard library"),
        ("control/x.py", "def f():\n    print('here')", "only the command line prints"),
        ("lab/x.py", "a = 1\n" * 401, "has 401 lines; at most 400"),
    ],
)
def test_a_broken_rule_is_found(file: str, source: str, said: str) -> None:
    (problem,) = violations({file: source})
    assert said in problem
    assert problem.startswith("rlsys." + file.removesuffix(".py").removesuffix("/__init__").replace("/", "."))


def test_a_second_module_of_observability_may_not_know_ray() -> None:
    lazily = "def f():\n    import ray.util.metrics"
    assert violations({"observability/a.py": lazily}) == []
    (problem,) = violations({"observability/a.py": lazily, "observability/b.py": lazily})
    assert problem == "rlsys.observability.a and rlsys.observability.b import ray: observability has one sink for it"


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("cli.py", "import ray, rlsys.control, rlsys.records\nprint('hello')"),
        ("__init__.py", "from rlsys.config import RunConfig"),
        ("control/build.py", "import ray\nfrom rlsys.tasks import f\nfrom rlsys.rewards import g"),
        ("weights/x.py", "def f():\n    import ray"),
        ("weights/x.py", "if typing.TYPE_CHECKING:\n    import ray"),
        ("lab/x.py", "from rlsys.learning import f"),
        ("tasks/x.py", "from . import base\nfrom .base import Task\nfrom ..config import ArithmeticTask"),
        ("versions.py", "def f():\n    import torch"),
        ("algo/x.py", "import math, torch\nfrom rlsys.errors import NonFiniteError"),
        ("records.py", "from rlsys.versions import VersionSpan"),
        ("lab/x.py", "console.print('a method is not the function')"),
    ],
)
def test_what_the_rules_allow_is_not_refused(file: str, source: str) -> None:
    assert violations({file: source}) == []

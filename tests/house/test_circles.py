"""No module imports another that imports it: not later, inside a function, and not for types alone either."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOT_OURS = {"tests", "benchmarks", "docs", "build", "dist", "configs"}  # folders without modules of the package


def read_modules(root: Path) -> dict[str, Path]:
    """Files of the package's modules, by name below the package; a package is the name of its folder."""
    found = {}
    for file in root.rglob("*.py"):
        parts = file.relative_to(root).with_suffix("").parts
        if parts[0] not in NOT_OURS and not any(part.startswith(".") for part in parts):
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imported(name: str, file: Path) -> Iterator[str]:
    """Full names, below the package, of what a file imports from the package, wherever the import stands."""
    package = name.split(".") if file.name == "__init__.py" and name else name.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (x.name.removeprefix("foveal.") for x in node.names if x.name.startswith("foveal."))
        if isinstance(node, ast.ImportFrom):
            if not node.level and node.module and node.module.split(".")[0] == "foveal":
                base = node.module.split(".")[1:]
            elif node.level:
                base = package[: len(package) - node.level + 1] + (node.module or "").split(".")
            else:
                continue
            for x in node.names:
                yield ".".join(part for part in (*base, x.name) if part)


def import_graph(root: Path) -> dict[str, set[str]]:
    """For every module the modules that it imports; an import of a name counts as one of the module that holds it."""
    modules = read_modules(root)
    graph = {}
    for name, file in modules.items():
        graph[name] = set()
        for target in imported(name, file):
            while target not in modules and target:
                target = target.rpartition(".")[0]
            if target in modules and target != name:
                graph[name].add(target)
    return graph


def components(graph: dict[str, set[str]]) -> list[frozenset[str]]:
    """Modules that reach each other, several at a time."""
    reached = {}
    for name in graph:
        seen, stack = set(), [name]
        while stack:
            for target in graph[stack.pop()] - seen:
                seen.add(target)
                stack.append(target)
        reached[name] = seen
    circles = {frozenset(x for x in reached[name] if name in reached[x]) for name in graph if name in reached[name]}
    return sorted(circles, key=sorted)


def test_no_circles():
    graph = import_graph(ROOT)
    assert len(graph) > 100
    for circle in components(graph):
        try:
            TopologicalSorter({name: graph[name] & circle for name in circle}).prepare()
        except CycleError as error:
            pytest.fail(f"modules import each other: {' → '.join(reversed(error.args[1]))}")


@pytest.mark.parametrize(
    "b",
    [
        "from . import a",
        "from .a import X",
        "def f():\n    from . import a",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from foveal.kernels.a import X",
        "import foveal.kernels.a",
    ],
)
def test_every_kind_of_import_counts(tmp_path, b):
    folder = tmp_path / "kernels"
    folder.mkdir()
    (folder / "a.py").write_text("from .b import Y")
    (folder / "b.py").write_text(b)
    (folder / "c.py").write_text("from . import a, b")
    assert components(import_graph(tmp_path)) == [frozenset({"kernels.a", "kernels.b"})]

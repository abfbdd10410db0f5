"""Claims about the engine's own files: which knows which, and how large they are."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import lighterage

FOLDER = Path(lighterage.__file__).parent / "engine"
PATHS = {
    path.relative_to(FOLDER).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__"): path
    for path in sorted(FOLDER.rglob("*.py"))
}
DOOR = "planning"


def imports_of(module: str) -> Iterator[tuple[str, str]]:
    """The engine's modules that `module` imports, for types alone too, and each name that it takes."""
    path = PATHS[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or node.level == 0 or node.level > len(package) + 1:
            continue
        base = package[: len(package) - (node.level - 1)]
        source = ".".join([*base, *filter(None, [node.module])])
        for alias in node.names:
            inner = ".".join(filter(None, [source, alias.name]))
            yield (inner, "") if inner in PATHS else (source, alias.name)


def test_no_two_files_need_each_other() -> None:
    graph = {module: {source for source, _ in imports_of(module)} - {module} for module in PATHS}
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert order.index("allocation") < order.index("planning.run") < order.index("planning") < order.index("offloader")
    assert sum(map(len, graph.values())) > 100


def test_planning_is_come_to_by_one_door() -> None:
    came = {
        (source, name)
        for module in PATHS
        if not module.startswith(DOOR)
        for source, name in imports_of(module)
        if source.startswith(DOOR)
    }
    assert came == {(DOOR, "Autoplan")}


@pytest.mark.parametrize("module", [module for module in PATHS if PATHS[module].stat().st_size])
def test_each_file_says_what_it_is_for_and_can_be_read_at_a_sitting(module: str) -> None:
    text = PATHS[module].read_text()
    docstring = ast.get_docstring(ast.parse(text))
    assert docstring is not None and docstring.partition("\n")[0].endswith(".")
    assert len(text.splitlines()) <= 400

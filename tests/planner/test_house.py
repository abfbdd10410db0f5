"""The planner knows numbers only."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import lighterage
import lighterage.planner.plan

FOLDER = Path(lighterage.__file__).parent / "planner"
ALLOWED_PACKAGE = {"lighterage.errors"}


def imports_of(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = {0: "", 1: "lighterage.planner", 2: "lighterage"}[node.level]
            names.add(".".join(filter(None, (base, node.module))))
    return names


def test_it_imports_the_standard_library_its_own_files_and_the_errors():
    paths = sorted(FOLDER.glob("*.py"))
    assert len(paths) > 10
    for path in paths:
        for name in imports_of(path):
            own = name.startswith("lighterage.planner") or name in ALLOWED_PACKAGE
            assert own or name.partition(".")[0] in sys.stdlib_module_names, f"{path.name} imports {name}"
    errors = imports_of(FOLDER.parent / "errors.py")
    assert errors == {"__future__"}


def test_nothing_in_it_looks_at_the_clock_or_at_chance():
    forbidden = {"time", "random", "datetime", "secrets", "os"}
    for path in FOLDER.glob("*.py"):
        assert not imports_of(path) & forbidden, path.name


def test_the_root_has_the_functions_and_the_data():
    assert callable(lighterage.plan) and callable(lighterage.simulate)
    assert lighterage.planner.plan.Plan is lighterage.Plan
    for name in ("Plan", "Timeline", "Prediction", "Link", "Goal", "BudgetError", "plan", "simulate"):
        assert name in lighterage.__all__

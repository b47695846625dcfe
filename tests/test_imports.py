"""Imports point one way: commands -> engine -> data, modeling, checkpoint -> surgery -> layers -> torch."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

from paths import ROOT

# A package imports packages before it, and those of its own line.
ORDER = [
    {"layers"},
    {"surgery"},
    {"modeling", "checkpoint", "data", "command_names", "config", "config_files", "config_keys", "safe_yaml", "solver", "predictor", "export", "visualization"},
    {"engine"},
    {"comparison", "classification", "benchmark"},
    {"commands"},
]  # fmt: skip
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
MODULES = sorted((ROOT / "mabn_d2").rglob("*.py"))


def imported(path):
    """Yield the modules that a file imports, by absolute name."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            yield module
            if module == "mabn_d2":  # from .. import engine
                yield from (f"{module}.{name.name}" for name in node.names)


def part(module):
    """Return the package of mabn_d2 that a module belongs to."""
    names = module.split(".")
    return names[1] if names[0] == "mabn_d2" and len(names) > 1 else None


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    own = part(".".join(path.relative_to(ROOT).with_suffix("").parts))
    if own == "__init__":
        return
    assert own in RANK, f"add {own} to ORDER"
    for module in imported(path):
        other = part(module)
        if other in RANK:
            assert RANK[other] <= RANK[own], module
        if RANK[own] <= RANK["surgery"]:
            assert module.split(".")[0] != "detectron2", module


def test_no_package_imports_itself_by_way_of_others():
    graph = {name: set() for name in RANK}
    for path in MODULES:
        own = part(".".join(path.relative_to(ROOT).with_suffix("").parts))
        if own in RANK:
            graph[own] |= {part(module) for module in imported(path)} & RANK.keys() - {own}
    graphlib.TopologicalSorter(graph).prepare()


def test_scripts_import_no_script():
    scripts = {path.stem for path in Path(ROOT / "tools").glob("*.py")}
    for path in (ROOT / "tools").glob("*.py"):
        assert not scripts & set(imported(path)), path


def test_the_import_causes_no_warning():
    command = [sys.executable, "-W", "always", "-c", "import mabn_d2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert str(ROOT / "mabn_d2") not in done.stderr

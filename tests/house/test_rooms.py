"""The walls of the house: how large its rooms are, who may import whom, and that a name means one thing."""

from __future__ import annotations

import ast
import collections
import graphlib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("engine", "kernels", "storage", "pages")
LONGEST_FUNCTION = 60  # lines

#: Who stands above whom; a room imports its own and those after it.
FLOORS = ("pages", "storage", "engine", "kernels")


def modules() -> dict[str, Path]:
    """Every module of the project by its dotted name."""
    files = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
    return {_name(file): file for file in [*files, ROOT / "app.py"]}


def _name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the project that a file imports, in functions and under TYPE_CHECKING too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & known.keys()
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found |= {whole if whole in known else node.module} & known.keys()
    return found - {_name(file)}


def public_classes() -> Iterator[tuple[str, str]]:
    """(class, module) of every class at the top of a module that is not private."""
    for name, file in modules().items():
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                yield node.name, name


def test_no_circle_of_imports():
    known = modules()
    graph = {name: imports(file, known) for name, file in known.items()}
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_nothing_imports_upwards():
    known = modules()
    for name, file in known.items():
        floor = name.partition(".")[0]
        if floor == "app":
            continue
        above = FLOORS[: FLOORS.index(floor)]
        wrong = {other for other in imports(file, known) if other.partition(".")[0] in above}
        assert not wrong, f"{name} imports {wrong}"


def test_public_class_names_mean_one_thing():
    places = collections.defaultdict(list)
    for name, module in public_classes():
        places[name].append(module)
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def test_ground_floors_keep_what_every_room_uses_and_no_more():
    assert len(list((ROOT / "engine").glob("*.py"))) <= 16
    assert len(list((ROOT / "engine" / "capacity").glob("*.py"))) <= 8


def test_the_step_is_alone_in_the_core():
    assert len((ROOT / "engine" / "core.py").read_text().splitlines()) <= 500


def test_functions_fit_a_screen():
    """But for kernels, whose parameters are data, and migrations, which stay as they were run."""
    long = {}
    for name, file in modules().items():
        for node in ast.walk(ast.parse(file.read_text())):
            data = name.startswith(("kernels.", "storage.migrations."))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not data:
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > LONGEST_FUNCTION:
                    long[f"{name}.{node.name}"] = lines
    assert long == {}


def test_the_entrance_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 900

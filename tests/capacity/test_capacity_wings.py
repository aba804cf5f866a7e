"""The planner's wings are built on one another in one direction, and each name of a format is looked up once a plan."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from engine import capacity
from engine.capacity import PlanRequest, find_gpu, formats, model_spec, plan
from engine.capacity.memory import request as requests
from engine.capacity.model import spec as specs

ROOT = Path(capacity.__file__).parent
#: What stands below what; the files of the root are the ground that all stand on.
ORDER = ("root", "model", "memory", "speed", "advice")


def _wing(module: str) -> str:
    """The wing that a module of the planner is in: "memory" of engine.capacity.memory.kv, "root" of its own files."""
    below = module.removeprefix("engine.capacity").strip(".").split(".")[0]
    return below if below in ORDER else "root"


def _imports(path: Path) -> set[str]:
    """The planner's modules that a file imports, lazily or not; examples in docstrings are not counted."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if name.startswith("engine.")}


FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_wing_imports_only_what_stands_below_it(path: Path):
    folder = path.relative_to(ROOT).parts[0]
    own = ORDER.index(folder if folder in ORDER else "root")
    planner = {name for name in _imports(path) if name.startswith("engine.capacity.")}
    above = {name for name in planner if ORDER.index(_wing(name)) > own}
    assert not above, f"{folder} imports what stands above it: {above}"
    others = {name for name in _imports(path) - planner if not name.startswith("engine.errors")}
    assert not others, f"the planner is pure: {others}"


def test_planner_has_every_wing_and_few_files_on_its_ground_floor():
    assert {path.parent.name for path in ROOT.rglob("*.py") if path.parent != ROOT} == set(ORDER[1:])
    assert len(list(ROOT.glob("*.py"))) <= 8


@pytest.fixture
def lookups(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, str]]:
    """How often each name of a format is looked up: (function, name) → times."""
    counted: Counter[tuple[str, str]] = Counter()
    for function in ("compute_dtype", "weight_precision", "kv_precision"):
        real = getattr(formats, function)

        def counting(name: str, *rest: Any, _real: Any = real, **options: Any) -> Any:
            counted[_real.__name__, str(name)] += 1
            return _real(name, *rest, **options)

        for module in (formats, requests, specs):
            if hasattr(module, function):
                monkeypatch.setattr(module, function, counting)
    return counted


@pytest.mark.parametrize("profile", ["vllm-0.19", "headroom", "transformers"])
@pytest.mark.parametrize(
    ("weights", "kv_dtype", "dtype"),
    [("fp8", "fp8", "bf16"), ("int4-g64", "int8", None), ("q4_k_m", "auto", "fp16"), (None, "auto", None)],
)
def test_each_name_of_a_format_is_looked_up_at_most_once_in_a_plan(
    lookups: Counter[tuple[str, str]], profile: str, weights: str | None, kv_dtype: str, dtype: str | None
):
    spec = model_spec("Llama-3.1-8B")
    wanted = PlanRequest(
        spec, find_gpu("L4"), profile=profile, weights=weights, kv_dtype=kv_dtype, dtype=dtype, context=2000
    )
    lookups.clear()
    plan(wanted)
    assert lookups["kv_precision", kv_dtype] == lookups["compute_dtype", dtype or "bfloat16"] == 1
    assert lookups["weight_precision", str(weights)] == (weights is not None)
    assert max(lookups.values()) == 1, lookups


def test_leaves_of_memory_take_formats_not_their_names():
    """No function of the memory wing but those that read a request asks for a format by a string."""
    named = {"dtype", "weights", "kv_dtype", "precision", "format"}
    for path in sorted((ROOT / "memory").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                arguments = [*node.args.args, *node.args.kwonlyargs]
                texts = {a.arg for a in arguments if a.annotation is not None and "str" in ast.unparse(a.annotation)}
                assert not texts & named, f"{path.name}: {node.name} takes {texts & named} as text"
                assert len(arguments) <= 6, f"{path.name}: {node.name} takes {len(arguments)} loose parameters"

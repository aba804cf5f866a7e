"""Which public functions and classes no product code reaches: found in the source, nothing is imported or run.

A name is reached from the statements of a module, from a function that a decorator hands to a framework, and from
everything reached. Of a class its methods are looked into once somebody uses an attribute of their name.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("engine", "kernels", "storage", "pages")
#: Decorators that hand a function to somebody who calls it, by what they contain.
_REGISTERS = ("app.", "router.", "command", "callback", "listens_for", "register_fake", "fragment", "cache_")

Key = tuple[str, str]
_Function = ast.FunctionDef | ast.AsyncFunctionDef


class Source:
    """The product's modules and what their names mean."""

    def __init__(self, root: Path = ROOT) -> None:
        files = [path for room in ROOMS for path in sorted((root / room).rglob("*.py"))]
        files += [path for path in [root / "app.py"] if path.exists()]
        self.trees = {_module_name(path.relative_to(root)): ast.parse(path.read_text("utf-8")) for path in files}
        self.defined: dict[Key, _Function | ast.ClassDef] = {
            (module, node.name): node
            for module, tree in self.trees.items()
            for node in tree.body
            if isinstance(node, _Function | ast.ClassDef)
        }
        self._imported = {module: dict(_imports(tree)) for module, tree in self.trees.items()}

    def meaning(self, module: str, name: str) -> Key | str | None:
        """What ``name`` is in a module: a definition, another module, or something of a library (None)."""
        seen: set[Key] = set()
        while (module, name) not in self.defined:
            found = self._imported.get(module, {}).get(name)
            if found is None or (module, name) in seen:
                return None
            seen.add((module, name))
            if f"{found[0]}.{found[1]}" in self.trees:
                return f"{found[0]}.{found[1]}"
            module, name = found
        return module, name

    def uses(self, module: str, node: ast.AST) -> tuple[set[Key], set[str]]:
        """Definitions and names of attributes that a piece of a module uses."""
        keys: set[Key] = set()
        attributes: set[str] = set()
        exported = _exported(node)
        for part in ast.walk(node):
            found: Key | str | None = None
            if isinstance(part, ast.Name):
                found = self.meaning(module, part.id)
            elif isinstance(part, ast.Attribute):
                attributes.add(part.attr)
                owner = self.meaning(module, part.value.id) if isinstance(part.value, ast.Name) else None
                found = self.meaning(owner, part.attr) if isinstance(owner, str) else None
            elif isinstance(part, ast.Constant) and isinstance(part.value, str) and part.value.isidentifier():
                attributes.add(part.value)  # getattr
                found = self.meaning(module, part.value) if part.value in exported else None
            if isinstance(found, tuple):
                keys.add(found)
        return keys, attributes


def reached(source: Source, roots: Collection[Key] = ()) -> set[Key]:
    """Every definition that product code gets to, and what ``roots`` get to besides."""
    keys: set[Key] = set(roots)
    attributes: set[str] = set()
    looked_into: set[ast.AST] = set()

    def look_into(module: str, node: ast.AST) -> None:
        if node not in looked_into:
            looked_into.add(node)
            more, names = source.uses(module, node)
            keys.update(more)
            attributes.update(names)

    for module, tree in source.trees.items():
        for node in tree.body:
            if not isinstance(node, _Function | ast.ClassDef) or _is_registered(node):
                look_into(module, node)
    before = (-1, -1)
    while before != (before := (len(keys), len(attributes))):
        for module, name in list(keys):
            node = source.defined[module, name]
            if isinstance(node, ast.ClassDef):
                parts = [*node.bases, *node.decorator_list]
                parts += [part for part in node.body if _is_used(part, attributes)]
            else:
                parts = [node]
            for part in parts:
                look_into(module, part)
    return keys


def uncalled(source: Source, modules: tuple[str, ...], roots: Collection[Key] = ()) -> set[Key]:
    """Public definitions in rooms (``"kernels"``, ``"engine"``) that nothing reaches, as (module, name)."""
    public = {key for key in source.defined if key[0].startswith(modules) and not key[1].startswith("_")}
    registered = {key for key in public if _is_registered(source.defined[key])}
    shapes = {key for key in public if "Protocol" in map(ast.unparse, getattr(source.defined[key], "bases", []))}
    return public - registered - shapes - reached(source, roots)


def _is_registered(node: ast.stmt) -> bool:
    decorators = getattr(node, "decorator_list", [])
    return isinstance(node, _Function) and any(
        word in ast.unparse(decorator) for decorator in decorators for word in _REGISTERS
    )


def _is_used(part: ast.stmt, attributes: set[str]) -> bool:
    return not isinstance(part, _Function) or part.name.startswith("__") or part.name in attributes


def _exported(node: ast.AST) -> set[str]:
    """What a statement ``__all__ = […]`` names."""
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
        return set(ast.literal_eval(node.value))
    return set()


def _module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(tree: ast.Module) -> Iterator[tuple[str, Key]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield alias.asname or alias.name, (node.module, alias.name)

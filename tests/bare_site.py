"""A Python that has a few packages only, as other people's images do: who imports more is found out."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def make_bare_site(packages: Iterable[str], folder: Path) -> None:
    """Fill ``folder`` with links to distributions and to all that they require, extras left out.

    With ``python -S`` and the folder as ``PYTHONPATH`` nothing else that is installed can be imported.

    Raises:
        PackageNotFoundError: if one of ``packages`` is not installed.
    """
    folder.mkdir(parents=True)
    for distribution in _with_requirements(packages):
        for name in {path.parts[0] for path in distribution.files or ()} - {"..", "__pycache__"}:
            link = folder / name
            if not link.is_symlink():  # a namespace that several distributions fill
                link.symlink_to(Path(str(distribution.locate_file(name))))


def _with_requirements(packages: Iterable[str]) -> Iterator[importlib.metadata.Distribution]:
    pending, seen = list(packages), set[str]()
    while pending:
        name = canonicalize_name(pending.pop())
        if name in seen:
            continue
        seen.add(name)
        distribution = importlib.metadata.distribution(name)
        yield distribution
        for requirement in map(Requirement, distribution.requires or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                pending.append(requirement.name)

"""Compiled layers on disk, so that the second start is quick.

    HEADROOM_HOME/cache/compiled/<digest>/
        1-1.json      {"low": 1, "high": 1}: the shape for one token is complete
        1-1.0.pt2     its program for layers of kind 0 (AOTInductor package: a shared library), 1-1.1.pt2 …
        2-12.json     another, for 2 to 12 tokens
    HEADROOM_HOME/cache/inductor/   what the compiler itself keeps: objects, precompiled headers

The digest covers everything that a program depends on. The marker is written last and in one piece, so whatever
happens to a compiler, a shape is there wholly or not at all.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import platform
from pathlib import Path

import torch

from engine.device import capability
from engine.execution.base import TokenRange
from engine.execution.blueprint import DecoderBlueprint
from engine.paths import cache_dir
from kernels.trust import why_not_trusted

UNBOUNDED = 2**31 - 1  # a program that is right for any number of tokens from its lowest on
_ROOT = Path(__file__).parents[2]
_SOURCES = ("engine/execution", "engine/layers", "engine/models", "engine/quantization", "kernels")
_SUFFIXES = (".py", ".cpp", ".h")


def compiler_cache_dir() -> Path:
    """Where the compiler keeps its intermediate results."""
    return cache_dir() / "inductor"


def packages_dir(blueprint: DecoderBlueprint, device: torch.device) -> Path:
    """The folder of the programs for these layers on this machine."""
    if device.type == "cuda":
        machine = "cuda {}.{}".format(*capability(device))
    else:
        machine = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return cache_dir() / "compiled" / blueprint.digest(_code(), torch.__version__, device.type, machine)[:32]


@functools.cache
def _code() -> str:
    """Hex SHA-256 over the source that layers are traced from: a structure names classes, not what they do."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in _SOURCES for path in (_ROOT / folder).rglob("*") if path.suffix in _SUFFIXES):
        digest.update(f"{path.relative_to(_ROOT)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True, slots=True)
class PackagedShape:
    """One complete shape on disk.

    Attributes:
        tokens: the numbers of tokens it serves.
        programs: the package of each kind of layer.
    """

    tokens: TokenRange
    programs: tuple[Path, ...]


def program_path(folder: Path, tokens: TokenRange, kind: int) -> Path:
    """Where the program of one kind of layer lies."""
    return folder / f"{tokens.low}-{tokens.high}.{kind}.pt2"


def mark_complete(folder: Path, tokens: TokenRange) -> None:
    """Say that all programs of a shape are there."""
    marker = folder / f"{tokens.low}-{tokens.high}.json"
    partial = marker.with_suffix(f".{os.getpid()}.tmp")
    partial.write_text(json.dumps({"low": tokens.low, "high": tokens.high}))
    partial.replace(marker)


def find_shape(folder: Path, low: int, num_kinds: int) -> PackagedShape | None:
    """The complete shape that begins at ``low`` and reaches furthest, if there is one.

    Programs that somebody else could have written count as missing: they are compiled again.
    """
    found: PackagedShape | None = None
    for marker in folder.glob(f"{low}-*.json"):
        tokens = TokenRange(**json.loads(marker.read_text()))
        programs = tuple(program_path(folder, tokens, kind) for kind in range(num_kinds))
        longer = found is None or tokens.high > found.tokens.high
        if longer and all(program.is_file() and why_not_trusted(program) is None for program in programs):
            found = PackagedShape(tokens, programs)
    return found

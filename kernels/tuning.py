"""Which of a kernel's named configurations is launched for a shape: a measured one where there is one, else a rule's.

A kernel's module names its configurations (``CONFIGS: dict[str, …]``) and has a rule that picks one from the shape.
Tables of measurements take precedence over the rule: the user's own (``HEADROOM_HOME/tuned/<gpu>.json``, written by
``python -m kernels.tune``), then those that are shipped (``kernels/tuned/<gpu>.json``). Nothing is timed at a launch: a
step that serves requests, or a CUDA graph that is being captured, is no place for it.

A table: ``{"<kernel>": {"<key>": {"config": "<name>", "us": <microseconds>}}, "provenance": {…}}``.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import torch

from kernels.device import gpu_name
from kernels.trust import home

SHIPPED = Path(__file__).parent / "tuned"


def select(kernel: str, key: tuple[int | str, ...], default: str, device: torch.device) -> str:
    """Name of the configuration to launch.

    Args:
        kernel: the operation's name, e.g. ``"weight_only_linear"``.
        key: what the best configuration depends on, sizes rounded by the kernel (as to the next power of two).
        default: the rule's answer.
        device: where it will run; only CUDA devices have tables.
    """
    if device.type != "cuda":
        return default
    return _select(kernel, key, default, gpu_slug(device.index or 0))


def key_text(key: tuple[int | str, ...]) -> str:
    """A key as a table spells it: ``16 4096 int4``."""
    return " ".join(map(str, key))


@functools.cache
def gpu_slug(index: int) -> str:
    """``nvidia-h200``: the file name of a GPU's tables."""
    return re.sub(r"[^a-z0-9]+", "-", gpu_name(index).lower()).strip("-")


@functools.cache
def _select(kernel: str, key: tuple[int | str, ...], default: str, slug: str) -> str:
    for table in (_read(own_tables() / f"{slug}.json"), _read(SHIPPED / f"{slug}.json")):
        entry = table.get(kernel, {}).get(key_text(key))
        if entry is not None:
            return str(entry["config"])
    return default


def own_tables() -> Path:
    """Where this user's measurements lie."""
    return home() / "tuned"


def forget() -> None:
    """Read the tables again at the next launch."""
    _select.cache_clear()
    _read.cache_clear()


@functools.cache
def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}

"""What a run was made with: versions, hardware, code revision. Quick, and asked for only once a process."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
import socket
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine import __version__
from engine.measure.results import Provenance

if TYPE_CHECKING:
    from engine.measure.workloads import Workload
    from engine.outputs import EngineStatus

_ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "gguf", "numpy")


def collect_provenance(status: EngineStatus, workload: Workload, workload_hash: str, seed: int) -> Provenance:
    """Everything needed to repeat a run.

    Args:
        status: of the engine, as it is now.
        workload_hash: of the expanded requests, see :func:`engine.measure.prompts.workload_hash`.
    """
    revision, dirty = code_revision()
    return Provenance(
        model=status.model["name"],
        model_fingerprint=status.model["fingerprint"],
        config=status.config,
        config_hash=status.config_hash,
        workload=workload.to_dict(),
        workload_hash=workload_hash,
        seed=seed,
        versions=versions(),
        hardware=hardware(),
        code_revision=revision,
        code_dirty=dirty,
        path=status.path,
    )


def versions() -> dict[str, str]:
    """Versions of Headroom, Python and the packages that decide the numbers; "" for one that is not installed."""
    return dict(_versions())


def hardware() -> dict[str, Any]:
    """CPU, cores, memory, GPUs, driver. The host's name only as a hash: enough to tell two machines apart."""
    return {**_hardware(), "torch_threads": _torch_threads()}


@functools.cache
def code_revision() -> tuple[str, bool | None]:
    """(git commit, whether tracked or new files differ from it) of this source tree; ("", None) outside a checkout.

    The state at the first call: what a running process has imported does not change with later edits.
    """
    revision = _git("rev-parse", "HEAD")
    top = _git("rev-parse", "--show-toplevel")
    if revision is None or top is None or Path(top).resolve() != _ROOT:  # e.g. installed inside another repository
        return "", None
    changes = _git("status", "--porcelain")
    return revision, None if changes is None else bool(changes)


def _git(*arguments: str) -> str | None:
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}  # a look must not take the index lock from the user
    try:
        done = subprocess.run(
            ["git", "-C", str(_ROOT), *arguments],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
            env=environment,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


@functools.cache
def _versions() -> tuple[tuple[str, str], ...]:
    found = {"headroom": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = ""
    return tuple(found.items())


@functools.cache
def _hardware() -> dict[str, Any]:
    import psutil

    return {
        "cpu": _cpu_name(),
        "cores_physical": psutil.cpu_count(logical=False),
        "cores_logical": psutil.cpu_count(logical=True),
        "cores_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "host_hash": hashlib.sha256(socket.gethostname().encode()).hexdigest()[:12],
        **_torch_hardware(),
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _torch_hardware() -> dict[str, Any]:
    import torch

    from engine.device import gpu_properties, num_gpus

    gpus = []
    for index in range(num_gpus()):
        properties = gpu_properties(torch.device("cuda", index))
        gpus.append({"name": properties.name, "memory_bytes": properties.total_memory})
    return {
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpus": gpus,
        "cuda": torch.version.cuda or "",
        "driver": _driver_version(),
    }


def _driver_version() -> str:
    try:
        first = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0]
    except (OSError, IndexError):
        return ""
    return first.partition(":")[2].strip()


def _torch_threads() -> int:
    import torch

    return torch.get_num_threads()

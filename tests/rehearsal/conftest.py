"""Simulated GPUs for the tests of this room."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine import device as engine_device
from kernels import paged_attention, tuning
from kernels.dispatch import triton_installed, triton_interpreted
from tests.family_cases import FALLBACKS, FAMILIES, save_random_model
from tests.rehearsal.simulated_gpu import Simulation

if not triton_installed() or triton_interpreted():
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def _device_guard(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A device guard for CUDA in this process: a torch without CUDA has none, and its bindings want one."""
    if torch.backends.cuda.is_built():
        return
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("the rehearsal needs a C++ compiler")
    home = Path(torch.__file__).parent
    library = tmp_path_factory.mktemp("device-guard") / "guard.so"
    source = Path(__file__).with_name("device_guard.cpp")
    flags = ["-shared", "-fPIC", "-std=c++20", f"-I{home / 'include'}", f"-L{home / 'lib'}", "-lc10"]
    subprocess.run([compiler, str(source), *flags, "-o", str(library)], check=True, capture_output=True)
    ctypes.CDLL(str(library))


@pytest.fixture(scope="session")
def folders(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny random models: every family, and those that run through transformers."""
    made = {}
    for name, config in {**FAMILIES, **FALLBACKS}.items():
        made[name] = save_random_model(config, tmp_path_factory.mktemp("model"), tiny_llama)
    return made


@pytest.fixture
def simulation(tiny_llama: Path, _device_guard: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulation]:
    """Two simulated GPUs; afterwards nothing that they refused may have been swallowed."""
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    simulated = Simulation()
    paged_attention._capability.cache_clear()
    tuning.gpu_slug.cache_clear()
    # a module that moves to another device makes its parameters again: assigned in place they would be the CPU's still
    monkeypatch.setattr(torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True)
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with simulated:
            yield simulated
        assert simulated.mistakes == []
    finally:
        torch._C._set_only_lift_cpu_tensors(before)
        paged_attention._capability.cache_clear()
        tuning.gpu_slug.cache_clear()


@pytest.fixture
def runtime(simulation: Simulation, monkeypatch: pytest.MonkeyPatch):
    """What answers for CUDA, with Triton's launches looked at."""
    from kernels import device as kernels_device
    from tests.rehearsal.launches import LaunchPad
    from tests.rehearsal.runtime import SimulatedRuntime

    simulated = SimulatedRuntime(simulation)
    monkeypatch.setattr(kernels_device.torch.cuda, "get_device_capability", simulated.capability)
    monkeypatch.setattr(kernels_device.torch.cuda, "get_device_name", lambda index: "Simulated GPU")
    LaunchPad(simulation, simulated).install(monkeypatch)
    with engine_device.using(simulated):
        yield simulated

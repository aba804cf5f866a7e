"""The devices of the machine that the dashboard runs on, as GPUs of the planner."""

from __future__ import annotations

import shutil
import subprocess

import psutil
import streamlit as st

from engine.capacity import Gpu, custom_gpu, find_gpu
from engine.capacity.hardware import with_memory
from engine.capacity.text import GIB
from engine.errors import HeadroomError

PREFIX = "This machine"
_MIB_PER_GIB = 1024
_TIMEOUT_S = 5


@st.cache_data(show_spinner=False)
def machine_gpus() -> dict[str, Gpu]:
    """``{label: device}``: every NVIDIA GPU that the driver lists, then main memory. Read once."""
    devices: dict[str, Gpu] = {}
    for name, memory_gib in _nvidia_gpus():
        devices[f"{PREFIX}: {name} ({memory_gib:,.1f} GiB)"] = _described(name, memory_gib)
    memory_gib = psutil.virtual_memory().total / GIB
    label = f"{PREFIX}: CPU ({memory_gib:,.1f} GiB RAM)"
    devices[label] = custom_gpu("this machine's CPU", round(memory_gib, 2), "all of its main memory")
    return devices


def _described(name: str, memory_gib: float) -> Gpu:
    try:
        return with_memory(find_gpu(name), memory_gib)
    except HeadroomError:
        return custom_gpu(name, memory_gib, "as its driver reports")


def _nvidia_gpus() -> list[tuple[str, float]]:
    """(name, GiB) of each distinct GPU; none where there is no driver."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    found = []
    for line in output.splitlines():
        name, _, mib = line.rpartition(",")
        if name and mib.strip().isdigit():
            found.append((name.strip(), round(int(mib) / _MIB_PER_GIB, 2)))
    return list(dict.fromkeys(found))

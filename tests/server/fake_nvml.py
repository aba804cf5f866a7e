"""The real ``pynvml`` over a library of our own in place of NVIDIA's, compiled from ``fake_nvml.c`` when asked for.

In a test's own process :func:`installed` puts it where pynvml keeps the library that it has loaded; another process
finds it by itself, with the folder of :func:`library` in its ``LD_LIBRARY_PATH``.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pynvml
import pytest

SOURCE = Path(__file__).with_name("fake_nvml.c")
NOT_SUPPORTED, NO_PERMISSION, UNKNOWN, GPU_IS_LOST, DRIVER_NOT_LOADED = 3, 4, 999, 15, 9


def uuid(index: int = 0) -> str:
    """The name that the fake gives a device."""
    return f"GPU-00000000-0000-0000-0000-{index:012d}"


@functools.cache
def library(old_driver: bool = False) -> Path:
    """The compiled library; skips the test where there is no C compiler.

    Args:
        old_driver: without the functions of newer drivers.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler (cc, gcc or clang) to build the fake management library with")
    target = Path(tempfile.mkdtemp(prefix="fake-nvml-")) / "libnvidia-ml.so.1"
    options = ["-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-Wno-unused-variable", "-D_GNU_SOURCE"]
    options += ["-DOLD_DRIVER"] if old_driver else []
    subprocess.run([compiler, *options, "-o", str(target), str(SOURCE)], check=True, timeout=60)
    return target


class FakeNvml:
    """Sets what the library says.

    Args:
        loaded: the library, loaded by :mod:`ctypes`.
    """

    def __init__(self, loaded: ctypes.CDLL) -> None:
        self._library = loaded
        loaded.fake_set.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_longlong]
        loaded.fake_fail.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_int]
        loaded.fake_reset()

    def set(self, device: int = -1, **values: int) -> None:
        """Readings of a device, or of all: names and units of ``fake_nvml.c``; ``devices`` is how many there are."""
        for name, value in values.items():
            assert self._library.fake_set(device, name.encode(), value), name

    def fail(self, function: str, code: int, device: int = -1) -> None:
        """Let a function of NVML answer with this error from now on; 0 heals it."""
        self._library.fake_fail(function.encode(), device, code)

    @property
    def references(self) -> int:
        """How often the library was initialized and not shut down."""
        return int(self._library.fake_references())


@contextlib.contextmanager
def installed(old_driver: bool = False) -> Iterator[FakeNvml]:
    """pynvml talks to the fake library while the body runs."""
    previous = pynvml.nvmlLib, dict(pynvml._nvmlGetFunctionPointer_cache)
    loaded = ctypes.CDLL(str(library(old_driver)))
    pynvml.nvmlLib = loaded
    pynvml._nvmlGetFunctionPointer_cache.clear()
    try:
        yield FakeNvml(loaded)
    finally:
        pynvml.nvmlLib = previous[0]
        pynvml._nvmlGetFunctionPointer_cache.clear()
        pynvml._nvmlGetFunctionPointer_cache.update(previous[1])

"""Builds the sources in ``native/`` for this machine and loads it.

The library is compiled for the instruction set at hand (``-march=native``), kept below ``HEADROOM_HOME`` under a name
that hashes its source, the compiler, the flags and the processor, and loaded through :mod:`ctypes`. It shares the
OpenMP runtime that torch has loaded, hence torch's threads: two thread pools would fight for the cores.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import math
import os
import platform
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from kernels.trust import PRIVATE_FILE, home, private_dir, why_not_trusted

SOURCES = Path(__file__).with_name("native")
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fno-math-errno", "-ffp-contract=fast", "-fPIC", "-fopenmp")
_COMPILERS = ("c++", "g++", "clang++")
_PATIENCE_S = 300.0
# Seconds that the build took on two cores of a server; other machines pass a tenth of it sooner or later.
_EXPECTED_S = 25.0
_REPORT_EVERY_S = 0.25

Progress = Callable[[float], None]


class NativeBuildError(RuntimeError):
    """The kernels are unavailable on this machine; the message says why, in a sentence."""


@dataclasses.dataclass(frozen=True, slots=True)
class Native:
    """The loaded library.

    Attributes:
        functions: of the loaded library, argument types declared.
        panel: outputs that lie side by side in the packed weights.
        lanes: floats of a vector register; head dimensions must be a multiple of it.
    """

    functions: ctypes.CDLL
    panel: int
    lanes: int

    @property
    def isa(self) -> str:
        """The width of its vectors in words, for the record."""
        return {16: "avx512", 8: "avx2"}.get(self.lanes, f"{32 * self.lanes}-bit vectors")


@functools.cache
def native() -> Native:
    """The kernels of this machine, built if need be (a few seconds, once).

    Raises:
        NativeBuildError: if there is no compiler, or it fails.
    """
    library = ctypes.CDLL(str(_built()))
    _declare(library)
    return Native(library, int(library.headroom_panel()), int(library.headroom_lanes()))


@functools.cache
def why_not() -> str | None:
    """None if :func:`native` works here, else the reason in a sentence."""
    try:
        native()
    except (NativeBuildError, OSError) as error:
        return str(error)
    return None


def build(progress: Progress) -> None:
    """Build the kernels if they are not there yet, saying how far that is: the compiler does not, so it is the time
    gone by over the time expected, which nears 1 without reaching it. A failure is left to :func:`why_not`.

    Args:
        progress: called with the fraction done, a few times a second, from this thread; not at all if nothing is built.
    """
    done = threading.Event()

    def work() -> None:
        with contextlib.suppress(NativeBuildError, OSError):
            _built()
        done.set()

    with contextlib.suppress(NativeBuildError, OSError):
        if _target(_compiler()).exists():
            return
        threading.Thread(target=work, name="build-kernels", daemon=True).start()
        began = time.monotonic()
        while True:
            progress(1.0 - math.exp(-(time.monotonic() - began) / (0.5 * _EXPECTED_S)))
            if done.wait(_REPORT_EVERY_S):
                return


def _target(compiler: str) -> Path:
    return _folder() / f"native-{_digest(compiler)}.so"


def _folder() -> Path:
    return private_dir(home() / "cache" / "native", home())


def _built() -> Path:
    compiler = _compiler()
    target = _target(compiler)
    if reason := why_not_trusted(target.parent):
        raise NativeBuildError(reason)
    if not target.exists() or why_not_trusted(target):  # what somebody else could have written is made again
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            made = Path(scratch) / "native.so"
            _run([compiler, *_FLAGS, "-c", str(SOURCES / "native.cpp"), "-o", f"{scratch}/native.o"])
            _run([compiler, "-shared", f"{scratch}/native.o", *_openmp(), "-o", str(made)])
            made.chmod(PRIVATE_FILE)
            os.replace(made, target)  # at once: another process may be building the same file
    return target


def _compiler() -> str:
    wanted = os.environ.get("CXX")
    for name in (wanted,) if wanted else _COMPILERS:
        if path := shutil.which(name):
            return path
    raise NativeBuildError(f"there is no C++ compiler ({wanted or ', '.join(_COMPILERS)}) on this machine.")


def _digest(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    sources = [path.read_text(encoding="utf-8") for path in sorted(SOURCES.iterdir())]
    facts = (*sources, version, " ".join(_FLAGS), _processor(), str(torch.__version__))
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


def _processor() -> str:
    """What ``-march=native`` depends on: a home on a shared disk may be used by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _openmp() -> list[str]:
    """The OpenMP runtime that came with torch, else the compiler's own."""
    bundled = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))
    return [str(bundled[0])] if bundled else ["-fopenmp"]


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeBuildError(f"{command[0]} could not be run: {error}.") from error
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise NativeBuildError(f"{command[0]} failed: {last}.")


def _declare(library: ctypes.CDLL) -> None:
    pointer, integer, number = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    signatures: dict[str, list[type]] = {
        "headroom_panel": [],
        "headroom_lanes": [],
        "headroom_linear": [
            *(pointer, integer, number, integer, pointer, pointer, pointer, pointer),
            *(number, number, number, pointer, integer),
        ],
        "headroom_rows": [
            *(integer, pointer, pointer, pointer, number, number, number, pointer, number, pointer),
        ],
        "headroom_kv_write": [pointer, pointer, number, number, pointer, pointer, pointer, number, number],
        "headroom_kv_quantize": [
            *(pointer, pointer, integer, number, number, pointer, pointer, pointer, pointer, integer),
            *(pointer, number, number, number),
        ],
        "headroom_decode_step": [pointer, pointer, integer],
        "headroom_attention": [
            *(pointer, pointer, pointer, pointer, pointer, integer, pointer, integer, pointer, pointer, pointer),
            *(number, number, number, number, number, number, number, number, ctypes.c_float, integer),
        ],
    }
    for name, arguments in signatures.items():
        function = getattr(library, name)
        function.argtypes = arguments
        function.restype = integer if not arguments else None

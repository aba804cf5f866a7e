"""The engine's side of the compiling process, and whether there is a compiler at all."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from engine.execution.base import TokenRange
from engine.execution.compile_worker import CompileRequest
from engine.execution.packages import compiler_cache_dir


class CompileError(Exception):
    """A shape could not be compiled; the message says why."""


def missing_compiler() -> str | None:
    """Name of the C++ compiler that compiled execution needs and this machine does not have; None if it has it."""
    name = os.environ.get("CXX", "g++")
    return name if shutil.which(name) is None else None


class CompilerProcess:
    """One compiling process; started at the first shape, ended with :meth:`close` or when this process ends."""

    def __init__(self, request: CompileRequest) -> None:
        self._request = request
        self._process: subprocess.Popen[bytes] | None = None
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed with the object
        self._closed = False
        self._lock = threading.Lock()

    def compile(self, wanted: TokenRange) -> None:
        """Compile a shape, from ``wanted.low`` on, into the folder and wait for it.

        Raises:
            CompileError: if it failed, or the process was closed meanwhile.
        """
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(f"{wanted.low} {wanted.high}\n".encode())
            process.stdin.flush()
            line = process.stdout.readline()
        except (OSError, ValueError):
            line = b""
        reply: dict[str, Any] = json.loads(line) if line else {"error": self._last_line()}
        if "error" in reply:
            raise CompileError(reply["error"])

    def close(self) -> None:
        """End the process and whatever it has started; from any thread."""
        with self._lock:
            self._closed = True
            process = self._process
        if process is not None and process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _running(self) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._closed:
                raise CompileError("cancelled")
            if self._process is None or self._process.poll() is not None:
                self._process = self._start()
            return self._process

    def _start(self) -> subprocess.Popen[bytes]:
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        environment = {
            **os.environ,
            "PYTHONPATH": path,
            "TORCHINDUCTOR_CACHE_DIR": str(compiler_cache_dir()),
            "OMP_NUM_THREADS": "1",
        }
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "engine.execution.compile_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
            start_new_session=True,  # a group of its own: its compilers end with it
        )
        assert process.stdin is not None
        document = pickle.dumps(self._request)
        with contextlib.suppress(BrokenPipeError):  # a process that died at once is noticed at the first shape
            process.stdin.write(len(document).to_bytes(8, "little") + document)
            process.stdin.flush()
        return process

    def _last_line(self) -> str:
        if self._closed:
            return "cancelled"
        self._log.seek(0)
        lines = [line for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        return f"the compiling process died: {lines[-1][:300] if lines else 'without a message'}"

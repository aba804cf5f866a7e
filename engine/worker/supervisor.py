"""Starting, watching and restarting a worker process. A crash in it is a state here, never an exception elsewhere."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import json
import os
import secrets
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import IO, Literal

from engine.config import EngineConfig
from engine.paths import headroom_home, private_dir
from engine.server.limits import ServerLimits, limits_from_environment
from engine.worker.client import EngineClient, EngineUnreachableError
from kernels.trust import private_file

ProcessState = Literal["starting", "running", "dead"]

_LOG_LINES = 40
_LOG_TAIL_BYTES = 16_384
_LOGS_KEPT = 10
_DRAIN_S = 2.0
_STOP_TIMEOUT_S = 9.0  # besides draining: longer than the worker takes to end itself by force
_PROJECT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True, slots=True)
class WorkerState:
    """What became of the process.

    Attributes:
        state: "starting" until its port answers, "running", or "dead".
        exit_code: of a dead process, negative for a signal; None while it lives or if it was never started.
        log: its last lines.
    """

    state: ProcessState
    exit_code: int | None
    log: tuple[str, ...]


class Worker:
    """One worker process and its successors. Thread-safe.

    Args:
        model: what it loads at start.
        config: the knobs it starts with; ``model`` there is ignored.
        limits: how much it accepts from outside. If not given, what the environment says (``HEADROOM_MAX_BODY_BYTES``
            and so on), else the defaults, with a shorter time to drain: people wait for a restart.
    """

    def __init__(self, model: str, config: EngineConfig | None = None, limits: ServerLimits | None = None) -> None:
        self._limits = limits or limits_from_environment(drain_seconds=_DRAIN_S)
        self._config = (config or EngineConfig()).with_changes({"model": model})
        self._lock = threading.RLock()
        self._process: subprocess.Popen[bytes] | None = None
        self._client: EngineClient | None = None
        self._token = ""
        self._starts = 0
        self._log_path: Path | None = None
        self._ready_path: Path | None = None
        atexit.register(self.stop)

    @property
    def pid(self) -> int | None:
        """Process id of the worker, None before the first start."""
        return None if self._process is None else self._process.pid

    @property
    def client(self) -> EngineClient:
        """The client of the process that runs now.

        Raises:
            EngineUnreachableError: if its port is not open yet, or it is dead.
        """
        with self._lock:
            if self._client is None:
                port = self._port()
                if port is None:
                    raise EngineUnreachableError("the worker has not opened its port yet.", remedy="Wait a moment.")
                self._client = EngineClient(f"http://127.0.0.1:{port}", self._token)
            return self._client

    def start(self) -> None:
        """Start the process, unless one is alive."""
        with self._lock:
            if self._process is not None and self._process.poll() is None:
                return
            self._forget_client()
            self._token = secrets.token_urlsafe(24)
            self._starts += 1
            logs = _log_folder()
            name = f"worker-{os.getpid()}-{self._starts}"
            self._log_path, self._ready_path = logs / f"{name}.log", logs / f"{name}.ready"
            self._ready_path.unlink(missing_ok=True)
            with private_file(self._log_path).open("wb") as log:
                self._process = self._spawn(log)

    def poll(self) -> WorkerState:
        """The state now; never raises, never blocks."""
        with self._lock:
            log = self._tail()
            if self._process is None:
                return WorkerState("dead", None, log)
            exit_code = self._process.poll()
            if exit_code is not None:
                return WorkerState("dead", exit_code, log)
            return WorkerState("running" if self._port() is not None else "starting", None, log)

    def restart(self) -> None:
        """End the process if it is alive and start another one with the same model and knobs."""
        with self._lock:
            self.stop()
            self.start()

    def stop(self) -> None:
        """End the process: SIGTERM, then SIGKILL after a grace period."""
        with self._lock:
            process = self._process
            self._forget_client()
            if process is None or process.poll() is not None:
                return
            process.terminate()
            try:
                process.wait(self._limits.drain_seconds + _STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _spawn(self, log: IO[bytes]) -> subprocess.Popen[bytes]:
        assert self._ready_path is not None
        command = [sys.executable, "-m", "engine", "serve", "--model", self._config.model, "--port", "0"]
        command += ["--parent-pid", str(os.getpid()), "--ready-file", str(self._ready_path)]
        defaults = EngineConfig().to_dict()
        for name, value in self._config.to_dict().items():
            if name != "model" and value != defaults[name]:
                command += ["--set", f"{name}={'auto' if value is None else value}"]
        for name, limit in dataclasses.asdict(self._limits).items():
            command += [f"--{name.replace('_', '-')}", str(limit)]
        # The token travels in the environment, as an API key does (HEADROOM_API_KEY): arguments are readable by every
        # user of the machine.
        environment = {**os.environ, "HEADROOM_ADMIN_TOKEN": self._token, "PYTHONUNBUFFERED": "1"}
        return subprocess.Popen(
            command,
            cwd=_PROJECT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            umask=0o077,  # what the worker writes is this user's alone
        )

    def _port(self) -> int | None:
        if self._ready_path is None:
            return None
        try:
            return int(json.loads(self._ready_path.read_text())["port"])
        except (OSError, ValueError, KeyError):
            return None

    def _tail(self) -> tuple[str, ...]:
        if self._log_path is None:
            return ()
        try:
            with self._log_path.open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - _LOG_TAIL_BYTES))
                text = log.read().decode(errors="replace")
        except OSError:
            return ()
        # Progress bars overwrite their line with carriage returns: only what was last visible is of interest.
        lines = [line.rsplit("\r", 1)[-1] for line in text.splitlines()]
        return tuple(line for line in lines if line.strip())[-_LOG_LINES:]

    def _forget_client(self) -> None:
        if self._client is not None:
            with contextlib.suppress(Exception):
                self._client.close()
        self._client = None
        if self._ready_path is not None:
            self._ready_path.unlink(missing_ok=True)


def _log_folder() -> Path:
    """Where logs go: under HEADROOM_HOME or, where that cannot be written, a folder for temporary files."""
    folder = headroom_home() / "logs"
    try:
        private_dir(folder)
        _drop_old_logs(folder)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return Path(tempfile.mkdtemp(prefix="headroom-logs-"))


def _drop_old_logs(folder: Path) -> None:
    """Keep the newest logs only."""
    logs = sorted(folder.glob("worker-*.log"), key=lambda path: path.stat().st_mtime)
    for path in logs[: -_LOGS_KEPT + 1]:
        path.unlink(missing_ok=True)
        path.with_suffix(".ready").unlink(missing_ok=True)

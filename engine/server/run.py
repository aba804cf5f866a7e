"""Running the worker: socket, ready file, and ending with the process that started it."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import FrameType

import uvicorn

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.server.app import create_app
from engine.server.host import EngineHost
from engine.telemetry_sampler import TelemetrySampler, interval_from_environment

_PARENT_POLL_S = 0.5
_SHUTDOWN_GRACE_S = 3


def serve(
    config: EngineConfig,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    admin_token: str | None = None,
    parent_pid: int | None = None,
    ready_file: Path | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, or until the parent has gone. Blocks.

    Args:
        config: the model to load and its knobs; loading goes on in the background while the port answers.
        host, port: where to listen; port 0 takes a free one.
        admin_token: for the admin API; a fresh one is printed to standard error if not given.
        parent_pid: end when this process is no longer the parent.
        ready_file: written (``{"port", "pid"}``) once the port accepts connections.

    Raises:
        ConfigError: if the port cannot be had, the ready file not be written, or the telemetry's interval is wrong.
    """
    telemetry = TelemetrySampler(interval_from_environment())
    if admin_token is None:
        admin_token = secrets.token_urlsafe(24)
        print(f"admin token: {admin_token}", file=sys.stderr, flush=True)
    listener = _listen(host, port)
    bound_port = listener.getsockname()[1]
    app = create_app(config, admin_token=admin_token, telemetry=telemetry)
    options = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=_SHUTDOWN_GRACE_S, lifespan="off")
    server = _WorkerServer(options, app.state.host)
    if parent_pid is not None:
        threading.Thread(target=_end_with_parent, args=(parent_pid,), name="parent-watch", daemon=True).start()
    print(f"serving {config.model} on http://{host}:{bound_port}", file=sys.stderr, flush=True)
    if ready_file is not None:
        _write_ready_file(ready_file, bound_port)
    try:
        server.run(sockets=[listener])
    finally:
        if ready_file is not None:
            ready_file.unlink(missing_ok=True)
    if not server.ended:  # a thread deep in torch: an orderly end of the interpreter under it could crash or hang
        sys.stderr.flush()
        os._exit(0)


class _WorkerServer(uvicorn.Server):
    """Answers what is in flight before it ends, and ends with exit code 0 when it was asked to.

    Attributes:
        ended: the engine's threads have ended too.
    """

    def __init__(self, config: uvicorn.Config, host: EngineHost) -> None:
        super().__init__(config)
        self.ended = False
        self._host = host

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """As uvicorn does it, except that the signal is not raised again at the end: it has been obeyed."""
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Streams end with an error that says why, instead of breaking off."""
        self.ended = await asyncio.to_thread(self._host.close, _SHUTDOWN_GRACE_S)
        await super().shutdown(sockets)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as problem:
        listener.close()
        raise ConfigError(
            f"{host}:{port} cannot be listened on ({problem.strerror or problem}).",
            field="port",
            remedy="Choose another port, or 0 for a free one.",
        ) from problem
    listener.listen(2048)
    return listener


def _write_ready_file(path: Path, port: int) -> None:
    part = path.with_suffix(".part")
    try:
        part.write_text(json.dumps({"port": port, "pid": os.getpid()}))
        os.replace(part, path)  # a reader sees all of it or nothing
    except OSError as problem:
        raise ConfigError(
            f"{path} cannot be written ({problem.strerror or problem}).",
            field="ready_file",
            remedy="Free some space, or name a file in a folder that can be written.",
        ) from problem


def _end_with_parent(parent_pid: int) -> None:
    """Poll rather than PR_SET_PDEATHSIG: that fires when the *thread* that started us ends, and web servers' do."""
    while os.getppid() == parent_pid:
        time.sleep(_PARENT_POLL_S)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_SHUTDOWN_GRACE_S + 2)
    os._exit(1)

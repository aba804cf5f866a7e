"""Running the worker: socket, ready file, draining, and ending with the process that started it."""

from __future__ import annotations

import asyncio
import faulthandler
import functools
import gc
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.server.app import create_app
from engine.server.limits import DoorSettings, ServerLimits, allowed_hosts, api_key_from
from engine.server.protocol import server_options
from engine.telemetry.sampler import TelemetrySampler, interval_from_environment
from engine.worker.logs import configure_logging

_PARENT_POLL_S = 0.5
_DRAIN_POLL_S = 0.05
# Seconds for which one thread may keep the others from Python: at the interpreter's 5 ms an answer, which needs the
# interpreter a dozen times, waits a dozen times as long for a stepping thread that is busy.
_SWITCH_INTERVAL_S = 0.001
# After draining: seconds for the engine to stop, and as many for the last answers to be written.
SHUTDOWN_GRACE_S = 3


def longest_shutdown_s(limits: ServerLimits) -> float:
    """Seconds after SIGTERM within which the process has ended, whatever hangs in it."""
    return limits.drain_seconds + 2 * SHUTDOWN_GRACE_S + 2


def door_settings(
    bound: str,
    *,
    hosts: Sequence[str] = (),
    api_key: str | None = None,
    cors_origins: Sequence[str] = (),
    served_names: Sequence[str] = (),
) -> DoorSettings:
    """Who may come in, from what the operator says.

    Args:
        bound: the address listened on.

    Raises:
        ConfigError: naming what cannot be used.
    """
    for name in served_names:
        if not name.strip() or not name.isprintable():
            remedy = "Give a printable name."
            raise ConfigError(f"{name!r} is not a usable name.", field="served_model_name", remedy=remedy)
    for origin in cors_origins:
        if origin != "*" and not origin.startswith(("http://", "https://")):
            remedy = "Give origins such as https://chat.example.org, or *."
            raise ConfigError(f"{origin!r} is not an origin.", field="cors_origin", remedy=remedy)
    return DoorSettings(
        allowed_hosts=allowed_hosts(bound, hosts, lambda text: _say(f"warning: {text}")),
        api_key=api_key_from(api_key),
        cors_origins=tuple(origin.rstrip("/") for origin in cors_origins),
        served_names=tuple(dict.fromkeys(served_names)),
    )


def serve(
    config: EngineConfig,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    admin_token: str | None = None,
    parent_pid: int | None = None,
    ready_file: Path | None = None,
    limits: ServerLimits | None = None,
    door: DoorSettings | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, or until the parent has gone. Blocks.

    Args:
        config: the model to load and its knobs; loading goes on in the background while the port answers.
        host, port: where to listen; port 0 takes a free one.
        admin_token: for the admin API; a fresh one is printed to standard error if not given.
        parent_pid: end when this process is no longer the parent.
        ready_file: written (``{"port", "pid"}``) once the port accepts connections.
        limits: how much is accepted from outside, and how long answers get to end.
        door: who may come in; those who ask for this machine by its loopback names if not given.

    Raises:
        ConfigError: if the port is unavailable, the ready file cannot be written, or the telemetry's interval or the
            log level is wrong.
    """
    configure_logging()
    limits = limits or ServerLimits()
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    telemetry = TelemetrySampler(interval_from_environment())
    if admin_token is None:
        admin_token = secrets.token_urlsafe(24)
        _say(f"admin token: {admin_token}")
    listener = _listen(host, port)
    bound_port = listener.getsockname()[1]
    app = create_app(
        config,
        admin_token=admin_token,
        telemetry=telemetry,
        limits=limits,
        door=door or door_settings(host),
        before_load=_freeze_imports,
    )
    if parent_pid is not None:
        watch = (parent_pid, longest_shutdown_s(limits))
        threading.Thread(target=_end_with_parent, args=watch, name="parent-watch", daemon=True).start()
    _say(f"serving {config.model} on http://{f'[{host}]' if ':' in host else host}:{bound_port}")
    _run(app, listener, limits, ready_file)


def _run(app: FastAPI, listener: socket.socket, limits: ServerLimits, ready_file: Path | None) -> None:
    """Serve until the server ends; in most cases the process ends with it."""
    options = uvicorn.Config(app, timeout_graceful_shutdown=SHUTDOWN_GRACE_S, **server_options(limits))

    def forget() -> None:
        if ready_file is not None:
            ready_file.unlink(missing_ok=True)

    server = WorkerServer(options, app, limits, forget)
    if threading.current_thread() is threading.main_thread():
        # uvicorn listens to signals once it runs; whoever reads the ready file may send one before.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, server.handle_exit)
    if ready_file is not None:
        _write_ready_file(ready_file, listener.getsockname()[1])
    try:
        server.run(sockets=[listener])
    finally:
        forget()
    if server.should_exit or not server.ended:
        # Everything of ours has been closed. What an orderly end of the interpreter would wait for is threads of others
        # and, where one is deep in torch, it could crash or hang.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


@functools.cache
def _freeze_imports() -> None:
    """Take what is imported, a quarter of a million objects, out of the garbage collector's sight: looking through it
    stops every thread for a seventh of a second, whenever requests have left enough garbage. Models come after it."""
    from transformers import AutoTokenizer  # noqa: F401  what a load imports

    gc.collect()
    gc.freeze()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class WorkerServer(uvicorn.Server):
    """Lets what is in flight end before it ends itself, and ends with exit code 0 when it was asked to.

    Args:
        app: made by :func:`engine.server.app.create_app`.
        before_forced_end: called if the process must be ended in the midst of something.

    Attributes:
        ended: the engine's threads have ended too.
    """

    def __init__(
        self, config: uvicorn.Config, app: FastAPI, limits: ServerLimits, before_forced_end: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self.ended = False
        self._app = app
        self._limits = limits
        self._before_forced_end = before_forced_end

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """As uvicorn does it, except that the signal is not raised again at the end: it has been obeyed."""
        self.force_exit = self.should_exit and sig == signal.SIGINT
        if not self.should_exit:
            self._set_deadline()
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Streams get their time to end; those that do not end with an error that says why, instead of breaking off."""
        state = self._app.state
        state.gate.draining = True
        state.jobs.cancel_all()
        end = time.monotonic() + self._limits.drain_seconds
        while state.gate.active and time.monotonic() < end and not self.force_exit:
            await asyncio.sleep(_DRAIN_POLL_S)
        state.texts.close()
        self.ended = await asyncio.to_thread(state.host.close, SHUTDOWN_GRACE_S)
        await super().shutdown(sockets)

    def _set_deadline(self) -> None:
        """The process ends, whatever hangs in it: by a thread or, where no thread gets its turn, without Python."""
        seconds = longest_shutdown_s(self._limits)

        def force() -> None:
            time.sleep(seconds)
            _say("forced to end: something did not end by itself")
            self._before_forced_end()
            os._exit(0)

        threading.Thread(target=force, name="shutdown-deadline", daemon=True).start()
        faulthandler.dump_traceback_later(seconds + 3, exit=True)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {host}:{port} ({error.strerror or error}).",
            field="port",
            remedy="Choose another port, or 0 for a free one.",
        ) from error
    listener.listen(2048)
    return listener


def _write_ready_file(path: Path, port: int) -> None:
    part = path.with_suffix(".part")
    try:
        part.write_text(json.dumps({"port": port, "pid": os.getpid()}))
        os.replace(part, path)  # a reader sees all of it or nothing
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written ({error.strerror or error}).",
            field="ready_file",
            remedy="Free some space, or name a file in a folder that can be written.",
        ) from error


def _end_with_parent(parent_pid: int, longest_shutdown: float) -> None:
    """Poll rather than PR_SET_PDEATHSIG: that fires when the *thread* that started us ends, and web servers' do."""
    while os.getppid() == parent_pid:
        time.sleep(_PARENT_POLL_S)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(longest_shutdown + 1)  # should the signal not have been heard
    os._exit(1)

"""Workers for the tests of this room: in a thread for speed, or as real processes under the supervisor."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from engine.config import EngineConfig
from engine.server.app import create_app
from engine.server.limits import DoorSettings, ServerLimits
from engine.server.protocol import server_options
from engine.worker.client import EngineClient

TOKEN = "the-admin-token-of-the-tests"
KNOBS = {"device": "cpu", "dtype": "float32", "block_size": 4, "max_num_seqs": 16, "memory_limit_gib": 0.25}


class ServedApp:
    """A worker's application behind a real port.

    Attributes:
        url: where it listens; app: the FastAPI application; client: an :class:`EngineClient` with the token.
    """

    def __init__(
        self, config: EngineConfig | None, limits: ServerLimits | None = None, door: DoorSettings | None = None
    ) -> None:
        limits = limits or ServerLimits()
        self.app = create_app(config, admin_token=TOKEN, limits=limits, door=door)
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        options = uvicorn.Config(self.app, timeout_graceful_shutdown=2, **server_options(limits))
        self._server = uvicorn.Server(options)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)
        self._thread.start()
        wait_until(lambda: self._server.started)
        self.client = EngineClient(self.url, TOKEN)

    @property
    def engine(self) -> Any:
        """The engine in service."""
        return self.app.state.host.loop.engine

    def wait_ready(self) -> None:
        """Wait until the model is loaded."""
        wait_until(lambda: self.client.health()["status"] != "loading")
        health = self.client.health()
        assert health["status"] == "ready", health

    def idle(self) -> bool:
        """True if no request is in flight and none holds a block; checks the engine's invariants."""
        engine = self.engine
        engine_loop = self.app.state.host.loop
        engine_loop.call(lambda inner: inner.check_invariants())
        used = engine_loop.call(lambda inner: inner.scheduler.pool.num_blocks - inner.scheduler.pool.num_free)
        return not engine.has_unfinished() and used == 0

    def close(self) -> None:
        """Stop serving."""
        self.client.close()
        self.app.state.texts.close()
        self.app.state.host.close()
        self._server.should_exit = True
        self._thread.join(10)
        self._socket.close()


def wait_until(holds: Callable[[], Any], timeout_s: float = 30.0) -> None:
    """Wait for a condition; fails the test if it does not come about."""
    end = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end, f"not so within {timeout_s} s"
        time.sleep(0.01)


@contextlib.contextmanager
def slowed(served: ServedApp, step_s: float) -> Iterator[None]:
    """Every step takes this much longer, so that a request is still running when the test acts on it."""
    engine = served.engine
    step = engine.step

    def slow_step() -> Any:
        time.sleep(step_s)
        return step()

    engine.step = slow_step
    try:
        yield
    finally:
        del engine.step


@pytest.fixture(scope="session")
def tiny_config(tiny_llama: Path) -> EngineConfig:
    """The tiny Llama with small blocks, so that tests are quick."""
    return EngineConfig.from_mapping({**KNOBS, "model": str(tiny_llama)})


@pytest.fixture(scope="module")
def served(tiny_config: EngineConfig) -> Iterator[ServedApp]:
    """A worker with the tiny Llama, ready."""
    app = ServedApp(tiny_config)
    app.wait_ready()
    yield app
    app.close()


@pytest.fixture
def start_app() -> Iterator[Callable[..., ServedApp]]:
    """Start a worker of the test's own."""
    started: list[ServedApp] = []

    def start(config: EngineConfig | None, **settings: Any) -> ServedApp:
        started.append(ServedApp(config, **settings))
        return started[-1]

    yield start
    for app in started:
        app.close()

"""SIGTERM: what is in flight gets its time, then an answer; and the process always ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from engine.worker.client import WorkerError
from tests.conftest import save_tiny_llama
from tests.server.conftest import wait_until
from tests.server.test_limits import ENDLESS
from tests.server.test_worker_process import started

pytestmark = pytest.mark.slow

HELLO = [{"role": "user", "content": "hello"}]
OPTIONS = ("--set", "dtype=float32", "--set", "memory_limit_gib=0.25", "--set", "attention=reference")
ENDLESS_ANSWER = {"max_tokens": 480, "temperature": 0, "ignore_eos": True}

# A worker whose steps take their time, or never end; started with the options of `serve`.
SLOWED = """
import sys, time
from engine.core import Engine
step, seconds = Engine.step, float(sys.argv.pop(1))
def slow(self):
    time.sleep(seconds)
    return step(self)
Engine.step = slow
from engine.cli.app import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def slowed_worker(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Start a worker each of whose steps takes so many seconds longer."""
    script = tmp_path / "slowed.py"
    script.write_text(SLOWED)
    popen = subprocess.Popen

    def start(seconds: float, *options: str, model: Path = tiny_llama) -> Any:
        def patched(command: list[str], **arguments: Any) -> Any:
            arguments["env"] = {**arguments["env"], "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
            return popen([command[0], str(script), str(seconds), *command[3:]], **arguments)

        monkeypatch.setattr(subprocess, "Popen", patched)
        return started(tmp_path, "--model", str(model), *OPTIONS, *options)

    return start


def test_stream_that_ends_in_time_is_complete_and_new_requests_are_refused(slowed_worker: Callable[..., Any]):
    with slowed_worker(0.05, "--drain-seconds", "30") as worker:
        client = worker.ready()
        chunks = client.stream_chat(HELLO, max_tokens=40, temperature=0, ignore_eos=True)
        next(chunks)
        worker.process.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(client.base_url + "/health", trust_env=False).status_code == 503, 5)
        body = {"prompt": "x"}
        refused = httpx.post(client.base_url + "/v1/completions", json=body, timeout=10, trust_env=False)
        assert refused.status_code == 503
        assert "shutting down" in refused.json()["error"]["message"]
        assert refused.headers["retry-after"]
        assert client.health()["stage"] == "shutting down"
        rest = list(chunks)
        assert rest[-1]["usage"]["completion_tokens"] == 40
        assert worker.process.wait(15) == 0, worker.log.read_text()


def test_answers_that_do_not_end_in_time_end_with_an_error(slowed_worker: Callable[..., Any]):
    with slowed_worker(0.1, "--drain-seconds", "0.5") as worker, ThreadPoolExecutor(1) as pool:
        client = worker.ready()
        chunks = client.stream_chat(HELLO, **ENDLESS_ANSWER)
        next(chunks)
        body = {"prompt": "hello", **ENDLESS_ANSWER}
        whole = pool.submit(httpx.post, client.base_url + "/v1/completions", json=body, timeout=30, trust_env=False)
        wait_until(lambda: client.status()["engine"]["running"] == 2, 10)
        began = time.monotonic()
        worker.process.send_signal(signal.SIGTERM)
        with pytest.raises(WorkerError, match="shut down"):
            list(chunks)
        assert whole.result().status_code == 503
        assert whole.result().json()["error"]["type"] == "service_unavailable"
        assert worker.process.wait(10) == 0, worker.log.read_text()
        assert time.monotonic() - began < 10
        assert "Traceback" not in worker.log.read_text()


def test_process_ends_although_steps_templates_and_connections_hang(slowed_worker: Callable[..., Any], tmp_path: Path):
    model = save_tiny_llama(tmp_path / "looping")
    (model / "chat_template.jinja").write_text(ENDLESS)
    with slowed_worker(3600, "--drain-seconds", "0.5", "--text-seconds", "600", model=model) as worker:
        client = worker.ready()
        place = urlsplit(client.base_url)
        held = [socket.create_connection((str(place.hostname), place.port or 0)) for _ in range(5)]
        for connection in held:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{")
        for path, body in (("chat/completions", {"messages": HELLO}), ("completions", {"prompt": "x"})):
            threading.Thread(target=send, args=(f"{client.base_url}/v1/{path}", body), daemon=True).start()
        children = psutil.Process(worker.process.pid).children
        wait_until(lambda: any(child.cpu_percent(0.2) > 5 for child in children()), 30)
        left = children()
        worker.process.send_signal(signal.SIGTERM)
        assert worker.process.wait(12) == 0, worker.log.read_text()
        wait_until(lambda: not any(is_alive(child) for child in left), 5)
        for connection in held:
            connection.close()


def test_worker_whose_parent_has_gone_ends(slowed_worker: Callable[..., Any]):
    with slowed_worker(0, "--drain-seconds", "0.2", "--parent-pid", str(os.getppid())) as worker:
        # its parent is this process and not the one that was named: as if that had gone, even before it listens
        assert worker.process.wait(60) in (0, -signal.SIGTERM), worker.log.read_text()


def test_stop_of_the_supervisor_waits_longer_than_the_worker_needs():
    from engine.server.limits import ServerLimits
    from engine.server.run import longest_shutdown_s
    from engine.worker import supervisor

    limits = ServerLimits(drain_seconds=7)
    assert longest_shutdown_s(limits) < supervisor._STOP_TIMEOUT_S + 7


def send(url: str, body: dict[str, Any]) -> None:
    with contextlib.suppress(httpx.HTTPError):
        httpx.post(url, content=json.dumps(body), timeout=60, trust_env=False)


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE

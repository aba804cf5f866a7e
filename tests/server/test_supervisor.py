"""The supervisor: a worker that is killed is noticed, said and replaced; none outlives its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from engine.config import EngineConfig
from engine.worker.supervisor import Worker

pytestmark = pytest.mark.slow


@pytest.fixture
def worker(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    monkeypatch.setenv("HEADROOM_HOME", str(tmp_path))
    worker = Worker(str(tiny_llama), EngineConfig.from_mapping({"dtype": "float32", "memory_limit_gib": 0.25}))
    worker.start()
    yield worker
    worker.stop()


def wait(condition: Callable[[], bool], worker: Worker, timeout: float = 90) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, worker.poll()
        time.sleep(0.1)


def ready(worker: Worker) -> bool:
    return worker.poll().state == "running" and worker.client.health()["status"] == "ready"


def test_killed_worker_is_noticed_and_its_successor_serves(worker: Worker):
    wait(lambda: ready(worker), worker)
    first = worker.pid
    assert first is not None
    assert worker.client.complete([1, 2], max_tokens=3)["choices"]
    os.kill(first, signal.SIGKILL)
    wait(lambda: worker.poll().state == "dead", worker, 10)
    assert worker.poll().exit_code == -signal.SIGKILL
    assert worker.poll().log
    worker.restart()
    wait(lambda: ready(worker), worker)
    assert worker.pid != first
    assert worker.client.complete([1, 2], max_tokens=3)["choices"]
    assert worker.client.config()["config"]["dtype"] == "float32", "the successor has the same knobs"


def test_token_is_not_visible_among_the_arguments(worker: Worker):
    assert worker.pid is not None
    arguments = " ".join(psutil.Process(worker.pid).cmdline())
    assert "serve" in arguments
    assert worker._token not in arguments


def test_worker_ends_when_its_parent_is_killed(tiny_llama: Path, tmp_path: Path):
    script = (
        "import sys, time; from engine.worker.supervisor import Worker\n"
        f"w = Worker({str(tiny_llama)!r}); w.start(); print(w.pid, flush=True); time.sleep(600)"
    )
    environment = {**os.environ, "HEADROOM_HOME": str(tmp_path)}
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    time.sleep(1)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 90
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the worker outlived its parent"
        time.sleep(0.2)

"""A dashboard of its own, started like ``make run`` does it, and a Chromium to look at it with."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil

from engine.worker.client import EngineClient

ROOT = Path(__file__).parents[2]
_START_S = 60.0
_STOP_S = 15.0


def chromium_path() -> str | None:
    """The system's Chromium, None if there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for path in map(shutil.which, names) if path), None)


class Dashboard:
    """A running dashboard.

    Attributes:
        url: where it is; home: its HEADROOM_HOME; process: the Streamlit server.
    """

    def __init__(self, process: subprocess.Popen[bytes], url: str, home: Path, log: Path) -> None:
        self.process, self.url, self.home, self.log = process, url, home, log

    def worker(self) -> psutil.Process:
        """The engine worker it has started."""
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "serve" in child.cmdline() and child.status() != psutil.STATUS_ZOMBIE:
                    return child
        raise AssertionError(f"the dashboard has no worker:\n{self.log.read_text()[-2000:]}")

    def client(self) -> EngineClient:
        """A client of that worker, with the token that the dashboard has given it."""
        worker = self.worker()
        ports = [item.laddr.port for item in worker.net_connections() if item.status == psutil.CONN_LISTEN]
        return EngineClient(f"http://127.0.0.1:{ports[0]}", worker.environ()["HEADROOM_ADMIN_TOKEN"])

    def kill_worker(self) -> None:
        """SIGKILL, as the kernel does it when memory runs out."""
        os.kill(self.worker().pid, signal.SIGKILL)


@contextlib.contextmanager
def running_dashboard(home: Path) -> Iterator[Dashboard]:
    """Start a dashboard on a free port with a HEADROOM_HOME of its own that shares the fetched models."""
    _share_models(home)
    port = free_port()
    log = home / "dashboard.log"
    environment = {**os.environ, "HEADROOM_HOME": str(home), "HEADROOM_MODEL": "smollm2-135m"}
    environment.pop("HEADROOM_DB", None)
    command = [sys.executable, "-m", "streamlit", "run", "app.py", "--server.port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_up(process, url, log)
        yield Dashboard(process, url, home, log)
    finally:
        stop(process)


def _share_models(home: Path) -> None:
    """Link what `make setup` has fetched, so that nothing is downloaded; runs go into the new home."""
    from engine.models import fetch_default_model
    from engine.paths import headroom_home

    fetch_default_model()
    home.mkdir(parents=True, exist_ok=True)
    for name in ("models", "cache"):
        source = headroom_home() / name
        if source.exists():
            (home / name).symlink_to(source)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_up(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Wait for the answer of a Streamlit server that was just started."""
    end = time.monotonic() + _START_S
    while time.monotonic() < end:
        if process.poll() is not None:
            raise AssertionError(f"the dashboard ended at once:\n{log.read_text()[-2000:]}")
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/_stcore/health", timeout=2):
            return
        time.sleep(0.2)
    raise AssertionError(f"the dashboard did not start within {_START_S} s:\n{log.read_text()[-2000:]}")


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a server and what it has started."""
    children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.send_signal(signal.SIGINT)
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
    _, alive = psutil.wait_procs(children, timeout=_STOP_S)
    for child in alive:
        child.kill()

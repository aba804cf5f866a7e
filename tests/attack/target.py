"""The worker under attack: a real process with a tiny random model, its log, and how quickly it answers ``/health``."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from engine.paths import headroom_home
from engine.worker.client import EngineClient
from kernels.cpu.build import why_not
from tests.attack.outcome import Tally
from tests.attack.wire import get

TOKEN = "the-admin-token-of-the-attack"
ROOT = Path(__file__).resolve().parents[2]
KNOBS = ("dtype=float32", "memory_limit_gib=0.25", "max_num_seqs=64", "block_size=8", "threads=1")
START_TIMEOUT_S = 120.0


def make_home(home: Path) -> Path:
    """A HEADROOM_HOME of the attack's own, in which the CPU kernels are built already: compiling them takes a minute.

    Args:
        home: a folder that does not exist yet.
    """
    home.mkdir(mode=0o700, parents=True)
    why_not()  # builds them under the user's own HEADROOM_HOME, unless they are there
    built = headroom_home() / "cache" / "native"
    if built.is_dir():
        (home / "cache").mkdir(mode=0o700)
        shutil.copytree(built, home / "cache" / "native")
    return home


class Target:
    """A worker process; ``with Target(model, folder, tally) as target`` ends it and reads its log.

    Args:
        model: folder of the checkpoint.
        folder: for its ready file and log.
        home: see :func:`make_home`.
        tally: gets its death, the tracebacks in its log, and its slowest ``/health``.

    Attributes:
        port: where it listens.
        died: it ended without being asked to.
    """

    def __init__(self, model: Path, folder: Path, home: Path, tally: Tally) -> None:
        self._model, self._folder, self._home, self._tally = model, folder, home, tally
        self.log = folder / "worker.log"
        self.port = 0
        self._asked_to_end = False
        self._process: subprocess.Popen[bytes]
        self._sampler: subprocess.Popen[bytes]

    def __enter__(self) -> Target:
        ready = self._folder / "ready.json"
        ready.unlink(missing_ok=True)
        environment = {**os.environ, "HEADROOM_ADMIN_TOKEN": TOKEN, "HEADROOM_HOME": str(self._home)}
        environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "engine", "serve", "--model", str(self._model), "--port", "0"]
        command += ["--ready-file", str(ready)]
        for knob in KNOBS:
            command += ["--set", knob]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        self._await(ready.exists, "its port did not open")
        self.port = json.loads(ready.read_text())["port"]
        self._await(lambda: get(self.port, "/health").status == 200, "the model did not become ready")
        self._health = self._folder / "health.jsonl"
        sampler = [sys.executable, "-m", "tests.attack.health", str(self.port), str(self._health)]
        self._sampler = subprocess.Popen(sampler, cwd=ROOT)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sampler.terminate()
        self._sampler.wait()
        self.note_death("at the end")
        if self.alive:
            self.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(30)
        if self.alive:
            self._tally.add("failed", "SIGTERM", "the worker had not ended 30 s after it")
            self._process.kill()
            self._process.wait()
        self._tally.read_log(self.log.read_text(encoding="utf-8", errors="replace"))
        self._tally.health_ms = max(self._tally.health_ms or 0.0, self._slowest_health_ms())

    @property
    def alive(self) -> bool:
        """True while the process runs."""
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def client(self) -> EngineClient:
        """A client with the token."""
        return EngineClient(f"http://127.0.0.1:{self.port}", TOKEN)

    def terminate(self) -> None:
        """Ask it to end (SIGTERM)."""
        self._asked_to_end = True
        self._process.send_signal(signal.SIGTERM)

    def wait(self, timeout_s: float) -> int | None:
        """Its exit code; None if it has not ended in time."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(timeout_s)
        return None

    def steps(self) -> bool:
        """True if it runs and its engine can step."""
        return self.alive and b'"dead"' not in get(self.port, "/health", timeout_s=20.0).body

    def note_death(self, what: str) -> bool:
        """True, counted once, if the process has ended unasked or its engine cannot step any more."""
        if self._asked_to_end:
            return False
        if not self.alive:
            self._asked_to_end = True  # counted once
            self._tally.died(what, f"the worker ended with {self._process.returncode}: {self._last_lines()}")
            return True
        answer = get(self.port, "/health", timeout_s=20.0)
        if answer.status == 200 or b'"dead"' not in answer.body:
            return False
        self._tally.died(what, f"the engine is dead: {answer.body[:300].decode(errors='replace')}")
        return True

    def _await(self, holds: Callable[[], bool], fault: str) -> None:
        end = time.monotonic() + START_TIMEOUT_S
        while not holds():
            if not self.alive or time.monotonic() > end:
                raise RuntimeError(f"{fault}: {self._last_lines()}")
            time.sleep(0.05)

    def _last_lines(self) -> str:
        return self.log.read_text(errors="replace")[-600:].strip() or "it said nothing"

    def _slowest_health_ms(self) -> float:
        if not self._health.exists():
            return 0.0
        lines = self._health.read_text().splitlines()
        return max((float(line.split()[1]) for line in lines if len(line.split()) == 3), default=0.0)

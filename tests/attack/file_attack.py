"""Files: mutated GGUF files, safetensors folders and configurations, each loaded or planned by a real process.

Right is: loaded (and then it generates), planned in finite numbers, or refused by an error that names the field. A
crash, another exception, and anything that takes longer than :data:`PATIENCE_S` is not.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.attack.outcome import Tally
from tests.attack.target import ROOT
from tests.conftest import byte_tokenizer

PATIENCE_S = 30.0
DEMANDED = {"gguf": 360, "safetensors": 230, "configs": 260}
PLANNED = 0.5
"""Share of the configurations that go to the planner; the others lie in checkpoints that are loaded."""


def attack(kind: str, seed: int, folder: Path, home: Path, end: float, count: int | None = None) -> Tally:
    """Try every mutation of one kind.

    Args:
        kind: a key of :data:`DEMANDED`.
        folder: scratch.
        home: see :func:`tests.attack.target.make_home`.
        end: ``time.monotonic()`` after which no further one is begun.
        count: so many instead of those demanded.
    """
    count = DEMANDED[kind] if count is None else count
    tally = Tally(kind, "files", count)
    log = folder / f"{kind}.log"
    with Victim(log, home, tally) as victim:
        for what, order in _orders(kind, seed, count, folder):
            if time.monotonic() > end:
                break
            verdict, reason = victim.ask(order)
            tally.add(verdict, what, reason)  # type: ignore[arg-type]
    tally.read_log(log.read_text(encoding="utf-8", errors="replace"))
    return tally


def _orders(kind: str, seed: int, count: int, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(what is odd about it, what the victim is told)."""
    if kind == "configs":
        planned = round(PLANNED * count)
        yield from _plans(seed, planned, folder / "config.json")
        yield from _configs(seed, count - planned, folder / "checkpoint")
        return
    checkpoints = importlib.import_module("tests.attack.checkpoints")
    place = folder / "checkpoint"
    if kind == "safetensors":
        checkpoints.write_folder(place, byte_tokenizer())
    else:
        place.mkdir()
    for what, path in getattr(checkpoints, f"{kind}_mutations")(seed, count, place):
        yield what, {"load": str(path)}


def _configs(seed: int, count: int, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    checkpoints = importlib.import_module("tests.attack.checkpoints")
    checkpoints.write_folder(folder, byte_tokenizer())
    for what, config in checkpoints.config_mutations(seed, count):
        checkpoints.write_config(folder, config)
        yield what, {"load": str(folder)}


def _plans(seed: int, count: int, file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    plans = importlib.import_module("tests.attack.plans")
    for what, config, options in plans.plan_config_mutations(seed, count):
        file.write_bytes(plans.as_file(config))
        yield f"plan {what} {options}", {"plan": ["--model", str(file), *(f"--{n}={v}" for n, v in options.items())]}


class Victim:
    """The process of :mod:`.loader`, started again after each death."""

    def __init__(self, log: Path, home: Path, tally: Tally) -> None:
        self._log, self._home, self._tally = log, home, tally
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Victim:
        self._log.touch()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def ask(self, order: dict[str, Any]) -> tuple[str, str]:
        """(verdict, reason) of one order."""
        process = self._running()
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(order).encode() + b"\n")
            process.stdin.flush()
        line = self._line(process)
        if line is None:
            self._end()
            return "lost", f"no answer within {PATIENCE_S:.0f} s"
        if not line:
            code = process.wait()
            self._process = None
            self._tally.deaths += 1
            return "failed", f"the process died with {code}"
        answer = json.loads(line)
        return answer["verdict"], answer["reason"]

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "tests.attack.loader"],
                    cwd=ROOT,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env={**os.environ, "HEADROOM_HOME": str(self._home), "OMP_NUM_THREADS": "1"},
                )
            self._patience_s = 3 * PATIENCE_S  # it also starts
        return self._process

    def _line(self, process: subprocess.Popen[bytes]) -> bytes | None:
        """The next line; empty if the process has ended, None if it takes too long."""
        assert process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            if not selector.select(self._patience_s):
                return None
        self._patience_s = PATIENCE_S
        return process.stdout.readline()

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

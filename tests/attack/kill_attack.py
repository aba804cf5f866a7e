"""SIGKILL at any moment: of a recorder while it writes, and of the worker while it loads and serves.

The record stays intact and keeps every run that was acknowledged; a worker's death is a state of the supervisor, its
clients get an answer or an end, and its successor gives the same tokens.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from engine.config import EngineConfig
from engine.worker.client import EngineUnreachableError
from engine.worker.supervisor import Worker
from storage import open_store
from tests.attack.outcome import Tally
from tests.attack.target import KNOBS, ROOT
from tests.attack.wire import Answer, post

DEMANDED = 50
OF_THE_WORKER = 0.4
READY_S = 120.0
ANSWER_S = 20.0
ASKED: dict[str, Any] = {"max_tokens": 16, "temperature": 0, "ignore_eos": True}
LONG = {**ASKED, "max_tokens": 480, "n": 8}


def attack(seed: int, model: Path, folder: Path, home: Path, end: float, count: int = DEMANDED) -> Tally:
    """Kill ``count`` times, the recorder more often than the worker, since that starts more quickly."""
    tally = Tally("SIGKILL", "kills", count)
    draw = random.Random(f"kill/{seed}")
    of_the_worker = max(1, round(OF_THE_WORKER * count))
    with _environment(HEADROOM_HOME=str(home)), ThreadPoolExecutor(1) as beside:  # the supervisor reads it
        recorded = beside.submit(_kill_recorders, draw.randrange(10**6), folder, count - of_the_worker, tally, end)
        _kill_workers(draw, model, of_the_worker, tally, end)
        recorded.result()
    return tally


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Variables set for a while."""
    previous = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in previous.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


# -- the recorder -----------------------------------------------------------------------------------------------------


def _kill_recorders(seed: int, folder: Path, count: int, tally: Tally, end: float) -> None:
    draw, path = random.Random(seed), folder / "killed.db"
    url = f"sqlite:///{path}"
    open_store(url).close()
    saved: set[str] = set()
    gone: set[str] = set()
    for number in range(count):
        if time.monotonic() > end:
            return
        lines, errors = _record_until_killed(url, 1000 * seed + number, draw)
        tally.read_log(errors.decode(errors="replace"))
        saved |= {line[1] for line in lines if line[0] == "saved"}
        gone |= {line[1] for line in lines if line[0] == "deleting"}
        fault = _fault_in_record(path, url, saved - gone, {line[1] for line in lines if line[0] == "deleted"})
        what = f"recorder {number}, after {len(lines)} lines"
        tally.add("lost" if "lost" in fault else "failed" if fault else "served", what, fault)


def _record_until_killed(url: str, seed: int, draw: random.Random) -> tuple[list[list[str]], bytes]:
    """What a recorder acknowledged before it was killed, and what it said on standard error."""
    command = [sys.executable, "-m", "tests.attack.recorder", url, str(seed)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    if draw.random() < 0.8:  # else it dies while it starts
        process.stdout.readline()
        time.sleep(draw.expovariate(1 / 0.15))
    else:
        time.sleep(draw.uniform(0.0, 0.8))
    process.kill()
    output, errors = process.communicate()
    return [line.split() for line in output.decode().splitlines() if len(line.split()) == 2], errors


def _fault_in_record(path: Path, url: str, expected: set[str], deleted: set[str]) -> str:
    with sqlite3.connect(path) as connection:
        found = connection.execute("PRAGMA integrity_check").fetchone()[0]
        foreign = connection.execute("PRAGMA foreign_key_check").fetchall()
    connection.close()
    if found != "ok" or foreign:
        return f"the database is damaged: {found} {foreign[:3]}"
    store = open_store(url)
    try:
        store.mark_orphans()
        there = {row.run_id: row for row in store.list_runs()}
        if missing := expected - set(there):
            return f"lost: {sorted(missing)[:3]} had been acknowledged"
        if unfinished := [name for name in expected if there[name].status == "running"]:
            return f"lost: {unfinished[:3]} had been saved, and is recorded as running"
        if back := deleted & set(there):
            return f"deleted runs are back: {sorted(back)[:3]}"
        if expected:  # requests, samples and events of one of them are there too
            run = store.get_run(sorted(expected)[-1])
            if not run.requests or not run.samples:
                return f"lost: {run.run_id} has no requests any more"
    finally:
        store.close()
    return ""


# -- the worker -------------------------------------------------------------------------------------------------------


def _kill_workers(draw: random.Random, model: Path, count: int, tally: Tally, end: float) -> None:
    config = EngineConfig.from_mapping(dict(knob.split("=") for knob in KNOBS))
    worker = Worker(str(model), config)
    expected: list[int] | None = None
    worker.start()
    try:
        for number in range(count):
            if time.monotonic() > end:
                return
            while_loading = draw.random() < 0.4
            if while_loading:
                time.sleep(draw.uniform(0.0, 3.0))
                _kill(worker, [], tally, f"worker {number}, loading")
            else:
                tokens = _tokens_of(worker)
                expected = expected or tokens
                if tokens is None or tokens != expected:
                    tally.add("failed", f"worker {number}", f"the restarted worker gave {tokens} instead of {expected}")
                _kill_serving(worker, draw, tally, f"worker {number}, serving")
            worker.start()
        if _tokens_of(worker) is None:
            tally.add("failed", "the last worker", "it did not become ready")
    finally:
        worker.stop()


def _kill_serving(worker: Worker, draw: random.Random, tally: Tally, what: str) -> None:
    port = int(worker.client.base_url.rpartition(":")[2])
    with ThreadPoolExecutor(4) as clients:
        bodies = [LONG | {"stream": number < 2, "prompt": [number]} for number in range(4)]
        flights = [clients.submit(post, port, "/v1/completions", body, timeout_s=ANSWER_S) for body in bodies]
        time.sleep(draw.uniform(0.0, 0.6))
        _kill(worker, flights, tally, what)


def _kill(worker: Worker, flights: list[Future[Answer]], tally: Tally, what: str) -> None:
    pid = worker.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + ANSWER_S
    while worker.poll().state != "dead" and time.monotonic() < deadline:
        time.sleep(0.01)
    state = worker.poll()
    hanging = [answer for flight in flights if not (answer := flight.result()).status and not answer.closed]
    if state.state != "dead" or state.exit_code != -signal.SIGKILL:
        tally.add("failed", what, f"the supervisor says {state.state}, exit code {state.exit_code}")
    elif hanging:
        tally.add("lost", what, f"{len(hanging)} clients were left hanging")
    else:
        tally.add("served", what)
    tally.read_log("\n".join(state.log))


def _tokens_of(worker: Worker) -> list[int] | None:
    """Greedy tokens of the worker once it is ready; None if it does not become so."""
    end = time.monotonic() + READY_S
    while time.monotonic() < end and worker.poll().state != "dead":
        time.sleep(0.05)
        with contextlib.suppress(EngineUnreachableError):  # its port is not open yet
            if worker.client.health()["status"] == "ready":
                answer = worker.client.complete("kill", **ASKED, return_token_ids=True)
                return list(answer["choices"][0]["token_ids"])
    return None

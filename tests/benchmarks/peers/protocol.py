"""What the benchmark and a peer's process say to each other: one JSON file in (`Order`), one JSON file out (`Report`).

    run.py ──order.json──> python -m tests.benchmarks.peers.<peer> order.json report.json ──report.json──> run.py

A process serves one setting of one peer and runs a list of workloads. Standard library only: it is imported by the
interpreters of the peers' own environments. Seconds throughout; the moments of a run count from its start.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

DISTURBED_SHARE = 0.10
"""Part of the machine that other processes may take before a measurement counts as disturbed."""


class UnsupportedError(Exception):
    """A peer cannot do what was asked; the message is the reason that the results show."""


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """One request.

    Attributes:
        index: number in its workload.
        arrival_s: when it arrives; ignored where requests come one by one.
        prompt_token_ids: the prompt.
        output_tokens: exactly so many are generated, whatever the model would like to end with.
    """

    index: int
    arrival_s: float
    prompt_token_ids: list[int]
    output_tokens: int


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """A workload as sent.

    Attributes:
        name: of the workload.
        one_by_one: each request is sent when the one before it is done, instead of at its arrival.
        requests: in order of arrival.
        warmup: run to their end before the clock starts.
        variant: name of the changes below, "" for none.
        changes: settings to change for this run only (only our engine can).
    """

    name: str
    one_by_one: bool
    requests: list[Request]
    warmup: list[Request]
    variant: str = ""
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class Order:
    """What a peer's process is asked to do.

    Attributes:
        peer, setting: names, for the record.
        options: the setting itself; its keys belong to the peer.
        checkpoint: folder of safetensors, configuration and tokenizer.
        gguf: the same model as a GGUF file, "" if there is none.
        threads: to compute with.
        device: "cpu" or "cuda".
        work: in the order in which to run it.
        attempts: a measurement that other processes disturb is made again, at most so many times in all.
    """

    peer: str
    setting: str
    options: dict[str, Any]
    checkpoint: str
    gguf: str
    threads: int
    device: str
    work: list[Work]
    attempts: int = 1


@dataclasses.dataclass(slots=True)
class Timing:
    """What became of one request: when it arrived and when each of its output tokens became known."""

    index: int
    arrival_s: float
    token_times_s: list[float] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(slots=True)
class Run:
    """One measured workload.

    Attributes:
        timings: one per request; empty if it failed.
        others_share: part of the machine's CPU time that other processes took meanwhile; None where it cannot be told.
        attempts: how often it was measured; the least disturbed measurement is kept, never the fastest.
        path: what really ran, as the peer describes itself.
        error: why it failed or is not supported, else "".
    """

    workload: str
    variant: str
    timings: list[Timing]
    others_share: float | None = None
    attempts: int = 1
    path: dict[str, str] = dataclasses.field(default_factory=dict)
    error: str = ""


@dataclasses.dataclass(slots=True)
class Report:
    """What a peer's process answers. ``error`` is why nothing could be run at all, else ""."""

    peer: str
    setting: str
    options: dict[str, Any]
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    load_s: float | None = None
    runs: list[Run] = dataclasses.field(default_factory=list)
    error: str = ""


class Peer(Protocol):
    """A loaded engine."""

    def versions(self) -> dict[str, str]:
        """Versions of what decides the numbers."""

    def path(self) -> dict[str, str]:
        """What really runs now."""

    def warm_up(self, work: Work) -> None:
        """Make ready for a workload, its warm-up requests included, and forget what they left in a prefix cache,
        unless the workload's own prompts begin like theirs on purpose."""

    def run(self, work: Work) -> list[Timing]:
        """Run a workload.

        Raises:
            UnsupportedError: with the reason.
        """


class Stepper(Protocol):
    """An engine that is driven step by step."""

    def add(self, request: Request) -> None:
        """Queue a request."""

    def step(self) -> Iterable[tuple[int, int]]:
        """Compute one step; (index of a request, number of its new tokens) for each request that got some."""

    def unfinished(self) -> bool:
        """True while a request is in flight."""


def drive(engine: Stepper, requests: Sequence[Request], *, one_by_one: bool = False) -> list[Timing]:
    """Send every request at its time and step until all are done: the same clock for every engine that steps.

    A request that comes while a step is computed is added after it, but its clock began at its arrival.
    """
    waiting = deque(requests)
    timings = {request.index: Timing(request.index, request.arrival_s) for request in requests}
    start = time.perf_counter()
    while waiting or engine.unfinished():
        now = time.perf_counter() - start
        while waiting and (not engine.unfinished() if one_by_one else waiting[0].arrival_s <= now):
            request = waiting.popleft()
            if one_by_one:
                timings[request.index].arrival_s = time.perf_counter() - start
            engine.add(request)
        if not engine.unfinished():
            time.sleep(max(0.0, waiting[0].arrival_s - (time.perf_counter() - start)))
            continue
        news = engine.step()
        known = time.perf_counter() - start
        for index, count in news:
            timings[index].token_times_s.extend([known] * count)
    return [timings[request.index] for request in requests]


def drive_static(
    generate: Callable[[Sequence[Request]], Sequence[float]], requests: Sequence[Request], limit: int, one_by_one: bool
) -> list[Timing]:
    """Static batches: all that have arrived, at most ``limit``, run until the longest of them is done.

    Args:
        generate: runs a batch; ``time.perf_counter()`` moments at which the i-th token of every request became known.
            A request's own tokens end where its output length says, the rest of the batch's work is waste.
    """
    waiting = deque(requests)
    timings: list[Timing] = []
    start = time.perf_counter()
    while waiting:
        now = time.perf_counter() - start
        if not one_by_one and waiting[0].arrival_s > now:
            time.sleep(waiting[0].arrival_s - now)
            continue
        batch = [waiting.popleft()]
        while not one_by_one and waiting and waiting[0].arrival_s <= now and len(batch) < limit:
            batch.append(waiting.popleft())
        moments = [moment - start for moment in generate(batch)]
        for request in batch:
            arrival = now if one_by_one else request.arrival_s
            timings.append(Timing(request.index, arrival, list(moments[: request.output_tokens])))
    return timings


def shared_prefix(work: Work) -> list[int]:
    """What all prompts and the warm-up's begin with, if it is long enough (64 tokens) to be meant; else nothing."""
    prompts = [request.prompt_token_ids for request in (*work.requests, *work.warmup)]
    if len(work.requests) < 2 or not work.warmup:
        return []
    count = 0
    while count < min(map(len, prompts)) and len({prompt[count] for prompt in prompts}) == 1:
        count += 1
    return prompts[0][:count] if count >= 64 else []


def check_complete(timings: Sequence[Timing], requests: Sequence[Request]) -> None:
    """Raise ``RuntimeError`` unless every request got exactly its output tokens."""
    got = {timing.index: len(timing.token_times_s) for timing in timings}
    for request in requests:
        if got.get(request.index) != request.output_tokens:
            raise RuntimeError(f"request {request.index}: {got.get(request.index)} tokens of {request.output_tokens}")


# -- the peer's process ------------------------------------------------------------------------------------------


def serve(load: Callable[[Order], Peer]) -> None:
    """``main`` of a peer: read the order (argument 1), run it, write the report (argument 2).

    The report is written after every run, so that a crash loses only what was running.
    """
    order = order_from_json(Path(sys.argv[1]).read_text(encoding="utf-8"))
    report = Report(order.peer, order.setting, order.options)
    target = Path(sys.argv[2])
    try:
        began = time.perf_counter()
        peer = load(order)
        report.load_s = time.perf_counter() - began
        report.versions = peer.versions()
        for work in order.work:
            report.runs.append(_measure(peer, work, order.attempts))
            write(report, target)
    except BaseException as error:
        traceback.print_exc()
        report.error = describe(error)
    write(report, target)


def _measure(peer: Peer, work: Work, attempts: int) -> Run:
    kept: Run | None = None
    try:
        for attempt in range(attempts):
            peer.warm_up(work)
            load = OtherLoad()
            timings = peer.run(work)
            check_complete(timings, work.requests)
            run = Run(work.name, work.variant, timings, load.share(), attempt + 1, peer.path())
            if kept is None or (run.others_share or 0.0) < (kept.others_share or 0.0):
                kept = run
            kept.attempts = attempt + 1
            if (run.others_share or 0.0) <= DISTURBED_SHARE:
                break
    except UnsupportedError as reason:
        return Run(work.name, work.variant, [], error=f"not supported: {reason}")
    except Exception as error:
        traceback.print_exc()
        return kept or Run(work.name, work.variant, [], error=describe(error))
    assert kept is not None
    return kept


def describe(error: BaseException) -> str:
    """Type and first lines of an error."""
    return f"{type(error).__name__}: {str(error).strip()[:500]}"


class OtherLoad:
    """How much of the machine processes outside this one's session take (and, on a virtual machine, other guests).

    The benchmark starts every peer in a session of its own, so that a peer's helper processes count as its own.
    """

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self.busy_s, self.own_s = self._read()

    def share(self) -> float | None:
        """Part of all CPU time since this was made, between 0 and 1; None where ``/proc`` does not tell."""
        busy_s, own_s = self._read()
        available_s = (time.perf_counter() - self._began) * (os.cpu_count() or 1)
        others_s = (busy_s - self.busy_s) - (own_s - self.own_s)
        return None if math.isnan(others_s) else min(1.0, max(0.0, others_s / max(available_s, 1e-9)))

    @staticmethod
    def _read() -> tuple[float, float]:
        """CPU seconds so far of all processes, and of this session's; not a number where there is no ``/proc``."""
        try:
            tick = os.sysconf("SC_CLK_TCK")
            fields = [int(value) for value in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
            session = os.getsid(0)
            own = sum(_session_ticks(entry, session) for entry in Path("/proc").iterdir() if entry.name.isdigit())
        except (OSError, ValueError, IndexError):
            return math.nan, math.nan
        busy = sum(fields) - fields[3] - fields[4]  # without idle and iowait
        return busy / tick, own / tick


def _session_ticks(process: Path, session: int) -> int:
    """User and system ticks of a process and its reaped children, 0 if it is of another session or gone."""
    try:
        fields = (process / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return sum(int(value) for value in fields[11:15]) if int(fields[3]) == session else 0


# -- JSON -----------------------------------------------------------------------------------------------------------


def write(document: Order | Report, path: Path) -> None:
    """Write as JSON, whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(dataclasses.asdict(document)), encoding="utf-8")
    part.replace(path)


def order_from_json(text: str) -> Order:
    """The inverse of :func:`write` for an order."""
    values = json.loads(text)
    return Order(**{**values, "work": [_work(item) for item in values["work"]]})


def report_from_json(text: str) -> Report:
    """The inverse of :func:`write` for a report."""
    values = json.loads(text)
    return Report(**{**values, "runs": [_run(item) for item in values["runs"]]})


def _work(values: dict[str, Any]) -> Work:
    requests, warmup = ([Request(**item) for item in values[name]] for name in ("requests", "warmup"))
    return Work(**{**values, "requests": requests, "warmup": warmup})


def _run(values: dict[str, Any]) -> Run:
    return Run(**{**values, "timings": [Timing(**item) for item in values["timings"]]})

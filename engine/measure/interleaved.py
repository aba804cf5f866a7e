"""Two settings against each other on a live engine, their runs interleaved.

The same workload runs under both, several times each; every repeat sends the same requests to both arms.
"""

from __future__ import annotations

import dataclasses
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from engine.config import Tier, knob
from engine.errors import ConfigError, WorkloadError
from engine.measure.driver import (
    ProgressCallback,
    RunInProgress,
    RunPlan,
    RunProgress,
    current_values,
    make_plan,
    restore,
    with_slo,
)
from engine.measure.energy import EnergyMeter, energy_meter
from engine.measure.metrics import Slo
from engine.measure.quality import QualityComparison, is_lossy, measure_quality
from engine.measure.recording import describe_error
from engine.measure.results import EventRecord, RunResult, RunStatus
from engine.measure.workloads import Workload, get_workload

if TYPE_CHECKING:
    from engine.telemetry.sampler import TelemetrySampler
    from engine.worker.loop import EngineLoop


@dataclasses.dataclass(slots=True)
class Comparison:
    """What :func:`run_comparison` measured.

    Attributes:
        comparison_id: UUID4 hex, also in every run.
        runs: in the order in which they ran; the last one may be failed or cancelled.
        status: "completed", "failed" or "cancelled"; error: why it failed.
        arm_a, arm_b: the changes of knobs; knobs that only one arm names keep their previous value in the other.
        repeats: as asked for.
    """

    comparison_id: str
    runs: list[RunResult]
    status: RunStatus
    arm_a: dict[str, Any]
    arm_b: dict[str, Any]
    repeats: int
    error: str | None = None

    def arm(self, name: Literal["A", "B"]) -> list[RunResult]:
        """The runs of one arm, by repeat."""
        return sorted((run for run in self.runs if run.arm == name), key=lambda run: run.repeat or 0)


def run_comparison(
    loop: EngineLoop,
    workload: str | Mapping[str, Any] | Workload,
    arm_a: Mapping[str, Any],
    arm_b: Mapping[str, Any],
    *,
    repeats: int = 5,
    seed: int = 0,
    slo: Slo | Mapping[str, Any] | None = None,
    label: str = "",
    quality: bool = True,
    comparison_id: str | None = None,
    telemetry: TelemetrySampler | None = None,
    progress: ProgressCallback | None = None,
    cancel: threading.Event | None = None,
    on_run: Callable[[RunResult], None] | None = None,
    on_start: Callable[[RunResult], None] | None = None,
) -> Comparison:
    """Run the same workload under two settings, interleaved, ``repeats`` times each.

    Repeat r sends the same requests (seed + r) to both arms. The order within a repeat is drawn, and mirrored in the
    next one (A B · B A or B A · A B), so that a drift of the machine falls on both arms alike.

    Args:
        arm_a, arm_b: changes of knobs against their current values, which are restored at the end.
        quality: where an arm is lossy, first measure the quality of both on the bundled text and put it into the
            metrics of every run (see :mod:`engine.measure.quality`).
        telemetry: as for :func:`run_workload`; idle power is measured once, before the first run.
        on_run: called after each run, so that a crash loses nothing. If it raises, the comparison ends as "failed".

    Returns:
        The comparison, complete or not; see its ``status``.

    Raises:
        WorkloadError, ConfigError, CapacityError, EngineDeadError: before anything was run.
    """
    if repeats < 1:
        raise WorkloadError(f"{repeats} is not a number of repeats.", field="repeats", remedy="Give at least 1.")
    definition = with_slo(get_workload(workload), slo)
    previous = current_values(loop, {**arm_a, **arm_b})
    for changes in (arm_a, arm_b):
        _check_changes(loop, changes)
    comparison = Comparison(comparison_id or uuid.uuid4().hex, [], "completed", dict(arm_a), dict(arm_b), repeats)
    tracker = _ComparisonProgress(progress, definition.num_requests, repeats)
    stop = cancel or threading.Event()
    try:
        measured = _measure_quality(loop, arm_a, arm_b, tracker, stop) if quality else None
        with energy_meter(loop.snapshot.device, telemetry) as energy:
            for run in _runs(loop, comparison, definition, previous, seed, label, energy, tracker, stop, on_start):
                attach_quality(run, measured)
                if not _take(comparison, run, on_run):
                    break
    except Exception as error:
        if not comparison.runs:
            raise
        comparison.status, comparison.error = "failed", describe_error(error)
    finally:
        restore(loop, previous)
    return comparison


def _take(comparison: Comparison, run: RunResult, on_run: Callable[[RunResult], None] | None) -> bool:
    """Add a run and report it; False if the comparison ends with it."""
    comparison.runs.append(run)
    if on_run is not None:
        on_run(run)
    if run.status != "completed":
        comparison.status, comparison.error = run.status, run.error
    return run.status == "completed"


def _runs(
    loop: EngineLoop,
    comparison: Comparison,
    workload: Workload,
    previous: Mapping[str, Any],
    seed: int,
    label: str,
    energy: EnergyMeter,
    tracker: _ComparisonProgress,
    cancel: threading.Event,
    on_start: Callable[[RunResult], None] | None,
) -> Iterator[RunResult]:
    """The runs of a comparison, one by one in their interleaved order."""
    filing: dict[str, Any] = {"label": label, "kind": "compare", "comparison_id": comparison.comparison_id}
    for repeat, arm in _order(comparison.repeats, seed):
        plan = make_plan(loop, workload, seed + repeat, run_id=uuid.uuid4().hex, arm=arm, repeat=repeat, **filing)
        loop.reconfigure({**previous, **(comparison.arm_a if arm == "A" else comparison.arm_b)})
        tracker.begin(plan)
        yield RunInProgress(loop, plan, energy, tracker.update, cancel).measure(on_start)


def _measure_quality(
    loop: EngineLoop,
    arm_a: Mapping[str, Any],
    arm_b: Mapping[str, Any],
    tracker: _ComparisonProgress,
    cancel: threading.Event,
) -> QualityComparison | None:
    """Quality of both arms, or None where neither is lossy (or it was cancelled)."""
    config = loop.snapshot.config.to_dict()
    if not (is_lossy({**config, **arm_a}) or is_lossy({**config, **arm_b})):
        return None
    return measure_quality(loop, arm_a, arm_b, progress=tracker.update_quality, cancel=cancel)


def attach_quality(run: RunResult, measured: QualityComparison | None) -> None:
    """Put the quality of its arm into a run: metrics, what they were measured against, and an event."""
    if measured is None:
        return
    stats = measured.a if run.arm == "A" else measured.b
    run.metrics.update(stats.metrics())
    run.quality_reference = stats.reference
    reference = {"text_hash": measured.text_hash, "reference_perplexity": measured.reference.perplexity}
    detail = {**dataclasses.asdict(stats), **reference}
    run.events.insert(0, EventRecord(0.0, "run", measured.describe(stats), detail))


def _order(repeats: int, seed: int) -> list[tuple[int, str]]:
    """(repeat, arm) in the order of running: random in every other repeat, mirrored in the next."""
    stream = random.Random(f"headroom/order/{seed}")
    order: list[tuple[int, str]] = []
    arms = ("A", "B")
    for repeat in range(repeats):
        swap = repeat % 2 == 1 or stream.random() < 0.5
        arms = (arms[1], arms[0]) if swap else arms
        order += [(repeat, arm) for arm in arms]
    return order


def _check_changes(loop: EngineLoop, changes: Mapping[str, Any]) -> None:
    """Raise ConfigError now rather than in the middle of a comparison."""
    config = loop.snapshot.config
    for name in config.difference(config.with_changes(changes)):
        if knob(name).tier == Tier.RELOAD:
            remedy = "Compare two single runs of two loaded engines instead."
            raise ConfigError("is fixed while a model is loaded.", field=name, remedy=remedy)


class _ComparisonProgress:
    """Turns the progress of single runs into that of the whole comparison."""

    def __init__(self, progress: ProgressCallback | None, requests: int, repeats: int) -> None:
        self._progress = progress
        self._requests = requests
        self._repeats = repeats
        self._runs_begun = 0
        self._title = ""
        self._start = time.perf_counter()

    def begin(self, plan: RunPlan) -> None:
        """The next run starts."""
        self._runs_begun += 1
        self._title = f"repeat {(plan.repeat or 0) + 1} of {self._repeats}, {plan.arm}: "

    def update_quality(self, fraction: float) -> None:
        """The quality of the arms is measured before their runs."""
        if self._progress is not None:
            total, elapsed = 2 * self._repeats * self._requests, time.perf_counter() - self._start
            self._progress(RunProgress(0, total, elapsed, None, f"measuring quality: {fraction:.0%}"))

    def update(self, run: RunProgress) -> None:
        """A run's own progress."""
        if self._progress is None:
            return
        total = 2 * self._repeats * self._requests
        done = (self._runs_begun - 1) * self._requests + run.done
        elapsed = time.perf_counter() - self._start
        eta = elapsed / done * (total - done) if done else None
        self._progress(RunProgress(done, total, elapsed, eta, self._title + run.detail))

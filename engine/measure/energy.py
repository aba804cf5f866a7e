"""The energy of a run: what the engine's GPU drew between its first and its last moment.

    energy          the difference of the GPU's energy counter (Volta and newer), else ∫ power dt over the samples
    idle power      mean power over a short while before the run in which the engine had no request, its model loaded
    net energy      energy − idle power · time of the run: what the requests cost beyond having the GPU wait for them

Power is that of the whole board, of every process on it. Without a power reading nothing is estimated: the metrics are
None, and the run's "energy" event says why.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from engine.telemetry.gpu import GpuReading, gpu_uuid, own_gpu
from engine.telemetry.sampler import Entry, TelemetrySampler

if TYPE_CHECKING:
    import torch

SETTLE_S = 1.0
"""Waited before idle power is measured: the power reading of Ampere and newer is a mean over the last second."""
IDLE_S = 2.0
METRIC_NAMES = (
    "energy_j",
    "power_w_mean",
    "power_w_peak",
    "idle_power_w",
    "energy_per_output_token_j",
    "net_energy_per_output_token_j",
    "gpu_utilization_percent_mean",
    "gpu_memory_bytes_peak",
    "throttled_percent",
)


class _NotMeasuredError(Exception):
    """Why there is no figure, for people."""


@dataclasses.dataclass(frozen=True, slots=True)
class Interval:
    """What the engine's GPU did between two samples.

    Attributes:
        gpu: its last reading.
        duration_s: between the first and the last sample; samples: how many, both included. Figures "of the samples"
            leave out the first.
        energy_j: joules; mean_w, peak_w: watts; peak_w is of the samples. None where there is no power reading.
        method: how the energy was made, or why it is None.
        utilization_percent: mean of the samples; memory_bytes: most used in a sample; None if not read.
        throttled: share of the samples in which each reason held the clocks back; None if not read.
        throttled_percent: samples with any reason, percent.
    """

    gpu: GpuReading
    duration_s: float
    samples: int
    energy_j: float | None
    mean_w: float | None
    peak_w: float | None
    method: str
    utilization_percent: float | None
    memory_bytes: int | None
    throttled: dict[str, float] | None
    throttled_percent: float | None


@dataclasses.dataclass(frozen=True, slots=True)
class EnergyReport:
    """A run's energy: metrics by name (see :data:`METRIC_NAMES`), a sentence for people, JSON-ready particulars."""

    metrics: dict[str, float | None]
    summary: str
    detail: dict[str, Any]


class EnergyMeter:
    """Measures the engine's GPU during one run after another.

    Args:
        telemetry: takes the samples; started.
        settle_s, idle_s: see :data:`SETTLE_S`; how long idle power is measured.
    """

    def __init__(self, telemetry: TelemetrySampler, settle_s: float = SETTLE_S, idle_s: float = IDLE_S) -> None:
        self._telemetry = telemetry
        self._settle_s, self._idle_s = settle_s, idle_s
        self._idle: Interval | None = None
        self._idle_reason = "it was not measured"
        self._first: Entry | None = None
        self._last: Entry | None = None

    def gpu(self) -> GpuReading | None:
        """The newest reading of the engine's GPU, at most one interval of the telemetry old; None without one."""
        return own_gpu(self._telemetry.latest().sample["gpu"])

    def measure_idle(self, wait: Callable[[float], None], is_idle: Callable[[], bool]) -> None:
        """Measure idle power, once for all runs of this meter; takes no time where there is no power reading.

        Args:
            wait: lets so many seconds pass.
            is_idle: whether the engine has no request.
        """
        if self._idle is not None or not _has_power(self._telemetry.take()):
            return
        self._idle_reason = "other requests were in flight before the run"
        if not is_idle():
            return
        wait(self._settle_s)
        first = self._telemetry.take()
        wait(self._idle_s)
        last = self._telemetry.take()
        if not is_idle():
            return
        try:
            self._idle = measure_interval(self._entries(first, last))
        except _NotMeasuredError as error:
            self._idle_reason = str(error)

    def begin(self) -> None:
        """The run begins now."""
        self._first, self._last = self._telemetry.take(), None

    def end(self) -> None:
        """The run ends now, if it ever began."""
        self._last = None if self._first is None else self._telemetry.take()

    def report(self, output_tokens: int) -> EnergyReport:
        """What the run took between its :meth:`begin` and :meth:`end`; the next one may begin.

        Args:
            output_tokens: of all requests of the run.
        """
        first, last, self._first, self._last = self._first, self._last, None, None
        try:
            if first is None or last is None:
                raise _NotMeasuredError("the run ended before its first request")
            run = measure_interval(self._entries(first, last))
        except _NotMeasuredError as error:
            return _nothing_measured(str(error))
        return _report(run, self._idle, self._idle_reason, output_tokens)

    def _entries(self, first: Entry, last: Entry) -> list[Entry]:
        entries = [entry for entry in self._telemetry.since(first.index) if entry.index <= last.index]
        # a run longer than the ring has lost its beginning, but not the two samples that the energy counter needs
        return entries if entries and entries[0].index == first.index else [first, *entries]


@contextlib.contextmanager
def energy_meter(device: torch.device | None, telemetry: TelemetrySampler | None) -> Iterator[EnergyMeter]:
    """A meter over the given telemetry, or over one of its own that ends with the body.

    Args:
        device: where the engine computes; tells which GPU is its own.
    """
    if telemetry is not None:
        yield EnergyMeter(telemetry)
        return
    own = TelemetrySampler()
    own.engine_gpu = gpu_uuid(device)
    own.start()
    try:
        yield EnergyMeter(own)
    finally:
        own.close()


def measure_interval(entries: Sequence[Entry]) -> Interval:
    """What the engine's GPU did from the first to the last of these samples.

    Raises:
        _NotMeasuredError: if a sample has no reading of that GPU; the text says why.
    """
    gpus = [_own(entry) for entry in entries]
    duration_s = entries[-1].perf_s - entries[0].perf_s
    energy_j, method = _energy([entry.perf_s for entry in entries], gpus)
    within = gpus[1:] or gpus  # use and power are means over a while: the first sample's was before the interval
    masks = [gpu["throttle_reasons"] for gpu in within if gpu["throttle_reasons"] is not None]
    counts = collections.Counter(reason for mask in masks for reason in mask)
    return Interval(
        gpu=gpus[-1],
        duration_s=duration_s,
        samples=len(gpus),
        energy_j=energy_j,
        mean_w=energy_j / duration_s if energy_j is not None and duration_s > 0 else None,
        peak_w=max((gpu["power_w"] for gpu in within if gpu["power_w"] is not None), default=None),
        method=method,
        utilization_percent=_mean([gpu["utilization_percent"] for gpu in within]),
        memory_bytes=max((gpu["memory_used_bytes"] or 0 for gpu in gpus), default=0) or None,
        throttled={reason: count / len(masks) for reason, count in counts.items()} if masks else None,
        throttled_percent=100.0 * sum(bool(mask) for mask in masks) / len(masks) if masks else None,
    )


def _energy(times_s: Sequence[float], gpus: Sequence[GpuReading]) -> tuple[float | None, str]:
    """(joules, how they were made); None and why where neither way is open."""
    first, last = gpus[0]["energy_mj"], gpus[-1]["energy_mj"]
    if first is not None and last is not None and last >= first:
        return (last - first) / 1e3, "its energy counter"
    powers = [gpu["power_w"] for gpu in gpus]
    if any(power is None for power in powers):
        return None, f"{_name(gpus[-1])} offers no power reading"
    points = [(at, power) for at, power in zip(times_s, powers, strict=True) if power is not None]
    areas = (0.5 * (p0 + p1) * (t1 - t0) for (t0, p0), (t1, p1) in itertools.pairwise(points))
    return math.fsum(areas), f"the integral of {len(points)} power samples"


def _own(entry: Entry) -> GpuReading:
    sample = entry.sample
    if sample["gpu"] is None:
        raise _NotMeasuredError((sample["gpu_reason"] or "there is no GPU reading").rstrip("."))
    gpu = own_gpu(sample["gpu"])
    if gpu is None:
        raise _NotMeasuredError("the model is not on a GPU, and only GPUs' power is read")
    if gpu["error"] is not None:
        raise _NotMeasuredError(f"GPU {gpu['index']} could not be read: {gpu['error']}")
    return gpu


def _has_power(entry: Entry) -> bool:
    gpu = own_gpu(entry.sample["gpu"])
    return gpu is not None and (gpu["power_w"] is not None or gpu["energy_mj"] is not None)


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return math.fsum(present) / len(present) if present else None


def _nothing_measured(reason: str) -> EnergyReport:
    metrics: dict[str, float | None] = dict.fromkeys(METRIC_NAMES)
    return EnergyReport(metrics, f"energy not measured: {reason}", {"reason": reason})


def _report(run: Interval, idle: Interval | None, idle_reason: str, output_tokens: int) -> EnergyReport:
    idle_w = None if idle is None else idle.mean_w
    net_j = None if run.energy_j is None or idle_w is None else run.energy_j - idle_w * run.duration_s
    metrics = {
        "energy_j": run.energy_j,
        "power_w_mean": run.mean_w,
        "power_w_peak": run.peak_w,
        "idle_power_w": idle_w,
        "energy_per_output_token_j": _each(run.energy_j, output_tokens),
        "net_energy_per_output_token_j": _each(net_j, output_tokens),
        "gpu_utilization_percent_mean": run.utilization_percent,
        "gpu_memory_bytes_peak": None if run.memory_bytes is None else float(run.memory_bytes),
        "throttled_percent": run.throttled_percent,
    }
    detail = {
        "reason": None if run.energy_j is not None else run.method,
        "gpu": {name: run.gpu[name] for name in ("index", "name", "uuid")},
        "method": run.method,
        "duration_s": run.duration_s,
        "samples": run.samples,
        "idle_s": None if idle is None else idle.duration_s,
        "idle_reason": None if idle_w is not None else idle_reason,
        "throttle_reasons": run.throttled,
    }
    return EnergyReport(metrics, _sentence(run, idle, idle_reason), detail)


def _each(energy_j: float | None, tokens: int) -> float | None:
    return None if energy_j is None or tokens == 0 else energy_j / tokens


def _sentence(run: Interval, idle: Interval | None, idle_reason: str) -> str:
    if run.energy_j is None:
        return f"energy not measured: {run.method}"
    text = f"energy: {run.energy_j:,.1f} J in {run.duration_s:.2f} s on {_name(run.gpu)}, by {run.method}"
    if idle is not None and idle.mean_w is not None:
        text += f"; idle power {idle.mean_w:.1f} W, measured for {idle.duration_s:.1f} s before the run"
    else:
        text += f"; idle power not measured: {idle_reason}"
    if run.throttled:
        reasons = ", ".join(f"{reason} ({100 * share:.0f} %)" for reason, share in run.throttled.items())
        text += f"; clocks held back by {reasons} of the samples"
    return text


def _name(gpu: GpuReading) -> str:
    name = f" ({gpu['name']})" if gpu["name"] else ""
    return f"GPU {gpu['index']}{name}"

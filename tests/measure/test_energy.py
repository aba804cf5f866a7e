"""The energy of a run: counter, integral, idle power, and every reason why there may be none."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from engine.measure import METRICS, run_comparison, run_workload
from engine.measure.energy import METRIC_NAMES, EnergyMeter, measure_interval
from engine.measure.results import RunResult, from_json, to_json
from engine.telemetry.gpu import GpuReading
from engine.telemetry.sampler import Entry, TelemetrySampler
from tests.server.fake_nvml import GPU_IS_LOST, NOT_SUPPORTED, FakeNvml, installed, uuid

BURST = {"base": "quick", "num_requests": 4, "prompt_tokens": 8, "output_tokens": 10, "warmup_requests": 0}
IDLE_MW, BUSY_MW = 70_000, 300_000


@pytest.fixture
def nvml() -> Iterator[FakeNvml]:
    with installed() as fake:
        yield fake


@pytest.fixture
def sampler(nvml: FakeNvml) -> Iterator[TelemetrySampler]:
    """Samples of a machine whose only GPU is the engine's."""
    made = TelemetrySampler(0.05)
    made.engine_gpu = uuid(0)
    made.start()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def short_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second of waiting for each run would be spent on nothing."""
    monkeypatch.setattr(EnergyMeter.__init__, "__defaults__", (0.05, 0.15))


def power_by_phase(nvml: FakeNvml) -> Callable[[Any], None]:
    """A progress callback that lets the GPU draw idle power until the run begins."""

    def set_power(progress: Any) -> None:
        nvml.set(power_mw=IDLE_MW if progress.detail == "measuring idle power" else BUSY_MW)

    return set_power


def energy_event(run: RunResult) -> Any:
    """What the run says of its energy."""
    (event,) = [event for event in run.events if event.kind == "energy"]
    return event


# -- an interval ---------------------------------------------------------------------------------------------


def entries(*gpus: dict[str, Any], step_s: float = 1.0) -> list[Entry]:
    """Samples one step apart; each with the given readings of the engine's GPU."""
    nothing = dict.fromkeys(GpuReading.__annotations__)
    made = []
    for index, gpu in enumerate(gpus):
        reading = {**nothing, "index": 0, "name": "NVIDIA H100", "own": True, **gpu}
        made.append(Entry(index, index * step_s, {"gpu": [reading], "gpu_reason": None}))  # type: ignore[typeddict-item]
    return made


def test_energy_is_the_difference_of_the_counter():
    found = measure_interval(
        entries({"energy_mj": 5_000, "power_w": 1.0}, {"energy_mj": None}, {"energy_mj": 705_000, "power_w": 2.0})
    )
    assert found.energy_j == 700.0
    assert found.mean_w == 350.0
    assert found.peak_w == 2.0
    assert found.method == "its energy counter"


def test_without_a_counter_power_is_integrated_by_trapezoids():
    found = measure_interval(entries({"power_w": 100.0}, {"power_w": 300.0}, {"power_w": 300.0}, step_s=0.5))
    assert found.energy_j == pytest.approx(0.5 * 200 + 0.5 * 300)
    assert found.mean_w == pytest.approx(250.0)
    assert found.peak_w == 300.0
    assert found.method == "the integral of 3 power samples"


def test_counter_that_began_again_is_not_believed():
    found = measure_interval(entries({"energy_mj": 9_000, "power_w": 100.0}, {"energy_mj": 10, "power_w": 100.0}))
    assert found.energy_j == 100.0
    assert "power samples" in found.method


def test_use_and_throttling_leave_out_what_was_before_the_interval():
    before = {"utilization_percent": 0, "memory_used_bytes": 9, "throttle_reasons": ["sync boost"], "power_w": 900.0}
    inside = {"utilization_percent": 80, "memory_used_bytes": 5, "throttle_reasons": ["software power cap"]}
    after = {"utilization_percent": 90, "memory_used_bytes": 7, "throttle_reasons": []}
    found = measure_interval(entries(before, {**inside, "power_w": 200.0}, {**after, "power_w": 100.0}))
    assert found.utilization_percent == 85.0
    assert found.memory_bytes == 9
    assert found.throttled == {"software power cap": 0.5}
    assert found.throttled_percent == 50.0
    assert found.peak_w == 200.0


# -- a run ---------------------------------------------------------------------------------------------------


def test_run_has_its_energy_with_idle_power_in_it_and_without(scripted_loop, nvml, sampler):
    loop = scripted_loop(step_s=lambda config: 0.05)
    nvml.set(memory_used=5 * 2**30, gpu_percent=93)
    run = run_workload(loop, BURST, telemetry=sampler, progress=power_by_phase(nvml))
    metrics = run.metrics
    assert metrics["energy_j"] == pytest.approx(300 * run.duration_s, rel=0.1)
    assert metrics["power_w_mean"] == pytest.approx(300, rel=0.02)
    assert metrics["power_w_peak"] == 300.0
    assert metrics["idle_power_w"] == pytest.approx(70, rel=0.02)
    assert metrics["energy_per_output_token_j"] == pytest.approx(metrics["energy_j"] / 40)
    assert metrics["net_energy_per_output_token_j"] == pytest.approx(230 * run.duration_s / 40, rel=0.1)
    assert metrics["gpu_utilization_percent_mean"] == 93.0
    assert metrics["gpu_memory_bytes_peak"] == 5 * 2**30
    assert metrics["throttled_percent"] == 0.0
    assert {sample.gpu_power_w for sample in run.samples} <= {300.0, 70.0}
    assert run.samples[-1].gpu_memory_bytes == 5 * 2**30
    event = energy_event(run)
    assert "by its energy counter" in event.summary
    assert "idle power " in event.summary
    assert event.detail["gpu"]["uuid"] == uuid(0)
    assert 0.1 <= event.detail["idle_s"] < 5.0  # asked for 0.15 s; a busy machine takes longer
    assert from_json(json.loads(json.dumps(to_json(run)))) == run


def test_driver_without_a_counter_gives_nearly_the_same_energy(scripted_loop):
    with installed(old_driver=True) as nvml:
        sampler = TelemetrySampler(0.05)
        sampler.engine_gpu = uuid(0)
        sampler.start()
        loop = scripted_loop(step_s=lambda config: 0.05)
        run = run_workload(loop, BURST, telemetry=sampler, progress=power_by_phase(nvml))
        sampler.close()
    assert run.metrics["energy_j"] == pytest.approx(300 * run.duration_s, rel=0.15)
    assert "the integral of" in energy_event(run).summary


def test_what_held_the_clocks_back_is_on_record(scripted_loop, nvml, sampler):
    nvml.set(reasons=0x24)
    run = run_workload(scripted_loop(step_s=lambda config: 0.03), BURST, telemetry=sampler)
    assert run.metrics["throttled_percent"] == 100.0
    assert energy_event(run).detail["throttle_reasons"] == {
        "software power cap": 1.0,
        "software thermal slowdown": 1.0,
    }
    assert "clocks held back by software power cap (100 %)" in energy_event(run).summary


def test_idle_power_is_not_measured_while_other_requests_run(scripted_loop, nvml, sampler):
    from engine.sampling.params import SamplingParams

    loop = scripted_loop(step_s=lambda config: 0.02)
    loop.submit([5] * 4, SamplingParams(max_tokens=60, ignore_eos=True), on_output=lambda output: None)
    run = run_workload(loop, BURST, telemetry=sampler)
    assert run.metrics["energy_j"] > 0
    assert run.metrics["idle_power_w"] is None
    assert run.metrics["net_energy_per_output_token_j"] is None
    assert "idle power not measured: other requests were in flight" in energy_event(run).summary


def test_comparison_measures_idle_power_once_for_both_arms(scripted_loop, nvml, sampler):
    phases: list[str] = []
    set_power = power_by_phase(nvml)

    def watch(progress: Any) -> None:
        set_power(progress)
        if not phases or phases[-1] != progress.detail:
            phases.append(progress.detail)

    arms = ({"batching": "static"}, {"batching": "continuous"})
    found = run_comparison(scripted_loop(), BURST, *arms, repeats=2, telemetry=sampler, progress=watch, quality=False)
    assert found.status == "completed", found.error
    assert sum("measuring idle power" in phase for phase in phases) == 1
    assert len({run.metrics["idle_power_w"] for run in found.runs}) == 1
    assert all(run.metrics["net_energy_per_output_token_j"] is not None for run in found.runs)


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (lambda nvml, sampler: setattr(sampler, "engine_gpu", None), "the model is not on a GPU"),
        (lambda nvml, sampler: nvml.set(devices=0), "there is no NVIDIA GPU"),
        (lambda nvml, sampler: nvml.fail("nvmlDeviceGetCount_v2", GPU_IS_LOST), "lost"),
        (
            lambda nvml, sampler: [
                nvml.fail(f"nvmlDeviceGet{name}", NOT_SUPPORTED) for name in ("PowerUsage", "TotalEnergyConsumption")
            ],
            "GPU 0 (NVIDIA H100 80GB HBM3) offers no power reading",
        ),
    ],
)
def test_without_a_power_reading_there_is_no_energy_but_a_reason(scripted_loop, nvml, sampler, prepare, reason: str):
    prepare(nvml, sampler)
    run = run_workload(scripted_loop(), BURST, telemetry=sampler)
    assert run.status == "completed"
    assert run.metrics["energy_j"] is None
    assert run.metrics["energy_per_output_token_j"] is None
    assert energy_event(run).detail["reason"] in energy_event(run).summary
    assert energy_event(run).summary.startswith("energy not measured: ")
    assert reason in energy_event(run).summary


def test_gpu_that_is_lost_during_the_run_gives_no_figures(scripted_loop, nvml, sampler):
    def lose(progress: Any) -> None:
        if progress.done:
            nvml.fail("nvmlDeviceGetCount_v2", GPU_IS_LOST)

    arrival = {"kind": "closed-loop", "concurrency": 1}
    loop = scripted_loop(step_s=lambda config: 0.02)
    run = run_workload(loop, {**BURST, "arrival": arrival}, telemetry=sampler, progress=lose)
    assert run.status == "completed"
    assert [run.metrics[name] for name in METRIC_NAMES] == [None] * len(METRIC_NAMES)
    assert "lost" in energy_event(run).summary


def test_cancelled_run_has_the_energy_until_then_and_cancelling_ends_the_wait_for_idle_power(
    scripted_loop, nvml, sampler, monkeypatch
):
    cancel = threading.Event()
    loop = scripted_loop(step_s=lambda config: 0.02)
    arrival = {"kind": "closed-loop", "concurrency": 1}
    stop = lambda progress: cancel.set() if progress.done else None  # noqa: E731
    run = run_workload(loop, {**BURST, "arrival": arrival}, telemetry=sampler, progress=stop, cancel=cancel)
    assert run.status == "cancelled"
    assert run.metrics["energy_j"] > 0
    monkeypatch.setattr(EnergyMeter.__init__, "__defaults__", (30.0, 30.0))
    begun = time.monotonic()
    run = run_workload(loop, BURST, telemetry=sampler, cancel=cancel)
    assert (run.status, time.monotonic() - begun < 5) == ("cancelled", True)
    assert energy_event(run).summary == "energy not measured: the run ended before its first request"


def test_run_without_a_given_telemetry_samples_for_itself_and_ends_its_thread(scripted_loop, nvml):
    before = set(threading.enumerate())
    loop = scripted_loop()
    run = run_workload(loop, BURST)
    assert "the model is not on a GPU" in energy_event(run).summary
    assert "telemetry" not in {thread.name for thread in set(threading.enumerate()) - before}
    assert nvml.references == 0


def test_every_energy_metric_is_defined_with_its_unit():
    assert set(METRIC_NAMES) <= set(METRICS)
    assert METRICS["energy_per_output_token_j"].unit == "J/token"
    assert METRICS["net_energy_per_output_token_j"].higher_is_better is False

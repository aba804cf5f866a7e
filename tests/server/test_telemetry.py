"""Telemetry reads what is there and states what is not: our reader over the real binding and a made-up NVML library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace

import psutil
import pytest

from engine.telemetry import gpu as telemetry_gpu
from engine.telemetry.gpu import gpu_uuid, own_gpu
from engine.telemetry.readings import Telemetry
from tests.server.fake_nvml import (
    DRIVER_NOT_LOADED,
    GPU_IS_LOST,
    NO_PERMISSION,
    NOT_SUPPORTED,
    UNKNOWN,
    FakeNvml,
    installed,
    library,
    uuid,
)

GIB = 2**30


@pytest.fixture
def nvml() -> Iterator[FakeNvml]:
    with installed() as fake:
        yield fake


# -- process and machine -------------------------------------------------------------------------------------


def test_readings_of_process_and_machine_are_real():
    telemetry = Telemetry()
    ballast = bytearray(os.urandom(1) * (64 * 2**20))
    sample = telemetry.sample()
    assert sample["process"]["resident_bytes"] == pytest.approx(psutil.Process().memory_info().rss, rel=0.05)
    assert sample["process"]["resident_bytes"] > len(ballast)
    assert sample["process"]["threads"] >= 1
    assert 0 < sample["system"]["memory_available_bytes"] < sample["system"]["memory_total_bytes"]
    assert sample["system"]["memory_total_bytes"] == psutil.virtual_memory().total
    json.dumps(sample, allow_nan=False)


def test_busy_process_is_seen_by_each_sampler_for_itself():
    first, second = Telemetry(), Telemetry()
    end = time.process_time() + 0.4
    while time.process_time() < end:
        first.sample()  # a second reader must not cut this one's interval short
    reading = second.sample()
    assert reading["process"]["cpu_percent"] > 10
    assert reading["system"]["cpu_percent"] > 1


def test_two_samples_in_a_row_do_not_give_a_percentage_over_nothing():
    telemetry = Telemetry()
    end = time.process_time() + 0.2
    while time.process_time() < end:
        pass
    first, second = telemetry.sample(), telemetry.sample()
    assert first["process"]["cpu_percent"] > 10
    assert second["process"]["cpu_percent"] == first["process"]["cpu_percent"]
    assert second["system"]["cpu_percent"] == first["system"]["cpu_percent"]


# -- GPUs ----------------------------------------------------------------------------------------------------


def test_every_reading_of_a_gpu_has_its_unit(nvml: FakeNvml):
    nvml.set(
        memory_total=80 * GIB, memory_used=3 * GIB, memory_reserved=GIB, gpu_percent=87, memory_percent=41,
        temperature=61, power_mw=350_500, power_limit_mw=700_000, sm_clock=1980, memory_clock=2619, reasons=0x4,
        energy_mj=5_000_000,
    )  # fmt: skip
    sample = Telemetry().sample()
    (gpu,) = sample["gpu"]
    assert sample["gpu_reason"] is None
    assert 5_000_000 <= gpu.pop("energy_mj") < 5_100_000
    assert gpu == {
        "index": 0,
        "uuid": uuid(0),
        "name": "NVIDIA H100 80GB HBM3",
        "own": False,
        "error": None,
        "memory_total_bytes": 80 * GIB,
        "memory_used_bytes": 3 * GIB,  # without what the driver reserves, as nvidia-smi counts
        "utilization_percent": 87,
        "memory_utilization_percent": 41,
        "temperature_c": 61,
        "power_w": 350.5,
        "power_limit_w": 700.0,
        "sm_clock_mhz": 1980,
        "memory_clock_mhz": 2619,
        "clocks_event_reasons": 4,
        "throttle_reasons": ["software power cap"],
    }
    json.dumps(sample, allow_nan=False)


def test_functions_that_an_older_driver_lacks_are_replaced_or_none():
    with installed(old_driver=True) as nvml:
        nvml.set(memory_used=3 * GIB, memory_reserved=GIB, reasons=0x40)
        (gpu,) = Telemetry().sample()["gpu"]
    assert gpu["memory_used_bytes"] == 4 * GIB, "the first version counts what is reserved as used"
    assert gpu["throttle_reasons"] == ["hardware thermal slowdown"]
    assert gpu["energy_mj"] is None
    assert gpu["power_w"] == 350.5


@pytest.mark.parametrize("code", [NOT_SUPPORTED, NO_PERMISSION, UNKNOWN])
@pytest.mark.parametrize(
    ("functions", "missing"),
    [
        (["nvmlDeviceGetPowerUsage"], {"power_w"}),
        (["nvmlDeviceGetEnforcedPowerLimit"], {"power_limit_w"}),
        (["nvmlDeviceGetTotalEnergyConsumption"], {"energy_mj"}),
        (["nvmlDeviceGetUtilizationRates"], {"utilization_percent", "memory_utilization_percent"}),
        (["nvmlDeviceGetTemperature"], {"temperature_c"}),
        (["nvmlDeviceGetClockInfo"], {"sm_clock_mhz", "memory_clock_mhz"}),
        (["nvmlDeviceGetMemoryInfo", "nvmlDeviceGetMemoryInfo_v2"], {"memory_total_bytes", "memory_used_bytes"}),
        (
            ["nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"],
            {"clocks_event_reasons", "throttle_reasons"},
        ),
        (["nvmlDeviceGetName"], {"name"}),
        (["nvmlDeviceGetUUID"], {"uuid"}),
    ],
)
def test_what_a_device_does_not_offer_is_none_and_the_rest_is_there(
    nvml: FakeNvml, functions: list[str], missing: set[str], code: int
):
    nvml.set(devices=2)
    for function in functions:
        nvml.fail(function, code, device=1)
    whole, partial = Telemetry().sample()["gpu"]
    assert [name for name, value in whole.items() if value is None] == ["error"]
    assert {name for name, value in partial.items() if value is None} == missing | {"error"}


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (0x000, []),
        (0x001, []),  # an idle GPU lowers its clocks by itself
        (0x004, ["software power cap"]),
        (
            0x0E8,
            ["hardware slowdown", "software thermal slowdown", "hardware thermal slowdown", "hardware power brake"],
        ),
        (0x112, ["application clocks setting", "sync boost", "display clock setting"]),
        (0x405, ["software power cap", "reason 0x400"]),
    ],
)
def test_throttle_reasons_are_told_in_words(nvml: FakeNvml, mask: int, words: list[str]):
    nvml.set(reasons=mask)
    (gpu,) = Telemetry().sample()["gpu"]
    assert gpu["clocks_event_reasons"] == mask
    assert gpu["throttle_reasons"] == words


def test_machine_without_nvidias_driver_says_so(tmp_path):
    code = "import json; from engine.telemetry.readings import Telemetry; print(json.dumps(Telemetry().sample()))"
    sample = _in_another_process(code, "")
    if sample["gpu"] is not None:
        pytest.skip("this machine has an NVIDIA GPU")
    assert "no NVIDIA" in sample["gpu_reason"]
    assert sample["process"]["resident_bytes"] > 0


def test_library_is_found_as_the_driver_installs_it():
    """The real binding opens libnvidia-ml.so.1 by its name, in a process of its own."""
    code = "import json; from engine.telemetry.readings import Telemetry; print(json.dumps(Telemetry().sample()))"
    sample = _in_another_process(code, "devices=2 power_mw=90000 1.power_mw=123456")
    assert [gpu["power_w"] for gpu in sample["gpu"]] == [90.0, 123.456]


def _in_another_process(code: str, settings: str) -> dict:
    environment = dict(os.environ)
    if settings:
        environment |= {"FAKE_NVML": settings, "LD_LIBRARY_PATH": str(library().parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    return json.loads(done.stdout)


def test_missing_binding_is_stated(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)  # importing it raises ImportError
    sample = Telemetry().sample()
    assert sample["gpu"] is None
    assert "nvidia-ml-py" in sample["gpu_reason"]


def test_driver_that_is_not_loaded_and_no_device_do_not_harm_the_rest(nvml: FakeNvml):
    nvml.fail("nvmlInitWithFlags", DRIVER_NOT_LOADED)
    sample = Telemetry().sample()
    assert sample["gpu"] is None
    assert "Driver Not Loaded" in sample["gpu_reason"]
    assert sample["process"]["resident_bytes"] > 0
    nvml.fail("nvmlInitWithFlags", 0)
    nvml.set(devices=0)
    assert Telemetry().sample()["gpu_reason"] == "there is no NVIDIA GPU."


@pytest.mark.parametrize(
    "function", ["nvmlDeviceGetCount_v2", "nvmlDeviceGetHandleByIndex_v2", "nvmlDeviceGetClockInfo"]
)
def test_driver_lost_in_the_middle_is_stated_and_readings_come_back_with_it(
    nvml: FakeNvml, function: str, monkeypatch: pytest.MonkeyPatch
):
    telemetry = Telemetry()
    assert telemetry.sample()["gpu"]
    nvml.fail(function, GPU_IS_LOST)
    lost = telemetry.sample()
    assert lost["gpu"] is None
    assert "lost" in lost["gpu_reason"]
    nvml.fail(function, 0)
    assert telemetry.sample()["gpu"] is None, "not asked again at once: starting the library takes long"
    monkeypatch.setattr(telemetry_gpu, "_RETRY_S", 0.0)
    back = telemetry.sample()
    assert (len(back["gpu"]), back["gpu_reason"]) == (1, None)
    assert nvml.references == 1, "the library was shut down before it was started again"


def test_one_lost_gpu_does_not_hide_the_others(nvml: FakeNvml):
    nvml.set(devices=3)
    nvml.fail("nvmlDeviceGetPowerUsage", GPU_IS_LOST, device=1)
    sample = Telemetry().sample()
    first, lost, last = sample["gpu"]
    assert "lost" in lost["error"]
    assert (lost["index"], lost["uuid"], lost["power_w"]) == (1, uuid(1), None)
    assert first["power_w"] == last["power_w"] == 350.5
    assert sample["gpu_reason"] is None


def test_lost_gpu_that_does_not_tell_its_name_any_more_is_still_known(nvml: FakeNvml):
    nvml.set(devices=2)
    telemetry = Telemetry()
    telemetry.engine_gpu = uuid(1)
    telemetry.sample()
    nvml.fail("nvmlDeviceGetHandleByIndex_v2", GPU_IS_LOST, device=1)
    lost = own_gpu(telemetry.sample()["gpu"])
    assert (lost["uuid"], lost["name"], lost["power_w"]) == (uuid(1), "NVIDIA H100 80GB HBM3", None)


def test_closing_shuts_the_library_down(nvml: FakeNvml):
    telemetry = Telemetry()
    assert nvml.references == 1
    telemetry.close()
    telemetry.close()
    assert nvml.references == 0
    assert telemetry.sample()["gpu"] is None


# -- which GPU is the engine's -------------------------------------------------------------------------------


def test_engines_gpu_is_found_by_its_uuid_whatever_its_number(nvml: FakeNvml):
    nvml.set(devices=3)
    telemetry = Telemetry()
    assert own_gpu(telemetry.sample()["gpu"]) is None
    telemetry.engine_gpu = uuid(2)  # cuda:0 under CUDA_VISIBLE_DEVICES=2
    assert [gpu["own"] for gpu in telemetry.sample()["gpu"]] == [False, False, True]
    telemetry.engine_gpu = "GPU-another"
    assert own_gpu(telemetry.sample()["gpu"]) is None, "no guess among several"


def test_only_gpu_of_the_machine_is_the_engines_even_under_another_name(nvml: FakeNvml):
    telemetry = Telemetry()
    telemetry.engine_gpu = "GPU-of-a-slice"
    assert own_gpu(telemetry.sample()["gpu"])["index"] == 0
    telemetry.engine_gpu = None  # the model is on the CPU
    assert own_gpu(telemetry.sample()["gpu"]) is None


def test_torch_device_is_named_as_nvml_names_it(monkeypatch: pytest.MonkeyPatch):
    import torch

    properties = SimpleNamespace(uuid="00000000-0000-0000-0000-000000000002")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert gpu_uuid(torch.device("cuda:0")) == uuid(2)
    assert gpu_uuid(torch.device("cpu")) is None
    assert gpu_uuid(None) is None
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace())
    assert gpu_uuid(torch.device("cuda:0")) == ""

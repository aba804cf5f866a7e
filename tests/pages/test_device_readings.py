"""The readings of the device on the Live page: a GPU's, or processor and memory and why there is no GPU."""

from __future__ import annotations

import time

import pytest
from streamlit.testing.v1 import AppTest

from engine.telemetry import Telemetry
from pages.widgets.device import CPU_CHARTS, GPU_CHARTS, describe, device_table, own_gpu
from tests.pages.engine_fakes import PAGES
from tests.server.fake_nvml import installed

GIB = 2**30


@pytest.fixture
def page(services):
    return AppTest.from_file(str(PAGES / "live.py"), default_timeout=20)


def words(page):
    return " ".join(str(element.value) for element in (*page.markdown, *page.caption))


def reading(gpus=None, reason=None):
    """A real sample of this machine, with the GPUs put in."""
    telemetry = Telemetry()
    sample = dict(telemetry.sample())
    telemetry.close()
    return sample | {"gpu": gpus, "gpu_reason": reason}


def gpu(**fields):
    base = {"name": "NVIDIA H200", "own": False, "error": None, "temperature_c": 61.0, "throttle_reasons": []}
    return base | {"utilization_percent": 93.0, "memory_used_bytes": 5 * GIB, "power_w": 350.0} | fields


def test_a_machine_without_a_gpu_shows_processor_and_memory_and_says_why(page, client):
    client.telemetry_now = reading(reason="the NVIDIA driver is not loaded.")
    page.run()
    assert not page.exception
    assert "no GPU: the NVIDIA driver is not loaded." in words(page)
    assert all(title in words(page) for title, *_ in CPU_CHARTS)


def test_a_gpu_shows_use_memory_power_and_clocks_and_what_holds_it_back(page, client):
    client.telemetry_now = reading([gpu(throttle_reasons=["software power cap"])])
    page.run()
    assert not page.exception
    assert "NVIDIA H200 · 61 °C" in words(page)
    assert "held back: software power cap" in words(page)
    assert all(title in words(page) for title, *_ in GPU_CHARTS)
    assert not any(title in words(page) for title, *_ in CPU_CHARTS)


def test_before_the_first_reading_the_page_says_that_it_waits(page):
    page.run()
    assert not page.exception
    assert "Readings of the device appear" in words(page)


def test_the_readings_of_the_c_library_reach_the_charts():
    with installed():
        telemetry = Telemetry()
        sample = telemetry.sample()
        telemetry.close()
    table = device_table([sample], sample["time_unix_s"])
    assert set(table.columns) == {"t", *(name for _, _, columns, _ in GPU_CHARTS for name in columns)}
    assert table["power_w"][0] == pytest.approx(own_gpu(sample)["power_w"])
    assert table["memory_gib"][0] == pytest.approx(own_gpu(sample)["memory_used_bytes"] / GIB)


def test_the_engines_own_gpu_is_shown_among_several():
    sample = reading([gpu(name="first"), gpu(name="second", own=True)])
    assert own_gpu(sample)["name"] == "second"
    assert own_gpu(reading([gpu(name="first"), gpu(name="second")]))["name"] == "first"


def test_processor_use_is_of_all_cores_and_missing_readings_stay_empty():
    sample = reading() | {"process": {"resident_bytes": GIB, "cpu_percent": 150.0, "threads": 4}}
    sample["system"] = {**sample["system"], "cpu_count": 2}
    assert device_table([sample], time.time())["worker_percent"][0] == 75.0
    assert device_table([reading([gpu(power_w=None)])], time.time())["power_w"].isna().all()
    assert "fell off the bus" in describe(sample, gpu(error="GPU fell off the bus"))

"""The hardware's readings on the Live page: a GPU's, or processor and memory with the reason why there is no GPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from engine.telemetry.sampler import TelemetrySampler
from pages.background.feed import Feed
from pages.live.telemetry_charts import CPU_PANELS, GPU_PANELS, bin_samples, headline, values_of
from tests.pages.engine_fakes import PAGES, FakeClient
from tests.server.fake_nvml import GPU_IS_LOST, NOT_SUPPORTED, FakeNvml, installed, uuid

GIB = 2**30


@pytest.fixture
def nvml() -> Iterator[FakeNvml]:
    with installed() as fake:
        yield fake


@pytest.fixture
def sampler(nvml: FakeNvml) -> Iterator[TelemetrySampler]:
    made = TelemetrySampler()
    made.engine_gpu = uuid(0)
    yield made
    made.close()


@pytest.fixture
def page(services: Any) -> AppTest:
    return AppTest.from_file(str(PAGES / "live" / "page.py"), default_timeout=20)


def shown(page: AppTest) -> str:
    return " ".join(str(element.value) for element in (*page.markdown, *page.caption))


def specs(page: AppTest) -> list[dict[str, Any]]:
    """The specifications of the page's charts."""
    return [json.loads(element.proto.spec) for element in page.get("vega_lite_chart")]


def test_gpu_is_shown_with_use_memory_power_clocks_temperature_and_what_holds_it_back(page, client, nvml, sampler):
    nvml.set(power_mw=412_000, temperature=71, sm_clock=1755, memory_used=21 * GIB, gpu_percent=97, reasons=0x24)
    client.samples = [sampler.take().to_dict()]
    page.run()
    assert not page.exception
    for title, unit, _, _ in GPU_PANELS:
        assert f"**{title}** :small[:gray[{unit}]]" in shown(page)
    for reading in (
        "GPU use 97 % of time",
        "Memory access 41 % of time",
        "GPU memory 21 of 80 GiB",
        "Power 412 of 700 W",
        "Clocks SM 1,755, memory 2,619 MHz",
        "Temperature 71 °C",
    ):
        assert reading in shown(page)
    assert "NVIDIA H100 80GB HBM3" in shown(page)
    assert "clocks held back: software power cap" in shown(page)
    assert "clocks held back: software thermal slowdown" in shown(page)
    assert "% of all cores" not in shown(page)


def test_machine_without_a_gpu_shows_cpu_and_memory_and_says_why(page, client, nvml, sampler):
    nvml.set(devices=0)
    client.samples = [sampler.take().to_dict()]
    page.run()
    assert not page.exception
    assert "no GPU reading: there is no NVIDIA GPU." in shown(page)
    for title, *_ in CPU_PANELS:
        assert f"**{title}**" in shown(page)
    assert "**Power**" not in shown(page)


def test_model_on_the_cpu_beside_a_gpu_shows_the_machine_and_names_the_gpu(page, client, sampler):
    sampler.engine_gpu = None
    client.samples = [sampler.take().to_dict()]
    page.run()
    assert "the model is not on a GPU; GPU 0 (NVIDIA H100 80GB HBM3): 350 W, 87 % busy" in shown(page)
    assert "% of all cores" in shown(page)


def test_page_is_drawn_before_the_first_reading(page):
    page.run()
    assert not page.exception
    assert "Readings of the hardware appear" in shown(page)


def test_readings_that_the_device_lacks_are_named_so_and_left_out_of_the_chart(page, client, nvml, sampler):
    nvml.fail("nvmlDeviceGetPowerUsage", NOT_SUPPORTED)
    nvml.fail("nvmlDeviceGetEnforcedPowerLimit", NOT_SUPPORTED)
    client.samples = [sampler.take().to_dict()]
    page.run()
    assert not page.exception
    assert "Power not readable, W" in shown(page)


def test_axis_ends_at_the_limit_but_never_below_a_value(page, client, sampler):
    client.samples = [sampler.take().to_dict()]
    page.run()
    ends = [spec["layer"][0]["encoding"]["y"].get("scale") for spec in specs(page)]
    assert {"domain": {"unionWith": [0, 700.0]}, "nice": False} in ends, "a union: what is drawn widens it"


def test_lost_gpu_is_stated(nvml, sampler):
    nvml.set(devices=2)
    sampler.take()
    nvml.fail("nvmlDeviceGetHandleByIndex_v2", GPU_IS_LOST, device=0)
    assert "cannot be read: GPU is lost" in headline(sampler.take().sample)


def sample_at(time_unix_s: float, cpu: float) -> dict[str, Any]:
    system = {"memory_total_bytes": 8 * GIB, "memory_available_bytes": 6 * GIB, "cpu_percent": cpu, "cpu_count": 4}
    process = {"resident_bytes": GIB, "cpu_percent": 200.0, "threads": 3}
    return {"time_unix_s": time_unix_s, "process": process, "system": system, "gpu": None, "gpu_reason": "none."}


def test_values_have_the_units_of_their_axes():
    values = values_of(sample_at(0.0, 60.0))
    assert values["worker_percent"] == 50.0, "two busy cores of four"
    assert (values["machine_percent"], values["worker_gib"], values["machine_gib"]) == (60.0, 1.0, 2.0)
    assert values["machine_total_gib"] == 8.0


def test_bins_hold_means_and_leave_out_what_is_outside_or_was_not_read():
    samples = [sample_at(39.0, 99.0), sample_at(41.1, 10.0), sample_at(41.4, 30.0), sample_at(100.0, 50.0)]
    binned = bin_samples(samples, end_unix_s=100.0, window_s=60.0)
    assert list(binned["t"]) == [-58.5, 0.0]
    assert list(binned["machine_percent"]) == [20.0, 50.0]
    assert binned["power_w"].isna().all()


def test_window_without_a_reading_is_an_empty_table_with_all_columns():
    binned = bin_samples([sample_at(39.0, 99.0)], end_unix_s=200.0, window_s=60.0)
    assert len(binned) == 0
    assert {key for _, _, keys, _ in (*GPU_PANELS, *CPU_PANELS) for key in keys} < set(binned.columns)


# -- the feed ------------------------------------------------------------------------------------------------


def test_feed_asks_only_for_new_samples_and_starts_over_with_a_new_worker():
    client = FakeClient()
    client.samples = [sample_at(float(second), 1.0) for second in range(5)]
    feed = Feed(lambda: client)
    assert len(feed.read(0.0).samples) == 5
    asked: list[int] = []
    telemetry = client.telemetry
    client.telemetry = lambda *, since=-1: asked.append(since) or telemetry(since=since)  # type: ignore[method-assign]
    client.samples.append(sample_at(5.0, 2.0))
    assert [sample["time_unix_s"] for sample in feed.read(0.0).samples] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert asked == [4]
    status = client.status
    client.status = lambda: {**status(), "worker": {"pid": 2}}  # type: ignore[method-assign]
    client.samples = [sample_at(9.0, 1.0)]
    assert feed.read(0.0).samples[-1]["time_unix_s"] == 9.0
    assert asked[-1] == -1

"""Energy on the Compare page: joules per token of A against B, and how they were measured or why they were not."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from engine.measure.results import EventRecord, RunResult
from tests.storage.run_examples import make_comparison, with_gpu_samples

_JOULES = ("energy_j", "energy_per_output_token_j", "net_energy_per_output_token_j")


def _page(runs: list[RunResult]) -> AppTest:
    def script(runs: list[object]) -> None:
        from pages.compare.results import results

        results(runs)

    page = AppTest.from_function(script, default_timeout=20, kwargs={"runs": runs})
    page.run()
    assert not page.exception
    return page


def _with_energy(runs: list[RunResult], share_of_b: float) -> list[RunResult]:
    """The runs on a GPU; each run of B takes this share of what the run of A with the same requests takes."""
    of_a = {run.repeat: with_gpu_samples(run).metrics for run in runs if run.arm == "A"}
    measured = []
    for run in runs:
        share = share_of_b if run.arm == "B" else 1.0
        energy = {name: (of_a[run.repeat][name] or 0.0) * share for name in _JOULES}
        run = with_gpu_samples(run)
        measured.append(dataclasses.replace(run, metrics={**run.metrics, **energy}))
    return measured


def _row(page: AppTest, label: str) -> Any:
    table = page.dataframe[0].value
    return table[table["Metric"] == label].iloc[0]


def test_joules_per_token_are_compared_with_an_interval():
    page = _page(_with_energy(make_comparison(10, {"weights": "int4"}), 0.5))
    row = _row(page, "Energy per output token")
    assert row["B / A"] == pytest.approx(0.5)
    assert "lower by 50 %" in row["Verdict"]
    assert "J/token" in row["A"]
    assert _row(page, "Energy per output token, net")["B / A"] == pytest.approx(0.5)
    told = " ".join(item.value for item in page.caption)
    assert "**A** · Energy: " in told
    assert "**B** · Energy: " in told
    assert "idle power 70.0 W" in told


def test_comparison_without_power_readings_says_why():
    reason = "energy not measured: there is no NVIDIA driver on this machine"
    runs = [
        dataclasses.replace(run, events=[EventRecord(0.0, "energy", reason, {})])
        for run in make_comparison(10, {"weights": "int4"})
    ]
    page = _page(runs)
    assert "Energy not measured: there is no NVIDIA driver on this machine." in [item.value for item in page.caption]
    assert "Energy per output token" not in list(page.dataframe[0].value["Metric"])

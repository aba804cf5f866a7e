"""The Compare page over a fake engine and a real store."""

from __future__ import annotations

import pytest
from streamlit.testing.v1 import AppTest

from engine.config import EngineConfig
from pages.compare.setup import PRESETS
from tests.pages.engine_fakes import PAGES, fake_run


@pytest.fixture
def page(services):
    return AppTest.from_file(str(PAGES / "compare" / "page.py"), default_timeout=20)


def texts(elements):
    return " ".join(str(element.value) for element in elements)


def press_compare(page):
    return next(button for button in page.button if button.label == "Compare").click().run()


def test_every_preset_sets_knobs_that_the_engine_can_change_while_it_runs():
    for preset in PRESETS:
        for arm in (preset.arm_a, preset.arm_b):
            EngineConfig().with_changes(arm)
        assert preset.arm_a != preset.arm_b


def test_presets_name_workloads_that_exist():
    from engine.measure.workloads import WORKLOADS

    assert {preset.workload for preset in PRESETS} <= set(WORKLOADS)


def test_no_knob_that_needs_a_reload_can_be_compared(page):
    page.run()
    assert not page.exception
    options = page.multiselect(key="compare-knobs").options
    assert "Weight precision" in options
    assert not {"Model", "KV block size", "Max context"} & set(options)


def test_a_preset_fills_both_settings(page):
    page.run()
    page.selectbox(key="compare-preset").set_value("Prefix cache off or on").run()
    assert page.toggle(key="compare-a-prefix_cache").value is False
    assert page.toggle(key="compare-b-prefix_cache").value is True


def test_a_comparison_runs_is_recorded_and_shown(page, services, store, client, wait_until):
    client.job_polls = 1
    page.run()
    page.selectbox(key="compare-preset").set_value("Prefix cache off or on").run()
    page.number_input(key="compare-repeats").set_value(3).run()
    press_compare(page)
    job = services.recorder.jobs()[0]
    assert job.request["comparison"] == {
        "arm_a": {"prefix_cache": False},
        "arm_b": {"prefix_cache": True},
        "repeats": 3,
    }
    wait_until(lambda: not job.active, 20)
    page.run()
    assert not page.exception
    assert len(store.list_runs()) == 6
    labels = [item.label for item in page.metric]
    assert "A: prefix_cache = off" in labels
    assert "B: prefix_cache = on" in labels
    assert "95 % CI" in texts(page.info)
    table = page.dataframe[0].value
    assert "Output throughput" in set(table["Metric"])


def test_the_literatures_claim_stands_beside_the_measurement(page, store):
    for repeat in range(5):
        for arm, speed in (("A", 100 + repeat), ("B", 150 + repeat)):
            config = EngineConfig().with_changes({"weights": "model" if arm == "A" else "int4"})
            run = fake_run(f"{arm}{repeat}", arm=arm, repeat=repeat, comparison_id="c1", config=config, speed=speed)
            store.save_run(run)
    page.run()
    assert not page.exception
    assert "INT4 weights: speed" in texts(page.markdown)
    assert "less than claimed" in texts(page.markdown)
    assert "measured 1.49" in texts(page.caption)


def test_a_lossy_setting_shows_its_quality_cost_beside_its_speed(page, store):
    for arm, perplexity in (("A", 12.5), ("B", 13.75)):
        run = fake_run(f"{arm}0", arm=arm, repeat=0, comparison_id="c1")
        run.metrics |= {"perplexity": perplexity, "perplexity_se": 0.25, "same_top_percent": 91.0}
        store.save_run(run)
    page.run()
    assert not page.exception
    assert "Quality cost" in texts(page.markdown)
    shown = page.table[0].value.to_string()
    assert "13.75 ± 0.25" in shown
    assert "91 %" in shown


def test_a_quality_cost_names_what_it_is_measured_against(page, store):
    for arm in "AB":
        run = fake_run(f"{arm}0", arm=arm, repeat=0, comparison_id="c1")
        run.metrics |= {"perplexity": 12.5, "kl_mean_nats": 0.1, "same_top_percent": 91.0}
        run.quality_reference = "weights as stored, Q4_1 (GGUF)"
        store.save_run(run)
    page.run()
    assert not page.exception
    for shown in page.table[0].value["Measured against"]:
        assert shown.replace("\\", "") == "weights as stored, Q4_1 (GGUF)"


def test_a_disturbed_run_is_named_and_counts_in_no_figure(page, store):
    for repeat in range(3):
        for arm, speed in (("A", 100.0), ("B", 100.0)):
            run = fake_run(f"{arm}{repeat}", arm=arm, repeat=repeat, comparison_id="c1", speed=speed + repeat)
            if (arm, repeat) == ("B", 1):
                run.disturbed = [{"time_unix_s": run.started_unix_s + 1.0, "what": "max_running: 64 → 1, forced"}]
                run.metrics["output_tokens_s"] = 1.0
            store.save_run(run)
    page.run()
    assert not page.exception
    told = page.warning[0].value
    assert told.startswith("1 disturbed run left out")
    assert "B, repeat 2, after 1.0 s" in told
    figures = {item.label: (item.value, item.delta) for item in page.metric}
    assert all("101.0 tokens/s" in value for value, _ in figures.values())
    assert sum("2 runs" in str(delta) for _, delta in figures.values()) == 1


def test_a_run_that_cannot_be_shown_leaves_the_comparison_to_the_others(page, store):
    for repeat in range(3):
        for arm in "AB":
            store.save_run(fake_run(f"{arm}{repeat}", arm=arm, repeat=repeat, comparison_id="c1"))
    with store._writing() as connection:
        connection.exec_driver_sql("UPDATE runs SET metric_names = '7' WHERE arm = 'A' AND repeat = 1")
    page.run()
    assert not page.exception
    assert "cannot be shown: metrics" in page.error[0].value
    assert {str(item.delta).rpartition(", ")[2] for item in page.metric} == {"2 runs", "3 runs"}


def test_an_earlier_comparison_is_reopened_while_the_worker_is_dead(page, store, worker):
    for repeat in range(2):
        for arm in "AB":
            store.save_run(fake_run(f"{arm}{repeat}", arm=arm, repeat=repeat, comparison_id="c1"))
    worker.kill()
    page.run()
    assert not page.exception
    assert "Output throughput" in set(page.dataframe[0].value["Metric"])
    assert not [button for button in page.button if button.label == "Compare"]


def test_a_cancelled_comparison_keeps_its_finished_runs(page, services, store, client, wait_until):
    client.job_polls = 2
    page.run()
    press_compare(page)
    job = services.recorder.jobs()[0]
    wait_until(lambda: len(job.results) >= 2, 20)
    services.recorder.cancel(job)
    wait_until(lambda: not job.active)
    page.run()
    assert not page.exception
    assert "cancelled" in texts(page.warning)
    assert "completed" in {row.status for row in store.list_runs()}
    assert "running" not in {row.status for row in store.list_runs()}

"""History and Compare say which runs were disturbed or cannot be shown, and count neither."""

from __future__ import annotations

import dataclasses
import doctest
from collections.abc import Iterator

import pytest
from streamlit.testing.v1 import AppTest

from engine.measure.comparison import compare
from pages.history.figures import metric_row
from pages.history.groups import groups_by_run, groups_by_setting
from pages.history.table import table_of
from pages.shared import run_values as history_values
from pages.shared.store import close_stores, get_store
from storage import Store
from tests.pages.history_steps import open_history
from tests.storage.run_examples import make_comparison, make_run

REFERENCE = "weights as stored, Q4_1 (GGUF)"
QUALITY = {"perplexity": 14.1, "perplexity_se": 0.4, "kl_mean_nats": 0.03, "kl_p99_nats": 0.4, "same_top_percent": 92.0}


@pytest.fixture
def store(tmp_path, monkeypatch) -> Iterator[Store]:
    """The record that the page opens: its own file."""
    monkeypatch.setenv("HEADROOM_HOME", str(tmp_path))
    monkeypatch.delenv("HEADROOM_DB", raising=False)
    yield get_store()
    close_stores()


def _disturbed(run, what="weights: model → int4, forced"):
    return dataclasses.replace(run, disturbed=[{"time_unix_s": run.started_unix_s + 2.5, "what": what}])


def test_a_disturbed_run_is_marked_in_its_row_and_can_be_filtered(store):
    disturbed, quiet = _disturbed(make_run(1)), make_run(2)
    store.save_run(disturbed)
    store.save_run(quiet)
    page = open_history()
    table = page.dataframe[0].value.set_index("Run id")
    assert list(table.loc[disturbed.run_id]["Status"]) == ["completed", "disturbed"]
    assert list(table.loc[quiet.run_id]["Status"]) == ["completed"]
    for choice, expected in (("yes", disturbed), ("no", quiet)):
        page.multiselect(key="history-disturbed").set_value([choice]).run()
        assert list(page.dataframe[0].value["Run id"]) == [expected.run_id]
    next(button for button in page.button if button.label == "Clear all filters").click().run()
    assert len(page.dataframe[0].value) == 2


def test_an_opened_run_says_what_disturbed_it_and_when(store):
    store.save_run(_disturbed(make_run(1), "max\\_running: 64 → [4](http://e)"))
    warning = open_history(make_run(1).run_id).warning[0].value
    assert "after 2.5 s" in warning
    assert "left out of every average" in warning
    assert "](http:" not in warning.replace("\\]", "").replace("http\\:", "")


def test_no_average_counts_a_disturbed_run_and_a_sentence_says_how_many():
    runs = make_comparison(20, {"weights": "int4"}, repeats=4)
    runs[3] = _disturbed(dataclasses.replace(runs[3], metrics={**runs[3].metrics, "output_tokens_s": 1e9}))
    a, b = [run for run in runs if run.arm == "A"], [run for run in runs if run.arm == "B"]
    result = compare(a, b, "output_tokens_s")
    assert 1e9 not in result.values_b
    assert len(result.values_a) == len(result.values_b) == 3
    assert result.warnings[0].startswith("1 disturbed run left out of averages")
    row = metric_row("output_tokens_s", groups_by_setting(runs))
    assert "1,000,000,000" not in row["weights int4"]


def test_a_comparison_in_history_says_what_it_leaves_out(store):
    runs = make_comparison(20, {"weights": "int4"}, repeats=3)
    runs[1] = _disturbed(runs[1])
    for run in runs:
        store.save_run(run)
    page = open_history(comparison=runs[0].comparison_id)
    assert "1 disturbed run left out of averages" in page.warning[0].value
    assert page.table[0].value.shape[1] == 3


def test_a_lone_disturbed_run_shows_its_figures_without_a_difference():
    row = metric_row("tpot_ms_mean", groups_by_run([make_run(1), _disturbed(make_run(2, changes={"weights": "int4"}))]))
    value = row["run · weights int4 · disturbed"] if "run · weights int4 · disturbed" in row else list(row.values())[2]
    assert value.endswith("ms")
    assert "%" not in value
    assert "disturbed" in list(row)[2]


def test_a_row_that_cannot_be_shown_is_listed_as_such_and_can_be_deleted(store):
    bad, good = make_run(1, label="from a friend"), make_run(2)
    store.save_run(bad)
    store.save_run(good)
    with store._writing() as connection:
        connection.exec_driver_sql(f"UPDATE runs SET started_unix_s = 1e308 WHERE run_id = '{bad.run_id}'")
    page = open_history(bad.run_id)
    table = page.dataframe[0].value.set_index("Run id")
    assert list(table.loc[bad.run_id]["Status"]) == ["cannot be shown"]
    assert "started_unix_s is 1e+308" in table.loc[bad.run_id]["Label"]
    assert "cannot be shown: started_unix_s is 1e+308" in page.error[0].value
    both = open_history(bad.run_id, good.run_id)
    assert "cannot be shown" in both.error[0].value
    assert any(metric.label == "Output throughput" for metric in both.metric)
    page.button(key="history-delete").click().run()
    page.button(key="history-delete-confirm").click().run()
    assert not page.exception
    assert [row.run_id for row in store.list_runs()] == [good.run_id]
    assert list(table_of(store.list_runs())["Label"]) == [""]


def test_beside_every_figure_of_quality_stands_what_it_is_measured_against(store):
    run = make_run(1)
    other = make_run(2, changes={"weights": "int4"})
    for item in (run, other):
        item.metrics.update(QUALITY)
        store.save_run(dataclasses.replace(item, quality_reference=REFERENCE))
    page = open_history(run.run_id)
    page.session_state["history-tab"] = "All metrics"
    page.run()
    notes = page.table[-1].value["What it is"]
    for label in ("Perplexity", "KL divergence mean", "KL divergence p99", "Same top token"):
        assert REFERENCE in notes[label].replace("\\_", "_"), label
    page = open_history(run.run_id, other.run_id)
    page.toggle(key="history-all-metrics").set_value(True).run()
    for value in page.table[0].value.loc["Quality measured against"]:
        assert REFERENCE in value.replace("\\_", "_")


def test_the_import_names_the_file_the_run_and_the_field(store):
    import json

    from engine.measure.results import to_json

    page = open_history()
    document = json.dumps([to_json(make_run(1)) | {"started_unix_s": 1e308}]).encode()
    page.file_uploader(key="history-upload").upload("friend.json", document, "application/json").run()
    page.button(key="history-import").click().run()
    told = page.error[0].value
    for part in ("friend.json", "runs\\[0\\].started_unix_s", make_run(1).run_id, "1e+308"):
        assert part in told
    assert store.list_runs() == []


def test_a_csv_for_excel_begins_with_a_byte_order_mark(store, monkeypatch):
    store.save_run(make_run(1))
    made = {}
    monkeypatch.setattr("streamlit.download_button", lambda label, data, **_: made.__setitem__(label, data))
    page = open_history()
    assert made["CSV"]().startswith("run_id")
    page.checkbox(key="history-bom").check().run()
    assert made["CSV"]().startswith("\ufeffrun_id")
    assert made["Requests CSV"]().startswith("\ufeffrun_id")


def test_markdown_in_a_text_from_outside_stands_there_as_it_is():
    assert doctest.testmod(history_values).failed == 0
    page = AppTest.from_string(
        "import streamlit as st\nfrom pages.shared.run_values import plain\n"
        "st.markdown(plain('![x](http://e/y) <b> :red[a] # $1$ www.e.com a@b.c'))"
    ).run()
    assert "![" not in page.markdown[0].value

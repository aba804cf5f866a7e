"""The History page: what it lists, opens, compares, imports and deletes, headless."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import shlex
from collections.abc import Iterator
from datetime import date, datetime, timedelta

import pytest
import sqlalchemy
from streamlit.testing.v1 import AppTest

from engine.config import EngineConfig, parse_assignments
from engine.measure.metrics import METRICS
from engine.measure.results import EventRecord, to_json
from engine.measure.workloads import WORKLOADS
from pages.history.charts import distribution_curves, histogram, latencies, marks_table, request_timeline
from pages.history.figures import metric_row
from pages.history.groups import groups_by_run, groups_by_setting
from pages.history.provenance import repeat_command
from pages.shared.run_values import changed_knobs
from pages.shared.store import close_stores, get_store
from storage import StorageError, Store
from tests.pages.history_steps import open_history
from tests.storage.run_examples import failed_run, make_comparison, make_run, with_gpu_samples


@pytest.fixture
def store(tmp_path, monkeypatch) -> Iterator[Store]:
    """The record that the page opens: its own file."""
    monkeypatch.setenv("HEADROOM_HOME", str(tmp_path))
    monkeypatch.delenv("HEADROOM_DB", raising=False)
    yield get_store()
    close_stores()


@pytest.fixture
def runs(store):
    """A completed run, an INT4 run, a failed, a cancelled and a running one, all on record."""
    recorded = {
        "plain": make_run(1, label="first try"),
        "int4": make_run(2, changes={"weights": "int4"}, label="INT4, same traffic"),
        "failed": failed_run(3, label="kill test"),
        "cancelled": _cancelled(4),
        "lookup": make_run(6, workload="summarize", changes={"speculation": "ngram"}),
    }
    for run in recorded.values():
        store.save_run(run)
    recorded["running"] = make_run(7, requests=[], samples=[], events=[], metrics={}, label="under way")
    store.begin_run(recorded["running"])
    return recorded


def _cancelled(seed):
    run = make_run(seed, status="cancelled", label="stopped by hand")
    requests = [
        dataclasses.replace(request, finish_reason="abort" if request.index > 5 else "length")
        for request in run.requests
    ]
    return dataclasses.replace(run, requests=requests)


def _listed(page: AppTest) -> set[str]:
    return set(page.dataframe[0].value["Run id"])


def _texts(page: AppTest) -> str:
    parts = [element.value for element in (*page.markdown, *page.caption, *page.code, *page.subheader)]
    for table in page.table:
        parts.append(table.value.to_string(header=True, index=True, max_colwidth=200))
    return "\n".join(str(part) for part in parts)


def test_an_empty_record_tells_how_to_make_the_first_run(store):
    page = open_history()
    assert "No runs yet" in page.subheader[0].value
    assert "headroom history record" in page.code[0].value
    assert page.file_uploader(key="history-upload") is not None
    assert not page.dataframe


def test_every_run_is_listed_with_its_setting_and_figures(runs):
    page = open_history()
    table = page.dataframe[0].value.set_index("Run id")
    assert set(table.index) == {run.run_id for run in runs.values()}
    int4 = table.loc[runs["int4"].run_id]
    assert list(int4["Setting"]) == ["weights int4"]
    assert int4["output_tokens_s"] == pytest.approx(runs["int4"].metrics["output_tokens_s"])
    assert list(table.loc[runs["failed"].run_id]["Status"]) == ["failed"]


def test_filters_narrow_the_list(runs):
    page = open_history()
    assert _listed(page.text_input(key="history-text").input("INT4").run()) == {runs["int4"].run_id}
    page.text_input(key="history-text").input("").run()
    assert _listed(page.multiselect(key="history-status").select("failed").run()) == {runs["failed"].run_id}
    page.multiselect(key="history-status").unselect("failed").run()
    assert _listed(page.multiselect(key="history-workload").select("summarize").run()) == {runs["lookup"].run_id}
    page.multiselect(key="history-workload").unselect("summarize").run()
    assert _listed(page.multiselect(key="history-settings").select("weights int4").run()) == {runs["int4"].run_id}
    page.multiselect(key="history-settings").unselect("weights int4").run()
    assert len(_listed(page)) == len(runs)


def test_the_day_filter_includes_both_days_and_all_of_them(store):
    day = date(2026, 3, 14)
    midnight = datetime(day.year, day.month, day.day).timestamp()
    inside = [make_run(1, started_unix_s=midnight), make_run(2, started_unix_s=midnight + 2 * 86_400 - 1)]
    outside = [make_run(3, started_unix_s=midnight - 1), make_run(4, started_unix_s=midnight + 2 * 86_400)]
    for run in (*inside, *outside):
        store.save_run(run)
    page = open_history()
    page.date_input(key="history-days").set_value((day, day + timedelta(days=1))).run()
    assert _listed(page) == {run.run_id for run in inside}


def test_filters_that_match_nothing_say_so_and_can_be_cleared(runs):
    page = open_history()
    page.text_input(key="history-text").input("no such run").run()
    assert "No run matches" in page.info[0].value
    next(button for button in page.button if button.label == "Clear all filters").click().run()
    assert len(_listed(page)) == len(runs)


def test_an_opened_run_shows_its_metrics_with_units(runs):
    page = open_history(runs["plain"].run_id)
    shown = {metric.label: metric.value for metric in page.metric}
    speed = runs["plain"].metrics["output_tokens_s"]
    assert shown["Output throughput"] == f"{speed:.1f} tokens/s"
    assert shown["TTFT p50"].endswith(" ms")
    assert shown["Requests done"] == "24 / 24"
    page.session_state["history-tab"] = "All metrics"
    text = _texts(page.run())
    assert METRICS["total_tokens_s"].definition in text
    assert "Prefix hit rate" in text


def test_the_provenance_of_an_opened_run_is_complete(runs):
    page = open_history(runs["int4"].run_id)
    page.session_state["history-tab"] = "Provenance"
    text = _texts(page.run())
    provenance = runs["int4"].provenance
    for value in (
        runs["int4"].run_id,
        provenance.model,
        provenance.model_fingerprint,
        provenance.config_hash,
        provenance.workload_hash,
        provenance.code_revision,
        provenance.versions["torch"],
        provenance.hardware["cpu"],
        "14.90 GiB",
        "Weight precision",
        "int4",
        "num requests",
        "Code changed",
        "attention",
    ):
        assert value in text, value
    assert "--set weights=int4" in text


#: What each tab shows of a run with requests, and in its place of one without any.
TABS = {
    "Over time": ("**Throughput** :small[:gray[tokens/s]]", "No samples were recorded"),
    "Latencies": ("**Time to first token**", "No request of this run completed"),
    "Requests": ("**Timeline**", "No request was recorded."),
    "All metrics": ("**Everything else**", "Nothing was measured."),
    "Provenance": ("**Path that ran**", "**Path that ran**"),
}


@pytest.mark.parametrize("name", ["plain", "failed", "cancelled", "lookup", "running"])
def test_every_tab_of_every_kind_of_run_shows_its_subject_or_why_there_is_none(runs, name):
    page = open_history(runs[name].run_id)
    for tab, (shown, missing) in TABS.items():
        page.session_state["history-tab"] = tab
        page.run()
        assert not page.exception, tab
        assert (shown if runs[name].requests else missing) in _texts(page), tab


def test_a_failed_and_a_cancelled_run_say_what_happened(runs):
    assert "signal SIGKILL" in open_history(runs["failed"].run_id).error[0].value
    assert "after 6 of 24 requests" in open_history(runs["cancelled"].run_id).warning[0].value


def test_a_run_under_way_is_said_to_be_and_one_of_a_dead_owner_can_be_marked_failed(runs, store):
    run_id = runs["running"].run_id
    page = open_history(run_id)
    assert "under way" in page.info[0].value
    assert "history-mark-failed" not in {button.key for button in page.button}
    with store._writing() as connection:
        connection.execute(sqlalchemy.text("UPDATE runs SET owner_host = 'elsewhere' WHERE status = 'running'"))
    page = open_history(run_id)
    assert "another machine" in page.info[0].value
    page.button(key="history-mark-failed").click().run()
    assert store.get_run(run_id).status == "failed"
    assert "by hand" in page.error[0].value


def test_selected_runs_stand_side_by_side_with_differences_and_their_causes(runs):
    page = open_history(runs["plain"].run_id, runs["int4"].run_id)
    assert page.subheader[0].value == "2 runs side by side"
    metrics, causes = page.table[0].value, page.table[1].value
    plain, int4 = metrics.columns
    ratio = runs["int4"].metrics["tpot_ms_mean"] / runs["plain"].metrics["tpot_ms_mean"]
    assert f":green[{100 * (ratio - 1):+.1f} %]" in metrics.loc["TPOT mean", int4]
    assert "%]" not in metrics.loc["TPOT mean", plain]
    assert list(causes.loc["Knob: Weight precision"]) == ["model", "int4"]
    assert "Knob: Batching" not in causes.index


def test_the_baseline_can_be_chosen(runs):
    page = open_history(runs["plain"].run_id, runs["int4"].run_id)
    page.selectbox[0].select_index(1).run()
    assert "int4" in page.table[0].value.columns[0]
    assert ":red[" in page.table[0].value.loc["TPOT mean"].iloc[1]


def test_runs_without_any_figure_can_be_compared_too(runs):
    page = open_history(runs["failed"].run_id, runs["running"].run_id)
    assert "measured anything" in _texts(page)


def test_a_linked_comparison_is_listed_alone_and_compared_by_setting(runs, store):
    comparison = make_comparison(20, {"weights": "int4"}, repeats=3)
    for run in comparison:
        store.save_run(run)
    page = open_history(comparison=comparison[0].comparison_id)
    assert _listed(page) == {run.run_id for run in comparison}
    table = page.table[0].value
    assert list(table.columns) == ["defaults", "weights int4", "Ratio, 95 % interval"]
    assert "±" in table.loc["TPOT mean", "defaults"]
    assert ":green[" in table.loc["TPOT mean", "weights int4"]
    page.button(key="history-all-runs").click().run()
    assert len(_listed(page)) == len(runs) + len(comparison)


def test_deletion_happens_only_after_confirmation(runs, store):
    run_id = runs["plain"].run_id
    page = open_history(run_id)
    page.button(key="history-delete").click().run()
    assert any("cannot be undone" in text.value for text in page.markdown)
    page.button(key="history-delete-cancel").click().run()
    assert store.get_run(run_id) == runs["plain"]
    page.button(key="history-delete").click().run()
    page.button(key="history-delete-confirm").click().run()
    assert [toast.value for toast in page.toast] == ["1 run deleted."]
    with pytest.raises(StorageError):
        store.get_run(run_id)
    assert len(_listed(page)) == len(runs) - 1


def test_a_deletion_that_the_database_refuses_is_reported(runs, store, monkeypatch):
    def refuse(_run_ids):
        raise StorageError("the database is locked.", remedy="Close the other program.")

    page = open_history(runs["plain"].run_id)
    page.button(key="history-delete").click().run()
    monkeypatch.setattr(store, "delete_runs", refuse)
    page.button(key="history-delete-confirm").click().run()
    assert "Close the other program." in page.error[0].value
    assert len(_listed(page)) == len(runs)


def test_a_run_under_way_is_not_deleted(runs, store):
    page = open_history(runs["running"].run_id)
    page.button(key="history-delete").click().run()
    assert page.button(key="history-delete-confirm").disabled


def test_without_a_selection_nothing_can_be_deleted(runs):
    assert open_history().button(key="history-delete").disabled


def test_a_json_export_is_imported_and_a_broken_file_is_refused_with_the_reason(store):
    page = open_history()
    page.file_uploader(key="history-upload").upload("runs.json", b"[{]", "application/json").run()
    page.button(key="history-import").click().run()
    assert "not JSON" in page.error[0].value
    document = json.dumps([to_json(make_run(1))]).encode()
    page.file_uploader(key="history-upload").upload("runs.json", document, "application/json").run()
    page.button(key="history-import").click().run()
    assert store.get_run(make_run(1).run_id) == make_run(1)
    assert _listed(page) == {make_run(1).run_id}


def test_the_export_buttons_take_the_selection_or_else_the_whole_list(runs, store, monkeypatch):
    made = {}
    monkeypatch.setattr("streamlit.download_button", lambda label, data, **_: made.__setitem__(label, data))
    open_history(runs["int4"].run_id)
    assert [line["run_id"] for line in csv.DictReader(io.StringIO(made["CSV"]()))] == [runs["int4"].run_id]
    assert [document["run_id"] for document in json.loads(made["JSON"]())] == [runs["int4"].run_id]
    assert len(list(csv.DictReader(io.StringIO(made["Requests CSV"]())))) == len(runs["int4"].requests)
    open_history()
    assert len(list(csv.DictReader(io.StringIO(made["CSV"]())))) == len(runs)


def test_a_run_can_be_renamed(runs, store):
    page = open_history(runs["plain"].run_id)
    page.text_input(key=f"history-label-{runs['plain'].run_id}").input("the good one")
    page.button(key="history-label-save").click().run()
    assert store.get_run(runs["plain"].run_id).label == "the good one"
    assert page.subheader[0].value == "the good one"


def test_the_selection_follows_the_run_when_newer_runs_arrive(runs, store):
    page = open_history(runs["plain"].run_id)
    store.save_run(make_run(50, label="newer"))
    page.run()
    assert page.subheader[0].value == "first try"


def test_a_link_to_a_run_that_is_gone_shows_the_list(runs):
    assert len(_listed(open_history("nowhere"))) == len(runs)


def test_a_damaged_record_is_an_error_with_a_remedy_not_a_traceback(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADROOM_HOME", str(tmp_path))
    monkeypatch.delenv("HEADROOM_DB", raising=False)
    (tmp_path / "headroom.db").write_text("no database " * 100)
    page = open_history()
    assert "not a database" in page.error[0].value
    assert "Move the file away" in page.error[0].value
    (tmp_path / "headroom.db").unlink()
    page.button[0].click().run()
    assert "No runs yet" in page.subheader[0].value
    close_stores()


def test_opening_the_record_fails_the_runs_of_a_dashboard_that_died(store):
    store.begin_run(make_run(1))
    with store._writing() as connection:
        connection.execute(sqlalchemy.text("UPDATE runs SET owner_started_unix_s = 1000"))  # of a previous process
    close_stores()
    assert get_store().get_run(make_run(1).run_id).status == "failed"


def test_energy_of_a_run_is_told_with_how_it_was_measured_and_drawn_over_time(store):
    run = with_gpu_samples(make_run(1))
    store.save_run(run)
    page = open_history(run.run_id)
    per_token = next(item for item in page.metric if item.label == "Energy per output token")
    assert per_token.value.endswith("J/token")
    assert "**GPU power** :small[:gray[W]]" in _texts(page)
    assert "**GPU use** :small[:gray[% of time]]" in _texts(page)
    page.session_state["history-tab"] = "All metrics"
    page.run()
    assert not page.exception
    text = _texts(page)
    assert "by its energy counter; idle power 70.0 W, measured for 2.0 s before the run" in text
    assert "software power cap (25 %)" in text
    assert "Energy per output token, net" in text
    assert "GPU memory, peak" in text


def test_run_without_a_power_reading_says_why(store):
    summary = "energy not measured: there is no NVIDIA driver on this machine"
    reason = EventRecord(0.0, "energy", summary, {"reason": "there is no NVIDIA driver on this machine"})
    store.save_run(make_run(1, events=[reason]))
    store.save_run(make_run(2))
    page = open_history(make_run(1).run_id)
    assert "GPU power" not in _texts(page)
    page.session_state["history-tab"] = "All metrics"
    page.run()
    assert "Energy not measured: there is no NVIDIA driver on this machine." in _texts(page)
    other = open_history(make_run(2).run_id)
    other.session_state["history-tab"] = "All metrics"
    other.run()
    assert "from a version that did not measure it" in _texts(other)


def test_runs_side_by_side_show_energy_per_token_where_it_was_measured():
    without, measured = make_run(1), with_gpu_samples(make_run(2))
    row = metric_row("energy_per_output_token_j", groups_by_run([without, measured]))
    values = list(row.values())
    assert values[0] == "Energy per output token"
    assert values[1] == "–"
    assert values[2].startswith(f"{measured.metrics['energy_per_output_token_j']:.3g}"[:3])


def test_the_command_that_repeats_a_run_has_its_model_workload_seed_and_setting():
    run = make_run(3, changes={"weights": "int4", "memory_limit_gib": 1.5, "prefix_cache": False})
    words = shlex.split(repeat_command(run, named=True))
    assert words[:2] == ["headroom", "bench"]
    assert words[words.index("--workload") + 1] == "chat"
    assert words[words.index("--seed") + 1] == "1"
    settings = [words[place + 1] for place, word in enumerate(words) if word == "--set"]
    assert EngineConfig().with_changes(parse_assignments(settings)).to_dict() == run.provenance.config
    assert "workload.json" in repeat_command(run, named=False)


def test_named_workloads_are_recognised_from_the_record(store):
    workload = json.loads(json.dumps(WORKLOADS["quick"].to_dict()))
    run = make_run(1)
    run = dataclasses.replace(run, provenance=dataclasses.replace(run.provenance, workload=workload))
    store.save_run(run)
    page = open_history(run.run_id)
    page.session_state["history-tab"] = "Provenance"
    assert "--workload quick" in page.run().code[0].value


def test_changed_knobs_are_those_not_at_their_default():
    config = EngineConfig().with_changes({"weights": "int4", "model": "other"}).to_dict()
    assert changed_knobs(config) == {"weights": "int4"}
    assert changed_knobs({"a knob of another version": 3}) == {"a knob of another version": 3}


def test_groups_keep_settings_apart_and_names_unique():
    runs = [*make_comparison(20, {"weights": "int4"}, repeats=2), make_run(1), make_run(1)]
    assert [group.name for group in groups_by_setting(runs)] == ["defaults", "weights int4"]
    assert [len(group.runs) for group in groups_by_setting(runs)] == [4, 2]
    names = [group.name for group in groups_by_run(runs)]
    assert len(set(names)) == len(names)


def test_a_difference_that_the_interval_does_not_show_has_no_colour():
    runs = make_comparison(20, {"weights": "int4"}, repeats=4)
    for number, run in enumerate(runs):
        run.metrics["ttft_ms_p50"] = 100.0 + 10 * (number % 3)
        run.metrics["tpot_ms_mean"] = (30.0 if run.arm == "A" else 15.0) + 0.1 * (number % 3)
    groups = groups_by_setting(runs)
    assert ":gray[" in metric_row("ttft_ms_p50", groups)["weights int4"]
    assert ":green[" in metric_row("tpot_ms_mean", groups)["weights int4"]


def test_charts_hold_every_value_and_only_completed_requests_count():
    run = _cancelled(4)
    found = latencies(run)
    assert len(found["TTFT"]) == 6
    assert len(found["ITL"]) == sum(len(request.itl_ms) for request in run.requests[:6])
    bars = histogram(found["ITL"]).layer[0].data
    assert bars["count"].sum() == len(found["ITL"])
    curve = distribution_curves({"a run": found["ITL"]}).data
    assert curve["share"].iloc[-1] == 1.0
    assert (curve["value"].iloc[0], curve["value"].iloc[-1]) == (min(found["ITL"]), max(found["ITL"]))
    timeline = request_timeline(run.requests).data
    first = timeline[timeline["request"] == 0]
    assert list(first["end"])[-1] == pytest.approx(run.requests[0].arrival_s + run.requests[0].e2e_ms / 1e3)
    assert first["end"].iloc[0] == first["start"].iloc[1]


def test_toggles_are_marked_in_the_charts_and_the_start_is_not():
    changed = {"changed": {"weights": ["model", "int4"]}}
    events = [EventRecord(0.0, "run", "started", {}), EventRecord(1.5, "reconfigure", "weights: model → int4", changed)]
    assert marks_table(events).to_dict("records") == [
        {"t": 1.5, "label": "weights int4", "summary": "weights: model → int4"}
    ]

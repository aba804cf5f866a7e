"""What is recorded is what is read back; lists, filters, owners, deletion."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import subprocess
import sys

import pytest
import sqlalchemy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.measure.results import EventRecord, Provenance, RequestRecord, RunResult, SampleRecord, to_json
from storage import RunFilter, StorageError, open_store
from tests.storage.run_examples import failed_run, make_comparison, make_run

number = st.floats(allow_nan=False, allow_infinity=False)
count = st.integers(0, 2**62)
text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
json_value = st.recursive(
    st.none() | st.booleans() | count | number | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
document = st.dictionaries(st.text(max_size=8), json_value, max_size=4)
texts = st.dictionaries(text, text, max_size=3)


def _records(record_type, **strategies):
    return st.lists(st.builds(record_type, **strategies), max_size=3)


provenances = st.builds(
    Provenance,
    model=text,
    model_fingerprint=text,
    config=document,
    config_hash=st.text("0123456789abcdef", max_size=64),
    workload=document,
    workload_hash=st.text("0123456789abcdef", max_size=64),
    seed=count,
    versions=texts,
    hardware=document,
    code_revision=text,
    code_dirty=st.none() | st.booleans(),
    path=texts,
)
results = st.builds(
    RunResult,
    run_id=st.uuids(version=4).map(lambda value: value.hex),
    kind=st.sampled_from(["bench", "compare"]),
    status=st.sampled_from(["completed", "failed", "cancelled", "running"]),
    label=text,
    started_unix_s=st.floats(0, 7_258_118_400),
    duration_s=number,
    provenance=provenances,
    metrics=st.dictionaries(text, st.none() | number, max_size=5),
    requests=_records(
        RequestRecord,
        index=count,
        arrival_s=number,
        prompt_tokens=count,
        output_tokens=count,
        cached_tokens=count,
        ttft_ms=st.none() | number,
        tpot_ms=st.none() | number,
        e2e_ms=st.none() | number,
        itl_ms=st.lists(number, max_size=4),
        finish_reason=text,
        preemptions=count,
        draft_tokens=count,
        accepted_tokens=count,
        error=st.none() | text,
    ),
    samples=_records(
        SampleRecord,
        t_s=number,
        output_tokens_s=number,
        total_tokens_s=number,
        running=count,
        waiting=count,
        kv_blocks_used=count,
        kv_blocks_cached=count,
        step_ms=st.none() | number,
        resident_bytes=count,
    ),
    events=_records(EventRecord, t_s=number, kind=text, summary=text, detail=document),
    comparison_id=st.none() | text,
    arm=st.none() | st.sampled_from("AB"),
    repeat=st.none() | count,
    error=st.none() | text,
    disturbed=st.lists(st.fixed_dictionaries({"time_unix_s": st.floats(0, 7_258_118_400), "what": text}), max_size=2),
    quality_reference=st.none() | text,
)


@given(result=results)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_run_is_read_back_exactly_as_recorded(store, result):
    store.save_run(result)
    assert store.get_run(result.run_id) == result
    assert list(store.get_run(result.run_id).metrics) == list(result.metrics)


@given(first=results, second=results)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_saving_again_replaces_everything_of_the_run(store, first, second):
    second = dataclasses.replace(second, run_id=first.run_id)
    store.save_run(first)
    store.save_run(second)
    assert store.get_run(first.run_id) == second


def test_numbers_that_are_not_finite_are_read_back_as_not_measured(store):
    run = make_run(1)
    run.metrics["ttft_ms_mean"], run.metrics["e2e_ms_mean"] = math.nan, math.inf
    run.provenance.config["odd"] = [-math.inf]
    store.save_run(run)
    found = store.get_run(run.run_id)
    assert found.metrics["ttft_ms_mean"] is None
    assert found.metrics["e2e_ms_mean"] is None
    assert found.provenance.config["odd"] == [None]


def test_get_runs_keeps_the_order_asked_for_and_names_a_missing_run(store):
    runs = [make_run(seed) for seed in range(3)]
    for run in runs:
        store.save_run(run)
    wanted = [runs[2].run_id, runs[0].run_id]
    assert [run.run_id for run in store.get_runs(wanted)] == wanted
    with pytest.raises(StorageError, match="'nowhere'"):
        store.get_runs([runs[0].run_id, "nowhere"])


def test_an_announced_run_is_running_until_it_is_saved(store):
    run = make_run(1)
    announced = dataclasses.replace(run, requests=[], samples=[], events=[], metrics={})
    store.begin_run(announced)
    [row] = store.list_runs()
    assert (row.status, row.owner.pid) == ("running", os.getpid())
    store.save_run(run)
    [row] = store.list_runs()
    assert (row.status, row.owner, row.num_requests) == ("completed", None, len(run.requests))
    with pytest.raises(StorageError, match="already"):
        store.begin_run(run)


def test_failing_a_run_keeps_what_is_known_and_never_touches_one_that_has_ended(store):
    run, done = make_run(1), make_run(2)
    store.begin_run(run)
    store.save_run(done)
    assert store.fail_run(run.run_id, "worker died") is True
    failed = store.get_run(run.run_id)
    assert (failed.status, failed.error, failed.requests) == ("failed", "worker died", run.requests)
    assert store.fail_run(done.run_id, "too late") is False
    assert store.get_run(done.run_id) == done
    with pytest.raises(StorageError, match="no run"):
        store.fail_run("nowhere", "")


_ANNOUNCE = """
import sys, time
from storage import open_store
from tests.storage.run_examples import make_run
open_store(sys.argv[1]).begin_run(make_run(int(sys.argv[2])))
print("announced", flush=True)
time.sleep(60)
"""


def test_only_the_runs_of_dead_dashboards_are_declared_failed(store, database):
    doomed, living = (_announcing(database, seed) for seed in (1, 2))
    try:
        store.begin_run(make_run(3))
        foreign = {"owner_host": "another host", "owner_pid": 1, "owner_started_unix_s": 0.0}
        store.begin_run(make_run(4))
        _update(store, make_run(4).run_id, foreign)
        doomed.send_signal(signal.SIGKILL)
        doomed.wait(10)
        assert store.mark_orphans() == [make_run(1).run_id]
        statuses = {row.run_id: row.status for row in store.list_runs()}
        assert statuses == {make_run(seed).run_id: "failed" if seed == 1 else "running" for seed in (1, 2, 3, 4)}
        assert "dashboard" in store.get_run(make_run(1).run_id).error
    finally:
        for process in (doomed, living):
            process.kill()
            process.communicate()


def test_a_reused_process_id_does_not_keep_an_orphan_alive(store):
    store.begin_run(make_run(1))
    _update(store, make_run(1).run_id, {"owner_started_unix_s": 1_000.0})  # our pid, but another process long ago
    assert store.mark_orphans() == [make_run(1).run_id]


def _announcing(database, seed):
    command = [sys.executable, "-c", _ANNOUNCE, database, str(seed)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "announced\n"
    return process


def _update(store, run_id, values):
    with store._writing() as connection:
        from storage.records import RUNS

        connection.execute(sqlalchemy.update(RUNS).where(RUNS.c.run_id == run_id).values(values))


def test_filters_find_what_they_say(store):
    runs = [
        make_run(1, label="Baseline, 100% batch"),
        make_run(2, workload="summarize", changes={"weights": "int4"}),
        failed_run(3, label="baseline again"),
        *make_comparison(10, {"weights": "int8"}, repeats=2),
    ]
    for run in runs:
        store.save_run(run)

    def found(**criteria):
        return {row.run_id for row in store.list_runs(RunFilter(**criteria))}

    def expected(*indices):
        return {runs[index].run_id for index in indices}

    assert found() == {run.run_id for run in runs}
    assert found(statuses=("failed",)) == expected(2)
    assert found(kinds=("compare",)) == expected(3, 4, 5, 6)
    assert found(models=("smollm2-135m", "other")) == {run.run_id for run in runs}
    assert found(models=("other",)) == set()
    assert found(workloads=("summarize",)) == expected(1)
    assert found(text="BASELINE") == expected(0, 2)
    assert found(text="100% b") == expected(0)
    assert found(text="0%1") == set()  # % and _ are themselves, no wildcards
    assert found(text="sigkill") == expected(2)
    assert found(text=runs[1].run_id[:12]) == expected(1)
    assert found(config_hash=runs[1].provenance.config_hash) == expected(1)
    assert found(workload_hash=runs[1].provenance.workload_hash) == expected(1)
    assert found(comparison_id=runs[3].comparison_id) == expected(3, 4, 5, 6)
    assert found(since_unix_s=runs[1].started_unix_s, until_unix_s=runs[3].started_unix_s) == expected(1, 2)


def test_runs_are_ordered_by_a_column_or_a_metric_with_unmeasured_ones_last(store):
    runs = [make_run(seed) for seed in range(4)] + [failed_run(9)]
    for run in runs:
        store.save_run(run)
    by_start = [row.run_id for row in store.list_runs()]
    assert by_start == [run.run_id for run in sorted(runs, key=lambda run: -run.started_unix_s)]
    for descending in (True, False):
        rows = store.list_runs(order_by="ttft_ms_p50", descending=descending)
        values = [row.metrics["ttft_ms_p50"] for row in rows[:-1]]
        assert values == sorted(values, reverse=descending)
        assert rows[-1].run_id == runs[-1].run_id
    assert [row.run_id for row in store.list_runs(limit=2, offset=1)] == by_start[1:3]


def test_a_row_of_the_list_agrees_with_the_run(store):
    run = make_comparison(5, {"weights": "int4"})[1]
    store.save_run(run)
    [row] = store.list_runs()
    assert row.provenance == run.provenance
    assert row.metrics == run.metrics
    assert (row.num_requests, row.arm, row.workload_name) == (len(run.requests), "B", "chat")


def test_comparisons_are_listed_with_their_arms_in_order(store):
    for run in [*make_comparison(10, {"weights": "int4"}), *make_comparison(40, {"batching": "static"}, repeats=1)]:
        store.save_run(run)
    newest, oldest = store.list_comparisons()
    runs = make_comparison(10, {"weights": "int4"})
    assert oldest.run_ids == {arm: [run.run_id for run in runs if run.arm == arm] for arm in "AB"}
    assert oldest.statuses == ("completed",)
    assert newest.comparison_id == make_comparison(40, {})[0].comparison_id


def test_facets_are_the_values_that_occur(store):
    store.save_run(make_run(1, workload="summarize"))
    store.save_run(failed_run(2))
    facets = store.facets()
    assert facets.statuses == ["completed", "failed"]
    assert facets.workloads == ["chat", "summarize"]
    assert (facets.models, facets.kinds) == (["smollm2-135m"], ["bench"])


def test_the_outline_changes_with_every_change_of_the_list(store):
    run = make_run(1)
    assert store.outline() == {}
    store.begin_run(run)
    assert store.outline() == {run.run_id: ("running", "")}
    store.save_run(run)
    store.set_label(run.run_id, "first")
    assert store.outline() == {run.run_id: ("completed", "first")}


def test_deleting_a_run_takes_all_its_rows_and_no_others(store):
    keep, gone = make_run(1), make_run(2)
    store.save_run(keep)
    store.save_run(gone)
    assert store.delete_runs([gone.run_id, gone.run_id, "nowhere"]) == 1
    assert store.get_run(keep.run_id) == keep
    with store._reading() as connection:
        for table in ("metrics", "requests", "samples", "events"):
            ids = set(connection.scalars(sqlalchemy.text(f"SELECT run_id FROM {table}")))
            assert ids == {keep.run_id}


def test_a_label_can_be_changed(store):
    store.save_run(make_run(1))
    store.set_label(make_run(1).run_id, "the good one")
    assert store.get_run(make_run(1).run_id) == make_run(1, label="the good one")
    with pytest.raises(StorageError, match="no run"):
        store.set_label("nowhere", "x")


def test_the_default_place_is_under_headroom_home(home):
    store = open_store()
    store.save_run(make_run(1))
    store.close()
    assert (home / "headroom.db").exists()


def test_the_environment_names_the_database(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADROOM_DB", f"sqlite:///{tmp_path}/elsewhere.db")
    open_store().close()
    assert (tmp_path / "elsewhere.db").exists()


def test_a_document_of_a_saved_run_is_the_document_of_the_run(store):
    run = make_run(7)
    store.save_run(run)
    assert to_json(store.get_run(run.run_id)) == to_json(run)

"""A row of the database that no run can be is shown as such, and no other run suffers from it."""

from __future__ import annotations

import csv
import io
import json

import pytest
import sqlalchemy
from typer.testing import CliRunner

from storage import StorageError, UnshowableRun
from storage.cli import app
from tests.storage.run_examples import make_comparison, make_run

BAD, GOOD = make_run(1, label="from elsewhere").run_id, make_run(2).run_id
SPOILT = {
    "a start in the year 10^300": ("UPDATE runs SET started_unix_s = 1e308", "started_unix_s"),
    "a configuration that is no JSON": ("UPDATE runs SET config = '{broken'", "provenance.config"),
    "a configuration that is a list": ("UPDATE runs SET config = '[]'", "provenance.config"),
    "a bottomless configuration": (f"UPDATE runs SET config = '{'[' * 9_000}'", "provenance.config"),
    "half a character": ('UPDATE runs SET workload = \'{"name": "\\ud800"}\'', "provenance.workload.name"),
    "metrics without names": ("UPDATE runs SET metric_names = '7'", "metrics"),
    "a status of its own": ("UPDATE runs SET status = 'asleep'", "status"),
    "disturbances that are none": ("UPDATE runs SET disturbed = '[1]'", "disturbed[0]"),
}
ONLY_SQLITE = {
    "a text for a time": ("UPDATE runs SET duration_s = 'long'", "duration_s"),
    "bytes that are no UTF-8": ("UPDATE runs SET model = CAST(X'ff41' AS TEXT)", "provenance.model"),
}


def _spoil(store, statement, run_id=BAD):
    store.save_run(make_run(1, label="from elsewhere"))
    store.save_run(make_run(2))
    with store._writing() as connection:
        connection.exec_driver_sql(f"{statement} WHERE run_id = '{run_id}'")


@pytest.mark.parametrize("what", SPOILT)
def test_one_bad_row_never_disables_the_rest(store, what):
    statement, field = SPOILT[what]
    _spoil(store, statement)
    _check_everything(store, field)


@pytest.mark.parametrize("what", ONLY_SQLITE)
def test_one_bad_row_of_sqlite_never_disables_the_rest(sqlite_store, what):
    statement, field = ONLY_SQLITE[what]
    _spoil(sqlite_store, statement)
    _check_everything(sqlite_store, field)


def _check_everything(store, field):
    rows = {row.run_id: row for row in store.list_runs()}
    assert rows[BAD].unshowable.startswith(field)
    assert (rows[GOOD].unshowable, rows[GOOD].metrics) == (None, make_run(2).metrics)
    store.facets(), store.outline(), store.list_comparisons(), store.mark_orphans()
    bad, good = store.read_runs([BAD, GOOD])
    assert isinstance(bad, UnshowableRun)
    assert bad.reason == rows[BAD].unshowable
    assert good == make_run(2)
    with pytest.raises(StorageError, match="cannot be shown"):
        store.get_run(BAD)
    lines = {line["run_id"]: line for line in csv.DictReader(io.StringIO(store.export_csv()))}
    assert f"cannot be shown: {field}" in lines[BAD]["error"]
    assert lines[GOOD]["config.weights"] == "model"
    assert len(list(csv.DictReader(io.StringIO(store.export_requests_csv())))) == 1 + len(make_run(2).requests)
    exported = store.export_json()
    assert store.delete_runs([BAD]) == 1
    assert [row.run_id for row in store.list_runs()] == [GOOD]
    report = store.import_json(exported)  # passes over what could not be exported
    assert (report.imported, sorted(report.skipped)) == ([], sorted([BAD, GOOD]))


def test_a_bad_request_makes_its_run_unshowable_when_it_is_opened(store):
    store.save_run(make_run(1))
    store.save_run(make_run(2))
    with store._writing() as connection:
        connection.execute(
            sqlalchemy.text("UPDATE requests SET itl_ms = '[1,' WHERE position = 3 AND run_id = :run"), {"run": BAD}
        )
    bad, good = store.read_runs([BAD, GOOD])
    assert bad.reason.startswith("requests[3].itl_ms")
    assert good == make_run(2)
    assert len(store.export_csv().splitlines()) == 3


def test_the_command_line_lists_a_bad_row_in_a_line_and_deletes_it(sqlite_store, tmp_path):
    _spoil(sqlite_store, "UPDATE runs SET started_unix_s = 1e308")
    database = f"sqlite:///{tmp_path}/record.db"
    listed = CliRunner().invoke(app, ["list", "--db", database])
    assert listed.exit_code == 0
    [line] = [line for line in listed.stdout.splitlines() if line.startswith(BAD)]
    assert "cannot be shown: started_unix_s is 1e+308" in line
    assert json.loads(CliRunner().invoke(app, ["list", "--json", "--db", database]).stdout)[0]["unshowable"]
    assert json.loads(CliRunner().invoke(app, ["delete", "--run", BAD, "--db", database]).stdout) == {"deleted": 1}
    assert BAD not in CliRunner().invoke(app, ["list", "--db", database]).stdout


def test_a_comparison_with_a_bad_run_is_listed_with_the_others(store):
    for run in make_comparison(20, {"weights": "int4"}, repeats=2):
        store.save_run(run)
    bad = make_comparison(20, {"weights": "int4"}, repeats=2)[0].run_id
    with store._writing() as connection:
        connection.exec_driver_sql(f"UPDATE runs SET started_unix_s = 1e308 WHERE run_id = '{bad}'")
    [comparison] = store.list_comparisons()
    assert comparison.started_unix_s < 1e10
    assert bad not in [run_id for run_ids in comparison.run_ids.values() for run_id in run_ids]


def test_an_owner_that_is_none_is_no_reason_to_close_the_record(sqlite_store):
    sqlite_store.begin_run(make_run(1))
    with sqlite_store._writing() as connection:
        connection.exec_driver_sql("UPDATE runs SET owner_pid = 'x', owner_started_unix_s = 'y'")
    assert sqlite_store.mark_orphans() == [BAD]

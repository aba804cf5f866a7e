"""The views for people who ask in SQL, and the schema that brought them."""

from __future__ import annotations

import alembic.command
import pytest
import sqlalchemy

from engine.config import knobs
from engine.measure.metrics import METRICS
from storage import RunFilter, open_store
from storage.database import alembic_config, database_url, make_engine, writer
from storage.views import create_views, wide_columns
from tests.storage.run_examples import failed_run, make_run

DISTURBED = [{"time_unix_s": 1_790_000_010.5, "what": "weights: model → int4, forced by another client"}]


def _rows(store, query):
    with store._reading() as connection:
        return connection.exec_driver_sql(query).mappings().all()


def test_runs_wide_has_a_row_a_run_with_every_knob_and_metric_in_a_column_of_its_own(store):
    runs = [make_run(1), make_run(2, changes={"weights": "int4", "max_running": 7}, label="small"), failed_run(3)]
    for run in runs:
        store.save_run(run)
    rows = {row["run_id"]: row for row in _rows(store, "SELECT * FROM runs_wide")}
    assert set(rows) == {run.run_id for run in runs}
    assert {knob.name for knob in knobs()} | set(METRICS) <= set(rows[runs[0].run_id])
    row = rows[runs[1].run_id]
    assert (row["weights"], row["max_running"], row["label"]) == ("int4", 7, "small")
    assert row["output_tokens_s"] == runs[1].metrics["output_tokens_s"]
    assert rows[runs[2].run_id]["output_tokens_s"] is None


def test_requests_flat_has_a_row_a_request_with_its_run_and_all_its_times(store):
    run = make_run(1, label="first", disturbed=DISTURBED)
    store.save_run(run)
    rows = _rows(store, 'SELECT * FROM requests_flat ORDER BY "position"')
    assert len(rows) == len(run.requests)
    for row, request in zip(rows, run.requests, strict=True):
        assert (row["run_id"], row["label"]) == (run.run_id, "first")
        assert (row["ttft_ms"], row["tpot_ms"], row["e2e_ms"]) == (request.ttft_ms, request.tpot_ms, request.e2e_ms)
        assert row["arrival_unix_s"] == pytest.approx(run.started_unix_s + request.arrival_s)
        assert "forced by another client" in row["disturbed"]


def test_a_configuration_that_is_no_json_leaves_the_other_rows_of_the_view_alone(store):
    store.save_run(make_run(1))
    store.save_run(make_run(2, changes={"weights": "int4"}))
    with store._writing() as connection:
        connection.execute(
            sqlalchemy.text("UPDATE runs SET config = '{broken' WHERE run_id = :run"), {"run": make_run(1).run_id}
        )
    rows = {row["run_id"]: row["weights"] for row in _rows(store, "SELECT run_id, weights FROM runs_wide")}
    assert rows == {make_run(1).run_id: None, make_run(2).run_id: "int4"}


def test_views_of_other_knobs_are_made_again_when_the_record_is_opened(store, database, monkeypatch):
    columns = wide_columns()
    with store._writing() as connection, monkeypatch.context() as patch:
        patch.setattr("storage.views.METRICS", {"output_tokens_s": METRICS["output_tokens_s"]})
        create_views(connection)
    store.save_run(make_run(1))
    again = open_store(database)
    assert list(_rows(again, "SELECT * FROM runs_wide")[0]) == columns
    again.close()


def test_a_record_from_before_runs_could_be_disturbed_keeps_its_runs_up_and_down(database):
    """A database of the second schema, with runs in it, is brought to this one, and back."""
    store = open_store(database)
    store.save_run(make_run(1))
    store.close()
    engine = make_engine(database_url(database), 5.0)
    with writer(engine).connect() as connection:
        alembic.command.downgrade(alembic_config(connection), "0002")
        connection.commit()
        inspector = sqlalchemy.inspect(connection)
        assert "disturbed" not in {column["name"] for column in inspector.get_columns("runs")}
        assert inspector.get_view_names() == []
    engine.dispose()
    again = open_store(database)
    assert again.get_run(make_run(1).run_id) == make_run(1)  # with its requests: nothing was made again and lost
    disturbed = make_run(2, disturbed=DISTURBED, quality_reference="weights as stored, Q4_1 (GGUF)")
    again.save_run(disturbed)
    assert again.get_run(disturbed.run_id) == disturbed
    assert [row.run_id for row in again.list_runs(RunFilter(disturbed=True))] == [disturbed.run_id]
    assert [row.run_id for row in again.list_runs(RunFilter(disturbed=False))] == [make_run(1).run_id]
    assert [row.disturbed for row in again.list_runs()] == [DISTURBED, []]
    assert len(_rows(again, "SELECT * FROM runs_wide")) == 2
    again.close()

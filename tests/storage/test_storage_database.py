"""Migrations, several processes at once, and what happens when disk, lock, file or server fail."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys

import alembic.command
import pytest
import sqlalchemy
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from engine.measure.results import from_json
from storage import StorageError, open_store
from storage.database import alembic_config, database_url, make_engine, writer
from storage.tables import Base
from tests.storage.run_examples import make_run, with_gpu_samples


def test_migrations_lead_from_an_empty_database_to_exactly_the_tables_of_the_code(store):
    with store._reading() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "render_as_batch": True})
        assert compare_metadata(context, Base.metadata) == []


def test_runs_recorded_before_gpu_readings_were_kept_stay_as_they_are(database):
    """A database of the first schema, with a run in it, is brought to this one, and back."""
    store = open_store(database)
    store.save_run(make_run(1))
    store.close()
    engine = make_engine(database_url(database), 5.0)
    with writer(engine).connect() as connection:
        alembic.command.downgrade(alembic_config(connection), "0001")
        connection.commit()
        columns = {column["name"] for column in sqlalchemy.inspect(connection).get_columns("samples")}
    engine.dispose()
    assert "resident_bytes" in columns
    assert not {name for name in columns if name.startswith("gpu")}
    again = open_store(database)
    assert again.get_run(make_run(1).run_id) == make_run(1)
    measured = with_gpu_samples(make_run(2))
    again.save_run(measured)
    assert again.get_run(measured.run_id) == measured
    again.close()


def test_opening_again_keeps_the_runs(database):
    first = open_store(database)
    first.save_run(make_run(1))
    first.close()
    second = open_store(database)
    assert second.get_run(make_run(1).run_id) == make_run(1)
    second.close()


def test_sqlite_uses_write_ahead_logging_and_foreign_keys(sqlite_store):
    with sqlite_store._reading() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == 300


def test_the_schema_of_a_newer_version_is_refused_and_left_alone(store, database):
    with store._writing() as connection:
        connection.execute(sqlalchemy.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(StorageError, match="newer") as caught:
        open_store(database)
    assert "Update Headroom" in caught.value.remedy
    with store._reading() as connection:
        assert connection.execute(sqlalchemy.text("SELECT version_num FROM alembic_version")).scalar() == "9999"


_DASHBOARD = """
import sys
from storage import open_store
from tests.storage.run_examples import make_run
database, first = sys.argv[1], int(sys.argv[2])
sys.stdin.readline()                                  # all start at once, on a database that is not there yet
store = open_store(database, lock_timeout_s=30)
for seed in range(first, first + 6):
    run = make_run(seed)
    store.begin_run(run)
    store.save_run(run)
    assert store.get_run(run.run_id) == run
    store.save_run(make_run(0, label=f"by {first}"))  # a run that all of them write
    for row in store.list_runs():                     # what the others wrote is whole or not there
        assert row.num_requests == row.metrics["requests"]
    if seed % 3 == 0:
        assert store.delete_runs([run.run_id]) == 1
assert store.mark_orphans() == []
"""


def test_dashboards_that_start_and_write_at_once_corrupt_nothing(database):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _DASHBOARD, database, str(first)],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for first in (100, 200, 300)
    ]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        _, problems = process.communicate(timeout=120)
        assert process.returncode == 0, problems
    store = open_store(database)
    kept = [seed for first in (100, 200, 300) for seed in range(first, first + 6) if seed % 3 != 0]
    assert {row.run_id for row in store.list_runs()} == {make_run(seed).run_id for seed in (0, *kept)}
    assert store.get_runs([make_run(seed).run_id for seed in kept]) == [make_run(seed) for seed in kept]
    if database.startswith("sqlite"):
        with store._reading() as connection:
            assert connection.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"
            assert connection.exec_driver_sql("PRAGMA foreign_key_check").all() == []
    store.close()


def test_a_full_disk_loses_neither_the_old_runs_nor_the_new_one(sqlite_store, home):
    old = make_run(1)
    sqlite_store.save_run(old)
    _limit_pages(sqlite_store)
    recorded, caught = _record_until_it_fails(sqlite_store)
    new = make_run(2 + recorded)
    assert "disk is full" in str(caught)
    assert new.run_id not in {row.run_id for row in sqlite_store.list_runs()}  # nothing half written
    assert sqlite_store.get_run(old.run_id) == old
    assert "Free some space" in caught.remedy
    assert str(caught.kept) in caught.remedy
    assert caught.kept.is_relative_to(home)
    assert from_json(caught.kept.read_text()) == new

    other = open_store()  # there is space again
    other.import_json(caught.kept.read_bytes())
    assert other.get_run(new.run_id) == new
    other.close()


def test_a_full_disk_on_replacing_a_run_leaves_the_run_as_it_was(sqlite_store):
    sqlite_store.begin_run(make_run(1))
    before = sqlite_store.get_run(make_run(1).run_id)
    _limit_pages(sqlite_store, more=0)
    bigger = make_run(1, requests=make_run(1).requests * 40)
    with pytest.raises(StorageError, match="disk is full"):
        sqlite_store.save_run(bigger)
    assert sqlite_store.get_run(before.run_id) == before
    assert sqlite_store.fail_run(before.run_id, "could not be recorded") in (True, False)


def _record_until_it_fails(store):
    """(how many runs from seed 2 on could be recorded, the error of the next one)."""
    for seed in range(2, 200):
        try:
            store.save_run(make_run(seed))
        except StorageError as problem:
            return seed - 2, problem
    raise AssertionError("the disk never filled")


def _limit_pages(store, more=20):
    """Let SQLite answer "disk full" once the file has grown by ``more`` pages."""
    store.close()

    @sqlalchemy.event.listens_for(store._engine, "connect")
    def limit(connection, _record):
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count={pages + more}")


def test_no_space_anywhere_still_raises_the_first_error(sqlite_store, monkeypatch):
    monkeypatch.setenv("HEADROOM_HOME", "/dev/null/home")
    monkeypatch.setattr("tempfile.tempdir", "/dev/null/tmp")
    _limit_pages(sqlite_store, more=0)
    with pytest.raises(StorageError, match="disk is full") as caught:
        sqlite_store.save_run(make_run(1, requests=make_run(1).requests * 40))
    assert caught.value.kept is None


def test_a_locked_database_is_reported_after_the_timeout_and_readable_meanwhile(sqlite_store, tmp_path):
    sqlite_store.save_run(make_run(1))
    other = sqlite3.connect(tmp_path / "record.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StorageError, match="locked") as caught:
        sqlite_store.set_label(make_run(1).run_id, "x")
    assert "try again" in caught.value.remedy
    assert sqlite_store.get_run(make_run(1).run_id) == make_run(1)
    other.execute("ROLLBACK")
    other.close()
    sqlite_store.set_label(make_run(1).run_id, "x")


@pytest.mark.postgres
def test_a_locked_table_of_postgresql_is_reported_after_the_timeout(postgres_database):
    store = open_store(postgres_database, lock_timeout_s=0.3)
    other = sqlalchemy.create_engine(postgres_database)
    with other.begin() as connection:
        connection.execute(sqlalchemy.text("LOCK TABLE runs IN ACCESS EXCLUSIVE MODE"))
        with pytest.raises(StorageError, match="locked"):
            store.save_run(make_run(1))
    store.save_run(make_run(1))
    other.dispose()
    store.close()


@pytest.mark.postgres
def test_an_unknown_database_of_a_server_is_named_without_the_password(postgres_server):
    url = postgres_server.replace("headroom@", "headroom:secret@") + "/nowhere"
    with pytest.raises(StorageError, match="nowhere") as caught:
        open_store(url)
    assert "secret" not in str(caught.value)


@pytest.mark.postgres
def test_a_value_that_postgresql_cannot_hold_is_refused_and_the_run_kept(postgres_database):
    store = open_store(postgres_database)
    with pytest.raises(StorageError, match="refused a value") as caught:
        store.save_run(make_run(1, label="nul \0"))
    assert from_json(caught.value.kept.read_text()) == make_run(1, label="nul \0")
    store.close()


def test_a_file_that_is_no_database_is_reported_and_left_alone(tmp_path):
    path = tmp_path / "notes.db"
    path.write_text("these are my notes, not a database\n" * 50)
    with pytest.raises(StorageError, match="not a database") as caught:
        open_store(f"sqlite:///{path}")
    assert "Move the file away" in caught.value.remedy
    assert path.read_text().startswith("these are my notes")


def test_a_damaged_database_is_reported(sqlite_store, tmp_path):
    for seed in range(8):
        sqlite_store.save_run(make_run(seed))
    sqlite_store.close()
    path = tmp_path / "record.db"
    content = bytearray(path.read_bytes())
    content[8192:] = b"\x5a" * (len(content) - 8192)
    path.write_bytes(content)
    with pytest.raises(StorageError, match=r"damaged|not a database"):
        open_store(f"sqlite:///{path}").export_json()


def test_a_folder_in_place_of_the_file_is_reported(tmp_path):
    with pytest.raises(StorageError, match="cannot be opened") as caught:
        open_store(f"sqlite:///{tmp_path}")
    assert "HEADROOM_DB" in caught.value.remedy


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("no url", "not a database URL"),
        ("nosuch://host/db", "not a database URL|no driver"),
        ("sqlite://", "memory"),
        ("sqlite:///:memory:", "memory"),
        ("postgresql://user:secret@127.0.0.1:1/db", "cannot be reached"),
        ("sqlite:////dev/null/record.db", "folder cannot be made"),
    ],
)
def test_a_bad_url_is_refused_with_a_remedy_and_without_the_password(url, problem):
    with pytest.raises(StorageError, match=problem) as caught:
        open_store(url)
    assert caught.value.remedy
    assert "secret" not in str(caught.value)


def test_the_long_and_the_short_spelling_of_postgresql_are_one():
    assert database_url("postgres://u@h/d").render_as_string() == "postgresql://u@h/d"


def test_the_record_needs_neither_torch_nor_streamlit():
    code = (
        "import sys, json, storage; print(json.dumps([m for m in ('torch', 'streamlit', 'scipy') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []

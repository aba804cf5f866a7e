"""On a full disk runs can be deleted, deletion frees the disk, and what could not be recorded is kept."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.measure.results import from_json
from storage import StorageError, open_store
from storage.space import give_up_reserve
from tests.storage.run_examples import make_run

MIB = 2**20


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A folder on a file system of 6 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "none", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, timeout=20, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    if done.returncode:
        pytest.skip(f"a file system of its own cannot be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], timeout=20, check=True)


def _free(folder):
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def _fill(folder):
    """Another program takes all that is left."""
    descriptor = os.open(folder / "other-data", os.O_CREAT | os.O_WRONLY)
    with contextlib.suppress(OSError):
        while True:
            os.write(descriptor, b"x" * 4096)
    os.close(descriptor)


def _record_until_it_fails(store):
    runs = []
    for seed in range(1000):
        run = make_run(seed)
        try:
            store.save_run(run)
        except StorageError as problem:
            return runs, run, problem
        runs.append(run)
    raise AssertionError("the disk never filled")


def test_a_disk_filled_with_runs_is_freed_by_deleting_them_and_takes_the_next_one(small_disk, home):
    store = open_store(f"sqlite:///{small_disk}/record.db")
    runs, lost, problem = _record_until_it_fails(store)
    assert "disk is full" in str(problem)
    assert "delete old runs" in problem.remedy
    assert problem.kept.is_relative_to(home / "unsaved")
    assert from_json(problem.kept.read_text()) == lost
    before = _free(small_disk)
    gone = runs[: len(runs) // 2]
    assert store.delete_runs([run.run_id for run in gone]) == len(gone)
    assert _free(small_disk) > before + MIB
    store.import_json(problem.kept.read_bytes())
    kept = runs[len(gone) :]
    assert store.get_runs([run.run_id for run in (*kept, lost)]) == [*kept, lost]
    with store._reading() as connection:
        assert connection.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"
    store.close()


def test_a_disk_filled_by_others_still_lets_runs_be_deleted(small_disk):
    store = open_store(f"sqlite:///{small_disk}/record.db")
    for seed in range(4):
        store.save_run(make_run(seed))
    _empty_log(store)
    _fill(small_disk)
    assert _free(small_disk) == 0
    assert store.delete_runs([make_run(0).run_id, make_run(1).run_id]) == 2
    store.save_run(make_run(9))
    assert {row.run_id for row in store.list_runs()} == {make_run(seed).run_id for seed in (2, 3, 9)}
    store.close()


def test_where_not_even_a_deletion_fits_the_advice_is_another_and_nothing_is_lost(small_disk):
    store = open_store(f"sqlite:///{small_disk}/record.db")
    store.save_run(make_run(0))
    _empty_log(store)
    give_up_reserve(store._engine)
    _fill(small_disk)
    with pytest.raises(StorageError, match="disk is full") as caught:
        store.delete_runs([make_run(0).run_id])
    assert "move or delete other files" in caught.value.remedy
    assert "History" not in caught.value.remedy
    (small_disk / "other-data").unlink()
    assert store.get_run(make_run(0).run_id) == make_run(0)
    assert store.delete_runs([make_run(0).run_id]) == 1
    store.close()


def _empty_log(store):
    connection = store._engine.raw_connection()
    connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    connection.close()


def test_deleting_gives_the_space_back_on_any_disk_also_in_a_file_of_a_previous_version(tmp_path):
    for number, previous in enumerate((False, True)):
        file = tmp_path / f"record-{number}.db"
        store = open_store(f"sqlite:///{file}")
        for seed in range(12):
            store.save_run(make_run(seed))
        if previous:
            connection = store._engine.raw_connection()
            cursor = connection.cursor()
            for statement in ("PRAGMA auto_vacuum=NONE", "VACUUM"):
                cursor.execute(statement).fetchall()
            assert cursor.execute("PRAGMA auto_vacuum").fetchone() == (0,)
            connection.close()
        _empty_log(store)
        before = file.stat().st_size
        store.delete_runs([make_run(seed).run_id for seed in range(11)])
        assert file.stat().st_size < before / 2
        assert store.get_run(make_run(11).run_id) == make_run(11)
        store.close()


def test_a_run_is_never_kept_in_the_current_folder(tmp_path, monkeypatch):
    """Not even where tempfile finds no other place: on a full disk it would name the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HEADROOM_HOME", "/dev/null/home")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store = open_store(f"sqlite:///{tmp_path}/record.db", lock_timeout_s=0.1)
    other = sqlite3.connect(tmp_path / "record.db")
    other.execute("BEGIN IMMEDIATE")
    files = sorted(tmp_path.rglob("*"))
    with pytest.raises(StorageError, match="locked") as caught:
        store.save_run(make_run(1))
    assert caught.value.kept is None
    assert sorted(tmp_path.rglob("*")) == files
    other.close()
    store.close()

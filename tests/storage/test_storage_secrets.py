"""What is secret in a database's URL is in nothing that is printed, logged, shown, raised or listed by ps."""

from __future__ import annotations

import doctest
import json
import os
import socket
import sys
import threading
import traceback
from pathlib import Path

import psutil
import pytest
import sqlalchemy
from typer.testing import CliRunner

from engine.cli.bench import put_on_record
from engine.measure.results import to_json
from storage import StorageError, masking, open_store
from storage.cli import app
from storage.database import database_url
from storage.masking import masked
from tests.storage.run_examples import make_run

URLS = [
    "postgresql://u:hush-1@127.0.0.1:1/d",
    "postgresql://u@127.0.0.1:1/d?password=hush-1",
    "postgresql://u:hush-1@127.0.0.1:1/d?password=hush-2&sslpassword=hush-3&passfile=/tmp/hush-4",
    "postgresql://127.0.0.1:1/d?user=u&PASSWORD=hush-1",
    "postgresql://u:hush%2D1@127.0.0.1:1/d",
    "postgresql://u@127.0.0.1:1/d?password=hush-1&sslmode=nonsense",
    "postgresql://u@127.0.0.1:1/d?password=hush-1&no_such_option=hush",
    "postgresql://u:hush-1@[broken/d",
    "nosuch://u:hush-1@h/d?password=hush-2",
]


@pytest.mark.parametrize("url", URLS)
def test_no_password_is_in_an_error_in_its_traceback_or_on_the_terminal(url):
    with pytest.raises(StorageError) as caught:
        open_store(url, lock_timeout_s=0.2)
    told = "".join(traceback.format_exception(caught.value)) + repr(caught.value.to_dict())
    assert "hush-" not in _without_source(told)
    done = CliRunner().invoke(app, ["list", "--db", url])
    assert done.exit_code == 2
    assert "hush-" not in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


def _without_source(text):
    """A traceback quotes lines of this test, too."""
    return "\n".join(line for line in text.splitlines() if "test_storage_secrets" not in line)


def test_what_is_no_secret_stays_readable():
    url = "postgresql://u:a@h:5/d?sslmode=require&password=b&sslpassword=c&passfile=d&host=one&host=two"
    shown = masked(database_url(url))
    assert shown.startswith("postgresql://u:***@h:5/d?")
    for part in ("sslmode=require", "password=***", "sslpassword=***", "passfile=***", "host=one&host=two"):
        assert part in shown
    assert doctest.testmod(masking).failed == 0


@pytest.mark.postgres
def test_the_store_names_itself_without_the_password(postgres_database):
    store = open_store(postgres_database + "?password=hush-1")
    assert store.url.endswith("?password=***")
    store.close()


def test_bench_hands_the_url_to_its_child_where_no_other_user_can_read_it(home, monkeypatch, capfd):
    """A server that takes the connection and says nothing holds the child long enough to look at it."""
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"postgresql://u:hush-1@127.0.0.1:{listener.getsockname()[1]}/d?sslpassword=hush-2&connect_timeout=60"
    outcome: list[bool] = []
    recording = threading.Thread(target=lambda: outcome.append(put_on_record(to_json(make_run(1)), url)))
    recording.start()
    try:
        connection, _ = listener.accept()  # the child is connecting: it has read the URL
        found = {}
        for child in psutil.Process().children(recursive=True):
            found[child.pid] = Path(f"/proc/{child.pid}/cmdline").read_bytes().decode()
        assert any("storage" in line for line in found.values())
        assert not any("hush" in line for line in found.values())
        connection.close()
    finally:
        listener.close()
        recording.join(timeout=60)
    assert outcome == [False]
    told = "".join(capfd.readouterr())
    assert "hush" not in told
    kept = home / "unsaved" / f"headroom-run-{make_run(1).run_id}.json"
    assert str(kept) in told
    assert json.loads(kept.read_text()) == json.loads(json.dumps(to_json(make_run(1))))


def test_bench_keeps_a_run_whose_child_dies_without_a_word(home, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert put_on_record(to_json(make_run(1)), f"sqlite:///{tmp_path}/record.db") is False
    kept = home / "unsaved" / f"headroom-run-{make_run(1).run_id}.json"
    assert str(kept) in "".join(capfd.readouterr())
    assert kept.stat().st_mode & 0o777 == 0o600
    assert not list(tmp_path.glob("*.json"))


@pytest.fixture
def encoded_database(postgres_server, request):
    """URL of a database of another encoding."""
    name = f"encoded_{os.urandom(4).hex()}"
    engine = sqlalchemy.create_engine(f"{postgres_server}/postgres", isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name} ENCODING '{request.param}' TEMPLATE template0")
        yield f"{postgres_server}/{name}"
        connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")
    engine.dispose()


@pytest.mark.postgres
@pytest.mark.parametrize("encoded_database", ["SQL_ASCII"], indirect=True)
def test_a_database_in_sql_ascii_keeps_every_character(encoded_database):
    store = open_store(encoded_database)
    run = make_run(1, label="héadroom 漢字 🚀")
    store.save_run(run)
    assert store.get_run(run.run_id) == run
    assert [row.label for row in store.list_runs()] == [run.label]
    store.close()


@pytest.mark.postgres
@pytest.mark.parametrize("encoded_database", ["LATIN1"], indirect=True)
def test_what_an_encoding_cannot_keep_is_told_in_a_sentence_and_the_run_is_kept(encoded_database):
    store = open_store(encoded_database)
    store.save_run(make_run(1, label="héadroom"))
    with pytest.raises(StorageError, match="encoding of the database cannot store a character") as caught:
        store.save_run(make_run(2, label="漢字"))
    assert "UTF8" in caught.value.remedy
    assert caught.value.kept.exists()
    assert [row.label for row in store.list_runs()] == ["héadroom"]
    store.close()

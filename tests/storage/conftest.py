"""Stores to test against: SQLite in a fresh folder, and a PostgreSQL server of our own."""

from __future__ import annotations

import glob
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy

from storage import Store, open_store

ON_BOTH = ["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """A HEADROOM_HOME of its own, so that no test touches the user's record."""
    monkeypatch.setenv("HEADROOM_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HEADROOM_DB", raising=False)
    return tmp_path / "home"


@pytest.fixture(params=ON_BOTH)
def database(request, tmp_path) -> str:
    """URL of an empty database, once SQLite and once PostgreSQL."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/record.db"
    return request.getfixturevalue("postgres_database")


@pytest.fixture
def store(database) -> Iterator[Store]:
    """A store on that database."""
    opened = open_store(database, lock_timeout_s=5.0)
    yield opened
    opened.close()


@pytest.fixture
def sqlite_store(tmp_path) -> Iterator[Store]:
    """A store on SQLite only."""
    opened = open_store(f"sqlite:///{tmp_path}/record.db", lock_timeout_s=0.3)
    yield opened
    opened.close()


@pytest.fixture
def postgres_database(postgres_server) -> Iterator[str]:
    """URL of an empty database on our server."""
    name = f"record_{os.urandom(4).hex()}"
    engine = sqlalchemy.create_engine(f"{postgres_server}/postgres", isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text(f"CREATE DATABASE {name}"))
        yield f"{postgres_server}/{name}"
        connection.execute(sqlalchemy.text(f"DROP DATABASE {name} WITH (FORCE)"))
    engine.dispose()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """URL (without a database) of a PostgreSQL server that lives as long as the tests."""
    initdb, pg_ctl = _program("initdb"), _program("pg_ctl")
    if initdb is None or pg_ctl is None:
        pytest.skip("PostgreSQL's initdb and pg_ctl are not installed")
    become: list[str] = []
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        if shutil.which("runuser") is None:
            pytest.skip("running as root, and runuser is not there to start PostgreSQL as another user")
        become = ["runuser", "-u", "nobody", "--"]
    with tempfile.TemporaryDirectory(prefix="headroom-pg-") as folder:
        if become:
            shutil.chown(folder, "nobody")
        port = _free_port()
        data = f"{folder}/data"
        _run([*become, initdb, "-D", data, "-U", "headroom", "-A", "trust", "--no-sync", "--locale=C", "-E", "UTF8"])
        options = f"-p {port} -c listen_addresses=127.0.0.1 -k {folder} -c fsync=off -c shared_buffers=16MB"
        _run([*become, pg_ctl, "-D", data, "-l", f"{folder}/log", "-w", "-o", options, "start"])
        try:
            yield f"postgresql://headroom@127.0.0.1:{port}"
        finally:
            _run([*become, pg_ctl, "-D", data, "-m", "immediate", "stop"])


def _program(name: str) -> str | None:
    return shutil.which(name) or next(iter(sorted(glob.glob(f"/usr/lib/postgresql/*/bin/{name}"))[-1:]), None)


def _run(command: list[str]) -> None:
    # Output to a file, not a pipe: the server would inherit the pipe and keep it open.
    with tempfile.TemporaryFile() as output:
        done = subprocess.run(command, stdout=output, stderr=output, cwd="/", timeout=60, check=False)
        output.seek(0)
        assert done.returncode == 0, output.read().decode()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]

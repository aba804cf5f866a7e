"""Opening a database: its URL, its connections, and the migrations that bring it to the tables of this version."""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from pathlib import Path
from typing import Any

import alembic.command
import alembic.config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, event, inspect, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from engine.paths import headroom_home, private_dir
from kernels.trust import private_file
from storage.errors import TRANSLATED, StorageError, cause_of, translate
from storage.masking import masked
from storage.space import prepare
from storage.views import create_views, drop_views, views_are_current

logger = logging.getLogger(__name__)

MIGRATIONS = Path(__file__).parent / "migrations"
_ADVISORY_LOCK = 0x4EAD_200A  # any number that no other program on the server is likely to have picked
_URL_REMEDY = "Write it like sqlite:////absolute/path/headroom.db or postgresql://user:password@host/database."


def database_url(url: str | None = None) -> URL:
    """The database to use: ``url``, else the environment variable HEADROOM_DB, else SQLite under HEADROOM_HOME.

    Raises:
        StorageError: if it is not a URL that SQLAlchemy understands, or names a database that only lives in memory.
    """
    given = url or os.environ.get("HEADROOM_DB")
    if not given:
        return URL.create("sqlite", database=str(headroom_home() / "headroom.db"))
    if given.startswith("postgres://"):  # the spelling of many hosting providers; SQLAlchemy knows the long one
        given = given.replace("postgres://", "postgresql://", 1)
    try:
        parsed = make_url(given)
        parsed.get_dialect()
    except (ArgumentError, NoSuchModuleError, ValueError):
        # Not the URL itself: it may hold a password, and what cannot be parsed cannot be masked.
        raise StorageError("this is not a database URL.", field="HEADROOM_DB", remedy=_URL_REMEDY) from None
    if parsed.get_backend_name() == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise StorageError(
            "a database in memory would lose every run.", field="HEADROOM_DB", remedy="Name a file: " + _URL_REMEDY
        )
    return parsed


def make_engine(url: URL, lock_timeout_s: float) -> Engine:
    """A connection pool to ``url``. Writing transactions take the option ``immediate`` (see :func:`writer`).

    Args:
        url: as :func:`database_url` gives it.
        lock_timeout_s: how long a statement waits for another writer before it fails as "locked".

    Raises:
        StorageError: if the driver is not installed or the file's folder cannot be made.
    """
    try:
        if url.get_backend_name() == "sqlite":
            return _sqlite_engine(url, lock_timeout_s)
        arguments: dict[str, Any] = {}
        if url.get_backend_name() == "postgresql":
            # a database in SQL_ASCII names no encoding, and the driver would take it for ASCII
            arguments = {"client_encoding": "utf8"}
            if "options" not in url.query:
                arguments |= {"options": f"-c lock_timeout={int(lock_timeout_s * 1000)}", "connect_timeout": 10}
        return create_engine(url, pool_pre_ping=True, connect_args=arguments)
    except (ImportError, ModuleNotFoundError) as error:
        remedy = f"Install the driver ({error.name}), or use SQLite or PostgreSQL."
        raise StorageError("no driver for this database is installed.", field="HEADROOM_DB", remedy=remedy) from error


def require_file(url: URL) -> None:
    """Raise unless the file of an SQLite database is there; a server is asked later."""
    if url.get_backend_name() == "sqlite" and "uri" not in url.query and not Path(str(url.database)).exists():
        remedy = "Record a run first, or name another database with HEADROOM_DB or --db. No file was made."
        raise StorageError("there is no such database.", field=masked(url), remedy=remedy)


def require_record(engine: Engine) -> None:
    """Raise unless the database holds a record of ours; nothing is made in it."""
    try:
        with engine.connect() as connection:
            if inspect(connection).has_table("alembic_version"):
                return
    except TRANSLATED as error:
        raise translate(error, engine.url) from cause_of(error, engine.url)
    remedy = "Record a run first, or name another database with HEADROOM_DB or --db. Nothing was changed."
    raise StorageError("this database holds no record of runs.", field=masked(engine.url), remedy=remedy)


def writer(engine: Engine) -> Engine:
    """The same pool, for transactions that write.

    SQLite takes its write lock at the beginning of these: a transaction that first reads and then writes would
    otherwise fail at once, without waiting, when another process wrote in between.
    """
    return engine.execution_options(immediate=True)


def reader(engine: Engine) -> Engine:
    """The same pool, for transactions that read: all their queries see one moment, as SQLite's do anyway."""
    if engine.dialect.name == "postgresql":
        return engine.execution_options(isolation_level="REPEATABLE READ")
    return engine


def _sqlite_engine(url: URL, lock_timeout_s: float) -> Engine:
    file = Path(str(url.database))
    folder = file.parent
    try:
        private_dir(folder)
        if "uri" not in url.query and not file.is_dir():
            private_file(file)  # SQLite gives its log and its index the mode of the database
    except PermissionError:
        pass  # a file that may only be read can still be shown; writing to it is refused with its reason
    except OSError as error:
        remedy = "Choose a folder that can be written to, with HEADROOM_HOME or HEADROOM_DB."
        raise StorageError(f"the folder cannot be made ({error}).", field=str(folder), remedy=remedy) from error
    engine = create_engine(url, connect_args={"timeout": lock_timeout_s})

    @event.listens_for(engine, "connect")
    def configure(connection: sqlite3.Connection, _record: object) -> None:
        # Bytes that are no UTF-8 are the matter of the run they stand in, not of everybody who lists runs.
        connection.text_factory = lambda content: content.decode("utf-8", "surrogateescape")
        connection.isolation_level = None  # the driver's own BEGIN would come too late, and not around DDL
        connection.execute("PRAGMA foreign_keys=ON")
        prepare(connection)
        _enter_wal(connection, time.monotonic() + lock_timeout_s)

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        immediate = connection.get_execution_options().get("immediate", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")

    return engine


def _enter_wal(connection: sqlite3.Connection, deadline: float) -> None:
    """Write-ahead logging: readers never wait for a writer. SQLite does not wait for a lock here, so we do."""
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if not str(error.sqlite_errorname).startswith("SQLITE_BUSY") or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def migrate(engine: Engine) -> None:
    """Bring the tables to this version of the code; two processes that start at once take turns.

    Raises:
        StorageError: if the database was written by a newer Headroom, or cannot be used.
    """
    name = masked(engine.url)
    try:
        with engine.connect() as connection:
            if _is_current(connection, name) and views_are_current(connection):
                return
        with writer(engine).begin() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})
            if not _is_current(connection, name):
                drop_views(connection)
                alembic.command.upgrade(alembic_config(connection), "head")
                logger.info("the tables of %s are those of this version now", name)
            if not views_are_current(connection):  # knobs or metrics have come or gone since
                create_views(connection)
    except TRANSLATED as error:
        raise translate(error, engine.url) from cause_of(error, engine.url)


def alembic_config(connection: Connection) -> alembic.config.Config:
    """Alembic's configuration for our migrations on an open connection."""
    config = alembic.config.Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def _is_current(connection: Connection, name: str) -> bool:
    """True if the database is at our newest migration; raises if it is at one that we do not know."""
    scripts = ScriptDirectory(str(MIGRATIONS))
    known = {script.revision for script in scripts.walk_revisions()}
    current = MigrationContext.configure(connection).get_current_heads()
    for revision in current:
        if revision not in known:
            raise StorageError(
                f"the database has schema {revision}, which this version of Headroom does not know: a newer one "
                "wrote it.",
                field=name,
                remedy="Update Headroom, or name another database with HEADROOM_DB. Nothing was changed.",
            )
    return set(current) == set(scripts.get_heads())

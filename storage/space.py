"""Space on a full disk: how a deletion gets the little it needs, and how what it freed goes back to the disk.

With write-ahead logging a DELETE first *adds* pages to the log, and the log empties only into a database file that
may have to grow: on a full disk neither can be done, and no run could be deleted to make room. So

    headroom.db            INCREMENTAL auto-vacuum: free pages at its end can be cut off
    headroom.db-wal        copied into the file every 256 pages, so that it stays small
    headroom.db-reserve    holds nothing but space: given up when the disk is full

A deletion on a full disk gives up the reserve, deletes run by run, cuts off the pages that became free, and only then
empties the log, which then no longer asks the file to grow. The reserve is made again where there is room.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import Engine

from kernels.trust import PRIVATE_FILE

logger = logging.getLogger(__name__)
CHECKPOINT_PAGES = 256
_LARGEST, _SMALLEST = 4 * 2**20, 256 * 2**10
_SLICES = (1024, 64, 8)  # pages cut off at a time: the larger the quicker, the smaller the less log is needed
_AUTO_VACUUM_INCREMENTAL = 2
_PATIENCE_MS = 500


def prepare(connection: sqlite3.Connection) -> None:
    """Settings of a new connection; the first one decides how a new file is vacuumed."""
    if connection.execute("PRAGMA page_count").fetchone()[0] == 0:
        connection.execute("PRAGMA auto_vacuum=INCREMENTAL")
    connection.execute(f"PRAGMA wal_autocheckpoint={CHECKPOINT_PAGES}")


def keep_reserve(engine: Engine) -> None:
    """Allocate the reserve next to the database, an eighth of what is free and at most 4 MiB."""
    path = _reserve(engine)
    if path is None or path.exists():
        return
    size = min(_LARGEST, shutil.disk_usage(path.parent).free // 8)
    if size < _SMALLEST:
        return
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, PRIVATE_FILE)
    except OSError:  # a folder that only holds what is there: then its files do not grow either
        return
    try:
        with os.fdopen(descriptor, "wb") as stream:
            os.fchmod(descriptor, PRIVATE_FILE)
            stream.write(os.urandom(size))  # a hole, or zeros on a disk that compresses, would hold nothing back
    except OSError:
        path.unlink(missing_ok=True)


def give_up_reserve(engine: Engine) -> None:
    """Let the disk have the reserve."""
    path = _reserve(engine)
    if path is not None:
        path.unlink(missing_ok=True)


def reclaim(engine: Engine) -> None:
    """Give the pages that are free in an SQLite file back to the disk, as far as that can be done now.

    Whatever prevents it (no room to begin, another program that reads) does no harm: the pages are used again by the
    next runs.
    """
    if engine.dialect.name != "sqlite":
        return
    try:
        with _connection(engine) as connection:
            if _number(connection, "auto_vacuum") == _AUTO_VACUUM_INCREMENTAL:
                _cut_off(connection)
            elif _number(connection, "freelist_count"):
                _vacuum(connection, Path(str(engine.url.database)))
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    except (sqlite3.Error, OSError) as error:
        logger.warning("the space of deleted runs was not given back to the disk: %s", error)


def _cut_off(connection: Any) -> None:
    for pages in _SLICES:
        with contextlib.suppress(sqlite3.OperationalError):  # no room in the log for so many: fewer may fit
            while (before := _number(connection, "freelist_count")) > 0:
                connection.execute(f"PRAGMA incremental_vacuum({pages})").fetchall()
                connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
                if _number(connection, "freelist_count") >= before:
                    break


def _vacuum(connection: Any, file: Path) -> None:
    """A file of a previous version: made again with INCREMENTAL auto-vacuum, where twice its size is free."""
    if shutil.disk_usage(file.parent).free > 2 * file.stat().st_size:
        connection.execute("PRAGMA auto_vacuum=INCREMENTAL")
        connection.execute("VACUUM")


def _reserve(engine: Engine) -> Path | None:
    """Where the reserve of this database is; None if it has none."""
    if engine.dialect.name != "sqlite" or "uri" in engine.url.query:
        return None
    return Path(f"{engine.url.database}-reserve")


@contextlib.contextmanager
def _connection(engine: Engine) -> Iterator[Any]:
    """A connection outside of a transaction, which does not wait long for those who read."""
    connection = engine.raw_connection()
    cursor = connection.cursor()
    patience = _number(cursor, "busy_timeout")
    try:
        cursor.execute(f"PRAGMA busy_timeout={min(patience, _PATIENCE_MS)}").fetchall()
        yield cursor
    finally:
        cursor.execute(f"PRAGMA busy_timeout={patience}").fetchall()
        connection.close()


def _number(connection: Any, pragma: str) -> int:
    return int(connection.execute(f"PRAGMA {pragma}").fetchone()[0])

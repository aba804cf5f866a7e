"""Errors of the record that reach a user, and the one place where a driver's message becomes one of them."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from sqlalchemy.engine import URL
from sqlalchemy.exc import DataError, DBAPIError, OperationalError, SQLAlchemyError

from engine.errors import HeadroomError
from storage.masking import masked, without_secrets


class StorageError(HeadroomError):
    """The record cannot be read or written; nothing was half written.

    Args:
        kept: the JSON file in which a run was kept that could not be recorded.
        disk_full: whether that is, or may be, the reason.
        Others: as of :class:`engine.errors.HeadroomError`.
    """

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        remedy: str | None = None,
        kept: Path | None = None,
        disk_full: bool = False,
    ) -> None:
        super().__init__(message, field=field, remedy=remedy)
        self.kept = kept
        self.disk_full = disk_full


_FULL = (
    "Free some space: delete old runs on the History page (or with `headroom history delete`), or other files on that "
    "disk. Then record the run again."
)
_LOCKED = "Another program holds a write lock on the database: close it, or wait, and try again."
_CORRUPT = (
    "Move the file away and start again: a new record is begun. `sqlite3 FILE .recover` may rescue what is in the "
    "old one."
)
_CANNOT_OPEN = "Check that the folder exists and may be written to, or name another database with HEADROOM_DB."
_READ_ONLY = "Give this user write permission on the file and its folder, or name another database with HEADROOM_DB."
_UNREACHABLE = "Check that the server runs and that host, port, user and database of HEADROOM_DB are right."
_ENCODING = "Make the database with the encoding UTF8 (createdb -E UTF8 NAME), or leave the character out of the label."
_REFUSED = "This is a value the database cannot hold; the record was left as it was."
# Result codes of SQLite by the start of their name, https://www.sqlite.org/rescode.html
_SQLITE = (
    ("SQLITE_FULL", "the disk is full", _FULL),
    ("SQLITE_IOERR", "the disk cannot be read or written (it may be full)", _FULL),
    ("SQLITE_BUSY", "the database is locked", _LOCKED),
    ("SQLITE_LOCKED", "the database is locked", _LOCKED),
    ("SQLITE_NOTADB", "the file is not a database", _CORRUPT),
    ("SQLITE_CORRUPT", "the database file is damaged", _CORRUPT),
    ("SQLITE_CANTOPEN", "the database file cannot be opened", _CANNOT_OPEN),
    ("SQLITE_READONLY", "the database may not be written to", _READ_ONLY),
    ("SQLITE_PERM", "the database may not be written to", _READ_ONLY),
)
# SQLSTATE classes, https://www.postgresql.org/docs/current/errcodes-appendix.html
_SQLSTATE = (
    ("53100", "the disk of the database server is full", _FULL),
    ("53", "the database server is out of resources", _UNREACHABLE),
    ("55P03", "the database is locked", _LOCKED),
    ("40", "the database is locked", _LOCKED),
    ("XX", "the database is damaged", "Ask whoever runs the database server; its log names the damaged table."),
    ("25006", "the database may not be written to", "Connect with a user that may write."),
    ("42501", "this database user lacks a permission", "Grant it the right to create and change tables."),
    ("22P05", "the encoding of the database cannot store a character", _ENCODING),
    ("22021", "the encoding of the database cannot store a character", _ENCODING),
    ("22", "the database refused a value", _REFUSED),
    ("08", "the database server cannot be reached", _UNREACHABLE),
    ("28", "the database server refused the login", _UNREACHABLE),
    ("3D000", "the database does not exist", "Create it first (createdb NAME), or name another one in HEADROOM_DB."),
)


def translate(error: Exception, database: URL) -> StorageError:
    """A driver's or SQLAlchemy's error as a :class:`StorageError` with a remedy.

    Args:
        error: as raised.
        database: its URL, which becomes the error's ``field``; what is secret in it is in no part of the error.
    """
    if isinstance(error, StorageError):
        return error
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    what, remedy = _explain(error, cause)
    details = without_secrets(" ".join(str(cause).split()), database)
    full = remedy == _FULL
    return StorageError(f"{what} ({details}).", field=masked(database), remedy=remedy, disk_full=full)


def cause_of(error: Exception, database: URL) -> Exception | None:
    """The error to name as the cause of a translated one: none if its text holds a secret of the URL."""
    text = f"{error} {getattr(error, 'orig', '')}"
    return error if without_secrets(text, database) == text else None


def _explain(error: Exception, cause: BaseException) -> tuple[str, str]:
    """(what is wrong, what to do about it)."""
    if isinstance(cause, sqlite3.Error):
        name = getattr(cause, "sqlite_errorname", "")
        for start, what, remedy in _SQLITE:
            if name.startswith(start):
                return what, remedy
    state = getattr(cause, "sqlstate", None)
    for start, what, remedy in _SQLSTATE:
        if state and state.startswith(start):
            return what, remedy
    if isinstance(error, DataError) or isinstance(cause, (UnicodeError, OverflowError)):
        return "the database refused a value", _REFUSED
    if isinstance(error, OperationalError) and state is None and not isinstance(cause, sqlite3.Error):
        return "the database server cannot be reached", _UNREACHABLE  # a connection that never was has no SQLSTATE
    return "the database refused the operation", "Check that HEADROOM_DB names a database made by Headroom."


TRANSLATED = (SQLAlchemyError, sqlite3.Error, UnicodeError, OverflowError)
"""What :func:`translate` is for; anything else that escapes is a bug."""

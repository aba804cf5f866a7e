"""The record of runs: one object, safe to share between threads; every method is one transaction."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from sqlalchemy import Connection, Engine, delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from engine.measure.results import RunResult
from engine.measure.unsaved import kept_message
from storage import exports, queries, space
from storage.database import database_url, make_engine, migrate, reader, require_file, require_record, writer
from storage.documents import ended, parse_documents
from storage.errors import TRANSLATED, StorageError, cause_of, translate
from storage.masking import masked
from storage.owner import Owner, this_process
from storage.queries import ComparisonRow, Facets, RunFilter, RunRow
from storage.records import RUNS, UnshowableRun, read_runs, run_values, write_details
from storage.spool import keep

EVERY_RUN = RunFilter()


@dataclasses.dataclass(frozen=True, slots=True)
class ImportReport:
    """Run ids that an import added, and those that were there already and stayed as they were."""

    imported: list[str]
    skipped: list[str]


def open_store(url: str | None = None, *, lock_timeout_s: float = 15.0, create: bool = True) -> Store:
    """Open (and make, and migrate) the record.

    Args:
        url: SQLAlchemy URL; None: the environment variable HEADROOM_DB, else SQLite under HEADROOM_HOME.
        lock_timeout_s: how long to wait for another writer before giving up with "the database is locked".
        create: False: a database that is not there, or holds no record, is an error, and nothing is made.

    Raises:
        StorageError: bad URL, no driver, unreachable server, unreadable or damaged file, schema of a newer version.
    """
    place = database_url(url)
    if not create:
        require_file(place)
    engine = make_engine(place, lock_timeout_s)
    try:
        if not create:
            require_record(engine)
        migrate(engine)
    except StorageError:
        engine.dispose()
        raise
    space.keep_reserve(engine)
    return Store(engine)


class Store:
    """See :func:`open_store`. Every method raises StorageError, with nothing half written."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._reader, self._writer = reader(engine), writer(engine)
        self.url = masked(engine.url)

    def close(self) -> None:
        """Close the connections."""
        self._engine.dispose()

    # -- writing -----------------------------------------------------------------------------------

    def begin_run(self, result: RunResult) -> None:
        """Announce a run: status "running", owned by this process until :meth:`save_run` or :meth:`fail_run`.

        Raises:
            StorageError: also if a run of this id is already on record.
        """
        announced = dataclasses.replace(result, status="running")
        with self._writing() as connection:
            if _status(connection, result.run_id) is not None:
                remedy = "Give the new run an id of its own."
                raise StorageError(f"run {result.run_id} is already on record.", field="run_id", remedy=remedy)
            connection.execute(insert(RUNS).values(run_values(announced, this_process())))
            write_details(connection, announced)

    def save_run(self, result: RunResult) -> None:
        """Write the complete record of a run, replacing what was known of it, all or nothing.

        If that fails the run is kept as a JSON file, which the error's remedy names.

        Raises:
            StorageError: disk full, database locked, damaged …
        """
        try:
            with self._writing() as connection:
                _upsert(connection, result)
        except StorageError as error:
            path = keep(result)
            if path is None:
                raise
            raise StorageError(
                error.message,
                field=error.field,
                remedy=f"{error.remedy} {kept_message(path)}",
                kept=path,
                disk_full=error.disk_full,
            ) from error

    def fail_run(self, run_id: str, error: str) -> bool:
        """Mark a running run as failed. False if it has ended already (its record then stays as it is).

        Raises:
            StorageError: also if there is no such run.
        """
        with self._writing() as connection:
            status = _status(connection, run_id)
            if status is None:
                raise _no_such_run(run_id)
            if status == "running":
                _mark_failed(connection, run_id, error)
            return status == "running"

    def mark_orphans(self, reason: str = "The dashboard that ran it ended before the run did.") -> list[str]:
        """Mark running runs whose owner is dead as failed; those of living owners and other hosts are left alone.

        Returns:
            The ids of the runs so marked.
        """
        with self._writing() as connection:
            running = connection.execute(select(RUNS).where(RUNS.c.status == "running")).all()
            owners = {row.run_id: queries.owner_of(row) for row in running}
            orphans = [run_id for run_id, owner in owners.items() if owner is None or owner.is_alive() is False]
            for run_id in orphans:
                _mark_failed(connection, run_id, reason)
        return orphans

    def set_label(self, run_id: str, label: str) -> None:
        """Give a run another label.

        Raises:
            StorageError: also if there is no such run.
        """
        with self._writing() as connection:
            done = connection.execute(update(RUNS).where(RUNS.c.run_id == run_id).values(label=label))
            if done.rowcount == 0:
                raise _no_such_run(run_id)

    def delete_runs(self, run_ids: Iterable[str]) -> int:
        """Delete runs with everything recorded of them, whatever stands in their rows; returns how many there were.

        On a full disk it uses the space held back for that (see :mod:`storage.space`), run by run.

        Raises:
            StorageError: also if the disk is so full that not even a deletion can be written.
        """
        wanted = sorted(set(run_ids))
        try:
            deleted = self._delete(wanted)
        except StorageError as error:
            if not error.disk_full or self._engine.dialect.name != "sqlite":
                raise
            deleted = self._delete_on_full_disk(wanted)
        space.reclaim(self._engine)
        space.keep_reserve(self._engine)
        return deleted

    def _delete(self, run_ids: Sequence[str]) -> int:
        with self._writing() as connection:
            statements = (delete(RUNS).where(RUNS.c.run_id == run_id) for run_id in run_ids)
            return sum(connection.execute(statement).rowcount for statement in statements)

    def _delete_on_full_disk(self, run_ids: Sequence[str]) -> int:
        """One at a time: each gives back what the next one needs."""
        space.give_up_reserve(self._engine)
        deleted = 0
        for run_id in run_ids:
            space.reclaim(self._engine)
            try:
                deleted += self._delete([run_id])
            except StorageError as error:
                message = f"{error.message} {deleted} of {len(run_ids)} runs were deleted."
                remedy = (
                    "Deleting a run needs a little space, too, and there is none: move or delete other files on that "
                    "disk (a few MiB are enough), then delete runs."
                )
                raise StorageError(message, field=error.field, remedy=remedy, disk_full=True) from error
        return deleted

    # -- reading -----------------------------------------------------------------------------------

    def list_runs(
        self,
        where: RunFilter = EVERY_RUN,
        *,
        order_by: str = "started_unix_s",
        descending: bool = True,
        limit: int | None = None,
        offset: int = 0,
    ) -> list[RunRow]:
        """Runs without their requests, samples and events.

        Args:
            where: which runs.
            order_by: a column of the table ``runs``, else the name of a metric; runs without it come last.
        """
        with self._reading() as connection:
            return queries.select_rows(connection, where, order_by, descending, limit, offset)

    def outline(self) -> dict[str, tuple[str, str]]:
        """``{run_id: (status, label)}`` of all runs: quick, to notice that something has changed."""
        columns = (RUNS.c.run_id, RUNS.c.status, RUNS.c.label)
        with self._reading() as connection:
            return {row.run_id: (row.status, row.label) for row in connection.execute(select(*columns))}

    def get_run(self, run_id: str) -> RunResult:
        """The complete record of a run.

        Raises:
            StorageError: also if there is no such run.
        """
        return self.get_runs([run_id])[0]

    def get_runs(self, run_ids: Sequence[str]) -> list[RunResult]:
        """The complete records of several runs, in the order asked for.

        Raises:
            StorageError: also if one of them is not on record, or cannot be shown.
        """
        results = self.read_runs(run_ids)
        for result in results:
            if isinstance(result, UnshowableRun):
                message = f"run {result.run_id} cannot be shown: {result.reason}."
                raise StorageError(message, field="run_id", remedy="Delete it on the History page.")
        return [result for result in results if isinstance(result, RunResult)]

    def read_runs(self, run_ids: Sequence[str]) -> list[RunResult | UnshowableRun]:
        """As :meth:`get_runs`, with a note in place of each run whose columns hold what no run can have."""
        with self._reading() as connection:
            results = read_runs(connection, run_ids)
        found = {result.run_id for result in results}
        for run_id in run_ids:
            if run_id not in found:
                raise _no_such_run(run_id)
        return results

    def list_comparisons(self) -> list[ComparisonRow]:
        """All comparisons, the newest first."""
        with self._reading() as connection:
            return queries.select_comparisons(connection)

    def facets(self) -> Facets:
        """Models, kinds, statuses and workloads that occur."""
        with self._reading() as connection:
            return queries.select_facets(connection)

    # -- export and import ---------------------------------------------------------------------------

    def export_csv(self, run_ids: Sequence[str] | None = None, *, byte_order_mark: bool = False) -> str:
        """One line a run: identity, provenance, every knob and every metric in columns. None: all runs.

        Args:
            byte_order_mark: begin with U+FEFF, by which Excel knows UTF-8.
        """
        mark = exports.BYTE_ORDER_MARK if byte_order_mark else ""
        return mark + exports.runs_csv(self._runs_for_export(run_ids))

    def export_requests_csv(self, run_ids: Sequence[str] | None = None, *, byte_order_mark: bool = False) -> str:
        """One line a request of these runs (None: all runs). See :meth:`export_csv`."""
        mark = exports.BYTE_ORDER_MARK if byte_order_mark else ""
        return mark + exports.requests_csv(self._runs_for_export(run_ids))

    def export_json(self, run_ids: Sequence[str] | None = None) -> str:
        """The complete documents, a JSON list which :meth:`import_json` takes. None: all runs."""
        return exports.documents_json(self._runs_for_export(run_ids))

    def import_json(self, text: str | bytes, source: str = "import") -> ImportReport:
        """Add runs from JSON: one document, a list of them, or a comparison's ``{"runs": [...]}``; all or none.

        A run whose id is already on record is skipped, so importing twice changes nothing; only the announcement
        of a run that was left running is replaced by its record. One that could not be read where it was exported is
        skipped, too.

        Args:
            source: name of the file, for errors.

        Raises:
            StorageError: also if it is not such JSON; names the file, the run and the field.
        """
        documents = parse_documents(text, source)
        report = ImportReport([], documents.passed_over)
        with self._writing() as connection:
            for result in map(ended, documents.runs):
                if _status(connection, result.run_id) in (None, "running"):
                    _upsert(connection, result)
                    report.imported.append(result.run_id)
                else:
                    report.skipped.append(result.run_id)
        return report

    def _runs_for_export(self, run_ids: Sequence[str] | None) -> list[RunResult | UnshowableRun]:
        return self.read_runs([row.run_id for row in self.list_runs()] if run_ids is None else run_ids)

    # -- transactions ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _writing(self) -> Iterator[Connection]:
        try:
            with self._writer.begin() as connection:
                yield connection
        except TRANSLATED as error:
            raise translate(error, self._engine.url) from cause_of(error, self._engine.url)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[Connection]:
        try:
            with self._reader.begin() as connection:
                yield connection
        except TRANSLATED as error:
            raise translate(error, self._engine.url) from cause_of(error, self._engine.url)


def _status(connection: Connection, run_id: str) -> str | None:
    return connection.scalar(select(RUNS.c.status).where(RUNS.c.run_id == run_id))


def _upsert(connection: Connection, result: RunResult) -> None:
    """Update or insert; where another process inserts between the two (PostgreSQL), update after all."""
    owner: Owner | None = this_process() if result.status == "running" else None
    values = run_values(result, owner)
    change = update(RUNS).where(RUNS.c.run_id == result.run_id).values(values)
    if connection.execute(change).rowcount == 0:
        # SQLite needs no savepoint: it has held the only write lock since the transaction began
        savepoint = contextlib.nullcontext() if connection.dialect.name == "sqlite" else connection.begin_nested()
        try:
            with savepoint:
                connection.execute(insert(RUNS).values(values))
        except IntegrityError:
            if connection.execute(change).rowcount == 0:
                raise
    write_details(connection, result)


def _mark_failed(connection: Connection, run_id: str, error: str) -> None:
    ownerless = {"owner_host": None, "owner_pid": None, "owner_started_unix_s": None}
    change = update(RUNS).where(RUNS.c.run_id == run_id).values(status="failed", error=error, **ownerless)
    connection.execute(change)


def _no_such_run(run_id: str) -> StorageError:
    return StorageError(f"there is no run {run_id!r}.", field="run_id", remedy="It may have been deleted meanwhile.")

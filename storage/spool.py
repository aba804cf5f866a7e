"""Where a run goes that the database would not take."""

from __future__ import annotations

from pathlib import Path

from engine.measure.results import RunResult, to_json
from engine.measure.unsaved import keep_document


def keep(result: RunResult) -> Path | None:
    """Write the run as a JSON file, see :func:`engine.measure.unsaved.keep_document`."""
    return keep_document(to_json(result))

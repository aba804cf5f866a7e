"""What of the suite takes longest, as a table that is written at the end of each run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

ROWS = 40


class Timed(Protocol):
    """A test's set-up, call or teardown, as pytest reports it."""

    nodeid: str
    when: str
    duration: float  # seconds


def table(reports: Iterable[Timed], rows: int = ROWS) -> str:
    """The slowest tests, set-up and teardown included, and the sum of all, as Markdown."""
    seconds: dict[str, float] = {}
    for report in reports:
        seconds[report.nodeid] = seconds.get(report.nodeid, 0.0) + report.duration
    slowest = sorted(seconds.items(), key=lambda found: -found[1])[:rows]
    lines = [f"{len(seconds)} tests, {sum(seconds.values()):.0f} s in all.", "", "| seconds | test |", "|--:|---|"]
    return "\n".join(lines + [f"| {spent:.2f} | `{name}` |" for name, spent in slowest]) + "\n"


def write(reports: Iterable[Timed], path: Path) -> None:
    """Write the table, unless only a few tests were run: it is that of the suite."""
    found = list(reports)
    if len({report.nodeid for report in found}) > ROWS:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(table(found), encoding="utf-8")

"""The benchmark page of the site: ``python -m tests.benchmarks.report_docs`` fills it from the saved results.

Between its marks stand the tables of the newest run and the list of all runs; the text around them is written by hand.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.benchmarks.report import BEGIN, END, markdown, with_text_between
from tests.benchmarks.settings import OURS, assignments

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "tests" / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
RUNS_BEGIN, RUNS_END = "<!-- runs:begin -->", "<!-- runs:end -->"


def documents() -> dict[str, dict[str, Any]]:
    """The saved results by file name, oldest first."""
    paths = RESULTS.glob("*.json")
    found = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    return dict(sorted(found.items(), key=lambda item: item[1]["date"]))


def updated(page: str) -> str:
    """The page with the tables of what is saved now."""
    saved = documents()
    page = with_text_between(page, RUNS_BEGIN, RUNS_END, _runs(saved))
    full = [document for document in saved.values() if len(document.get("workloads", ())) > 1]
    return with_text_between(page, BEGIN, END, without_empty_columns(markdown(with_knobs_as_settings(full[-1]))))


def without_empty_columns(text: str) -> str:
    """The text, its tables without the columns in which nothing was measured."""
    parts = [_full_columns(part) if part.startswith("|") else part for part in text.split("\n\n")]
    return "\n\n".join(parts)


def _full_columns(table: str) -> str:
    rows = [line.strip("|").split("|") for line in table.splitlines()]
    kept = [i for i in range(len(rows[0])) if any(row[i].strip() not in ("", "not measured") for row in rows[2:])]
    return "\n".join(f"|{'|'.join(row[i] for i in kept)}|" for row in rows)


def with_knobs_as_settings(document: dict[str, Any]) -> dict[str, Any]:
    """The document with our settings named by every knob that was given; early runs named them by weights and dtype."""
    names = {}
    for engine, about in document["engines"].items():
        if engine.startswith(f"{OURS} "):
            given = {knob: value for knob, value in about["options"].items() if value != "auto"}
            weights_first = dict(sorted(given.items(), key=lambda item: "weights" not in item[0]))
            names[engine.removeprefix(f"{OURS} ")] = assignments(weights_first)
    rows = [_renamed(row, names, "setting") if row["engine"] == OURS else row for row in document["rows"]]
    bars = [
        _renamed(_renamed(bar, names, "ours_setting"), _of_ours(names), "theirs_setting") for bar in document["bars"]
    ]
    return {**document, "rows": rows, "bars": bars}


def _of_ours(names: dict[str, str]) -> dict[str, str]:
    return {f"{OURS} {old}": f"{OURS} {new}" for old, new in names.items()}


def _renamed(record: dict[str, Any], names: dict[str, str], field: str) -> dict[str, Any]:
    return {**record, field: names.get(record[field], record[field])}


def _runs(saved: dict[str, dict[str, Any]]) -> str:
    lines = ["| date | machine | engines | repeats | code | all figures |", "|---|---|---|---:|---|---|"]
    for name, document in reversed(saved.items()):
        machine = document["hardware"]
        gpus = "".join(f", {gpu['name']}" for gpu in machine.get("gpus", ()))
        where = f"{machine['cpu']}, {machine['cores_usable']} cores ({machine['cpu_capability']}){gpus}"
        changed = " and changes" if document["code_dirty"] else ""
        lines.append(
            f"| {document['date'][:10]} | {where} | {', '.join(_engines(document))} | {document['repeats']} | "
            f"`{document['code_revision'][:10]}`{changed} | `tests/benchmarks/results/{name}` |"
        )
    return "\n".join(lines)


def _engines(document: dict[str, Any]) -> list[str]:
    named = [cell["engine"] for cell in document.get("cells", ())]
    named += [engine.split()[0] for engine in document.get("engines", ())]
    return sorted(dict.fromkeys(named), key=lambda engine: (engine != OURS, engine))


def main() -> None:
    """Write the page."""
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"written: {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()

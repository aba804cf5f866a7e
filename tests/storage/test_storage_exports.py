"""CSV that a spreadsheet shows and never runs."""

from __future__ import annotations

import csv
import io
import json

import pytest
from typer.testing import CliRunner

from storage import open_store
from storage.cli import app
from tests.storage.run_examples import make_run

DISTURBED = [{"time_unix_s": 1_790_000_010.0, "what": "=weights changed, forced"}]
FORMULAS = [
    "=1+1",
    "+1",
    "-1",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "\n=1",
    "  =1+1",
    '"=1+1',
    "' =cmd|' /C calc'!A0",
    "\u00a0=1",
    "\uff1d1",
    "\ttext",
]


def _lines(text):
    return list(csv.DictReader(io.StringIO(text, newline="")))


@pytest.mark.parametrize("text", FORMULAS)
def test_a_text_that_a_spreadsheet_would_run_is_shown_instead_in_every_column_of_both_forms(sqlite_store, text):
    run = make_run(1, label=text, error=text)
    run.provenance.config["=odd"] = text
    run.provenance.versions["torch"] = text
    run.requests[0] = type(run.requests[0])(**{**_fields(run.requests[0]), "error": text})
    sqlite_store.save_run(run)
    [line] = _lines(sqlite_store.export_csv())
    for column in ("label", "error", "versions.torch", "config.=odd"):
        assert line[column] == f"'{text}", column
    first = _lines(sqlite_store.export_requests_csv())[0]
    assert (first["label"], first["error"]) == (f"'{text}", f"'{text}")


def _fields(record):
    return {name: getattr(record, name) for name in record.__dataclass_fields__}


def test_negative_numbers_stay_numbers_and_harmless_texts_stay_as_they_are(sqlite_store):
    run = make_run(1, label="a = b - c", error="x@y")
    run.metrics["ttft_ms_mean"] = -1.5
    run.provenance.config["odd"] = -7
    sqlite_store.save_run(run)
    [line] = _lines(sqlite_store.export_csv())
    assert (line["metric.ttft_ms_mean"], line["config.odd"]) == ("-1.5", "-7")
    assert (line["label"], line["error"]) == ("a = b - c", "x@y")


def test_gaps_are_rounded_to_microseconds_and_no_cell_exceeds_what_excel_holds(sqlite_store):
    run = make_run(1, error="e" * 40_000)
    gaps = [12.3456789 + number for number in range(9_000)]
    run.requests[0] = type(run.requests[0])(**{**_fields(run.requests[0]), "itl_ms": gaps})
    sqlite_store.save_run(run)
    text = sqlite_store.export_requests_csv()
    first, second = _lines(text)[:2]
    cells = [first["itl_ms"], first["itl_ms.2"], first["itl_ms.3"]]
    assert [float(gap) for cell in cells for gap in cell.split()] == [round(gap, 3) for gap in gaps]
    assert second["itl_ms.2"] == ""
    [line] = _lines(sqlite_store.export_csv())
    assert "cut: 40,000 characters in all" in line["error"]
    for found in (first, line):
        assert max(len(cell) for cell in found.values()) <= 32_767


def test_disturbed_runs_and_the_reference_of_quality_are_told_in_every_export(store):
    reference = "weights as stored, Q4_1 (GGUF)"
    run = make_run(1, disturbed=DISTURBED, quality_reference=reference)
    store.save_run(run)
    store.save_run(make_run(2))
    lines = {line["run_id"]: line for line in _lines(store.export_csv())}
    assert lines[run.run_id]["disturbed"].endswith("=weights changed, forced")
    assert lines[run.run_id]["quality_reference"] == reference
    assert lines[make_run(2).run_id]["disturbed"] == ""
    flags = {line["run_id"]: line["disturbed"] for line in _lines(store.export_requests_csv())}
    assert flags == {run.run_id: "true", make_run(2).run_id: "false"}
    document = next(item for item in json.loads(store.export_json()) if item["run_id"] == run.run_id)
    assert (document["disturbed"], document["quality_reference"]) == (DISTURBED, reference)
    store.delete_runs([run.run_id])
    store.import_json(json.dumps(document))
    assert store.get_run(run.run_id) == run


def test_a_byte_order_mark_is_written_where_it_is_asked_for_and_only_in_csv(sqlite_store, tmp_path):
    sqlite_store.save_run(make_run(1, label="héadroom"))
    database = f"sqlite:///{tmp_path}/record.db"
    for name in ("csv", "requests-csv"):
        plain = _export("--format", name, "--db", database)
        marked = _export("--format", name, "--db", database, "--bom")
        assert marked.stdout_bytes == b"\xef\xbb\xbf" + plain.stdout_bytes
        assert "héadroom" in plain.stdout_bytes.decode()
    assert _export("--format", "json", "--db", database, "--bom").exit_code == 2


def _export(*arguments):
    return CliRunner().invoke(app, ["export", *arguments])


@pytest.mark.parametrize("command", [["list"], ["list", "--json"], ["export", "--format=csv"], ["delete", "--run=x"]])
def test_a_database_that_is_not_there_is_an_error_and_is_not_made(tmp_path, command, home):
    for database in (f"sqlite:///{tmp_path}/none/record.db", None):
        done = CliRunner().invoke(app, [*command, *(["--db", database] if database else [])])
        assert done.exit_code == 2
        assert "no such database" in done.stderr
        assert done.stdout == ""
    assert not (tmp_path / "none").exists()
    assert not home.exists()


def test_a_database_of_another_program_is_left_alone(database, tmp_path):
    if database.startswith("sqlite"):
        (tmp_path / "record.db").touch()
    done = CliRunner().invoke(app, ["list", "--db", database])
    assert done.exit_code == 2
    assert "holds no record" in done.stderr
    open_store(database).close()
    assert CliRunner().invoke(app, ["list", "--db", database]).exit_code == 0


def test_the_list_has_a_line_a_run_whatever_the_label_holds(sqlite_store, tmp_path):
    labels = [
        "two\nlines",
        "\x1b[31mred\x1b[0m",
        "tab\there\rback",
        "\u2028\u202eright",
        "bell\a\x9b31m",
        "漢字",
    ]
    for seed, label in enumerate(labels):
        sqlite_store.save_run(make_run(seed, label=label))
    done = CliRunner().invoke(app, ["list", "--db", f"sqlite:///{tmp_path}/record.db"])
    lines = done.stdout.split("\n")[:-1]
    assert len(lines) == len(labels)
    assert all(sign.isprintable() for line in lines for sign in line)
    assert "two\\nlines" in done.stdout
    assert "\\x1b[31mred" in done.stdout
    assert "漢字" in done.stdout

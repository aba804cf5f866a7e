"""Export and import, in the library and on the command line."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from engine.measure.results import to_json
from storage import StorageError, open_store
from storage.cli import app
from tests.storage.run_examples import failed_run, make_run, with_gpu_samples


def test_json_export_imports_into_an_empty_record_unchanged_and_twice_does_nothing(store, tmp_path):
    runs = [make_run(1), failed_run(2), make_run(3, label="héadroom 漢字")]
    for run in runs:
        store.save_run(run)
    text = store.export_json()
    other = open_store(f"sqlite:///{tmp_path}/other.db")
    assert sorted(other.import_json(text).imported) == sorted(run.run_id for run in runs)
    assert other.get_runs([run.run_id for run in runs]) == runs
    other.set_label(runs[0].run_id, "relabelled here")
    again = other.import_json(text)
    assert (again.imported, len(again.skipped)) == ([], 3)
    assert other.get_run(runs[0].run_id).label == "relabelled here"
    other.close()


def test_the_record_of_a_run_replaces_its_announcement_on_import(store):
    store.begin_run(make_run(1))
    assert store.import_json(json.dumps(to_json(make_run(1)))).imported == [make_run(1).run_id]
    assert store.get_run(make_run(1).run_id) == make_run(1)


def test_a_run_exported_while_running_is_imported_as_failed(store):
    store.import_json(json.dumps(to_json(make_run(1, status="running"))))
    found = store.get_run(make_run(1).run_id)
    assert found.status == "failed"
    assert "not ended" in found.error


def test_run_csv_has_a_line_a_run_with_metrics_knobs_and_provenance(store):
    runs = [make_run(1, label='a "quoted", label'), make_run(2, changes={"weights": "int4"}), failed_run(3)]
    for run in runs:
        store.save_run(run)
    lines = list(csv.DictReader(io.StringIO(store.export_csv([run.run_id for run in runs]))))
    assert [line["run_id"] for line in lines] == [run.run_id for run in runs]
    assert float(lines[0]["metric.output_tokens_s"]) == runs[0].metrics["output_tokens_s"]
    assert lines[0]["label"] == 'a "quoted", label'
    assert lines[1]["config.weights"] == "int4"
    assert lines[1]["path.weights"] == "int4"
    assert lines[0]["hardware.cores"] == "2"
    assert lines[0]["config.chunked_prefill"] == "true"
    assert lines[2]["metric.output_tokens_s"] == ""
    assert lines[2]["error"].startswith("The engine worker exited")


def test_energy_is_exported_and_a_document_from_before_it_is_imported(store):
    run = with_gpu_samples(make_run(1))
    store.save_run(run)
    (line,) = csv.DictReader(io.StringIO(store.export_csv([run.run_id])))
    assert float(line["metric.energy_per_output_token_j"]) == run.metrics["energy_per_output_token_j"]
    assert float(line["metric.idle_power_w"]) == 70.0
    assert json.loads(store.export_json([run.run_id]))[0]["samples"][1]["gpu_power_w"] == 301.0
    old = to_json(make_run(2))
    for sample in old["samples"]:
        for name in [name for name in sample if name.startswith("gpu")]:
            del sample[name]
    store.import_json(json.dumps(old))
    assert store.get_run(make_run(2).run_id) == make_run(2)


def test_request_csv_has_a_line_a_request(store):
    run = make_run(1)
    store.save_run(run)
    lines = list(csv.DictReader(io.StringIO(store.export_requests_csv())))
    assert len(lines) == len(run.requests)
    assert [float(gap) for gap in lines[0]["itl_ms"].split()] == [round(gap, 3) for gap in run.requests[0].itl_ms]
    assert float(lines[0]["ttft_ms"]) == run.requests[0].ttft_ms


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda run: run.pop("run_id"), "run_id"),
        (lambda run: run.update(extra=1), "extra"),
        (lambda run: run.update(status="finished"), r"runs\[1\].status"),
        (lambda run: run.update(duration_s="long"), r"runs\[1\].duration_s"),
        (lambda run: run.update(run_id=""), r"runs\[1\].run_id"),
        (lambda run: run["provenance"].update(seed=1.5), r"runs\[1\].provenance.seed"),
        (lambda run: run["provenance"].update(config=[]), r"runs\[1\].provenance.config"),
        (lambda run: run["requests"][2].update(itl_ms=[1, "x"]), r"runs\[1\].requests\[2\].itl_ms\[1\]"),
        (lambda run: run["samples"][0].update(running=None), r"runs\[1\].samples\[0\].running"),
        (lambda run: run["metrics"].update(ttft_ms_p50=True), r"runs\[1\].metrics.ttft_ms_p50"),
        (lambda run: run.update(requests=7), r"runs\[1\]"),
        (lambda run: run.update(provenance=7), r"runs\[1\]"),
    ],
)
def test_a_broken_document_is_refused_by_field_and_nothing_of_the_file_is_imported(sqlite_store, spoil, named):
    broken = json.loads(json.dumps(to_json(make_run(2))))
    spoil(broken)
    with pytest.raises(StorageError, match=named) as caught:
        sqlite_store.import_json(json.dumps([to_json(make_run(1)), broken]))
    assert "Import a file" in caught.value.remedy
    assert sqlite_store.list_runs() == []


@pytest.mark.parametrize(
    "text", ["", "{", "7", "[[]]", '"run"', b"\xff\xfe", "[" * 100_000], ids=lambda text: repr(text[:8])
)
def test_what_is_no_run_is_refused(sqlite_store, text):
    with pytest.raises(StorageError):
        sqlite_store.import_json(text)


def test_the_command_line_records_lists_and_exports(tmp_path):
    database = f"sqlite:///{tmp_path}/record.db"
    runs = [make_run(1), make_run(2)]
    recorded = _storage("record", "--db", database, stdin=json.dumps([to_json(run) for run in runs]))
    assert json.loads(recorded.stdout) == {"imported": [run.run_id for run in runs], "skipped": []}
    single = _storage("record", "--db", database, stdin=json.dumps(to_json(runs[0])))
    assert json.loads(single.stdout)["skipped"] == [runs[0].run_id]
    listed = json.loads(_storage("list", "--json", "--db", database).stdout)
    assert [row["run_id"] for row in listed] == [runs[1].run_id, runs[0].run_id]
    assert runs[0].run_id in _storage("list", "--db", database).stdout
    exported = _storage("export", "--format", "json", "--run", runs[1].run_id, "--db", database).stdout
    assert json.loads(exported) == [json.loads(json.dumps(to_json(runs[1])))]
    lines = _storage("export", "--format", "csv", "--db", database).stdout.splitlines()
    assert len(lines) == 3


def test_the_command_line_keeps_a_run_that_it_cannot_record(tmp_path, home):
    folder = tmp_path / "a folder"
    folder.mkdir()
    failed = _storage("record", "--db", f"sqlite:///{folder}", stdin=json.dumps(to_json(make_run(1))), code=2)
    assert "cannot be opened" in failed.stderr
    kept = home / "unsaved" / f"headroom-run-{make_run(1).run_id}.json"
    assert str(kept) in failed.stderr
    assert json.loads(kept.read_text()) == json.loads(json.dumps(to_json(make_run(1))))


def test_the_command_line_answers_bad_input_with_one_line_and_code_2(tmp_path):
    failed = _storage("record", "--db", f"sqlite:///{tmp_path}/record.db", stdin="not json", code=2)
    assert failed.stderr.startswith("error: import: this is not JSON")
    assert failed.stdout == ""
    assert "Traceback" not in failed.stderr


def test_the_module_runs_as_a_program_and_keeps_standard_output_for_the_document(tmp_path):
    database = f"sqlite:///{tmp_path}/record.db"
    open_store(database).close()
    command = [sys.executable, "-m", "storage", "list", "--json", "--db", database]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout) == []


def _storage(*arguments, stdin="", code=0):
    done = CliRunner().invoke(app, arguments, input=stdin)
    assert done.exit_code == code, done.output
    return done

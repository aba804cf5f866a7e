"""What comes from outside as JSON: a file that no run can be is refused by file, run and field, and changes nothing."""

from __future__ import annotations

import json

import pytest

from engine.measure.results import to_json
from storage import StorageError
from storage import documents as documents_module
from tests.storage.run_examples import make_run

HOSTILE = {
    "a start in the year 10^300": (lambda run: run.update(started_unix_s=1e308), "started_unix_s"),
    "a start before 1970": (lambda run: run.update(started_unix_s=-1.0), "started_unix_s"),
    "a start that overflows a double": (lambda run: run.update(started_unix_s="BIG"), "started_unix_s"),
    "a duration without end": (lambda run: run.update(duration_s=1e300), "duration_s"),
    "a negative duration": (lambda run: run.update(duration_s=-5.0), "duration_s"),
    "a whole number of 70 bits": (lambda run: run["provenance"].update(seed=2**70), "provenance.seed"),
    "a status of its own": (lambda run: run.update(status="finished"), "status"),
    "a kind of its own": (lambda run: run.update(kind="training"), "kind"),
    "an arm C": (lambda run: run.update(arm="C"), "arm"),
    "a repeat below 0": (lambda run: run.update(repeat=-1), "repeat"),
    "a label of 100,000 characters": (lambda run: run.update(label="x" * 100_000), "label"),
    "NUL in the label": (lambda run: run.update(label="a\0b"), "label"),
    "NUL in a knob's name": (lambda run: run["provenance"]["config"].update({"a\0": 1}), "provenance.config"),
    "a lone surrogate": (lambda run: run.update(label="\ud800"), "label"),
    "a lone surrogate deep inside": (
        lambda run: run["events"][0].update(detail={"a": [{"b": "\udfff"}]}),
        "events[0].detail.a[0].b",
    ),
    "a run id with a newline": (lambda run: run.update(run_id="a\nb"), "run_id"),
    "a run id of 65 characters": (lambda run: run.update(run_id="a" * 65), "run_id"),
    "a comparison id of 65 characters": (lambda run: run.update(comparison_id="a" * 65), "comparison_id"),
    "a hash of 65 characters": (lambda run: run["provenance"].update(config_hash="a" * 65), "provenance.config_hash"),
    "a finish reason of its own": (
        lambda run: run["requests"][1].update(finish_reason="bored"),
        "requests[1].finish_reason",
    ),
    "fewer than no tokens": (lambda run: run["requests"][0].update(output_tokens=-3), "requests[0].output_tokens"),
    "a gap before the token": (lambda run: run["requests"][0].update(itl_ms=[-1e6]), "requests[0].itl_ms[0]"),
    "a metric that is no number": (lambda run: run["metrics"].update(ttft_ms_p50="1"), "metrics.ttft_ms_p50"),
    "a metric beyond all measure": (lambda run: run["metrics"].update(ttft_ms_p50=1e200), "metrics.ttft_ms_p50"),
    "a metric's name of 129 characters": (lambda run: run["metrics"].update({"m" * 129: 1.0}), "metrics"),
    "ten thousand metrics": (lambda run: run["metrics"].update({f"m{n}": 1.0 for n in range(10_000)}), "metrics"),
    "a configuration 30 deep": (lambda run: run["provenance"]["config"].update(a=_nested(30)), "provenance.config.a"),
    "a number of 70 bits in a knob": (lambda run: run["provenance"]["config"].update(a=2**70), "provenance.config.a"),
    "a version that is no text": (
        lambda run: run["provenance"]["versions"].update(torch=2),
        "provenance.versions.torch",
    ),
    "a field of a newer schema": (lambda run: run.update(schema_version=9), "schema_version"),
    "a field of a newer request": (lambda run: run["requests"][0].update(tier=1), "requests[0].tier"),
    "a missing field of a sample": (lambda run: run["samples"][0].pop("t_s"), "samples[0].t_s"),
    "a disturbance without its time": (lambda run: run.update(disturbed=[{"what": "x"}]), "disturbed[0]"),
    "a disturbance in the year 10^300": (
        lambda run: run.update(disturbed=[{"what": "x", "time_unix_s": 1e300}]),
        "disturbed[0].time_unix_s",
    ),
}


def _nested(depth):
    value = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("what", HOSTILE)
def test_a_run_that_cannot_be_is_refused_by_file_run_and_field_and_nothing_of_the_file_is_imported(sqlite_store, what):
    spoil, field = HOSTILE[what]
    broken = json.loads(json.dumps(to_json(make_run(2))))
    spoil(broken)
    text = json.dumps([to_json(make_run(1)), broken]).replace('"BIG"', "1e999")
    with pytest.raises(StorageError) as caught:
        sqlite_store.import_json(text, source="friend.json")
    assert caught.value.field.startswith(f"friend.json: runs[1].{field}")
    if not field.startswith("run_id"):
        assert make_run(2).run_id in caught.value.message
    assert len(str(caught.value)) < 500
    assert "Nothing of this one was imported" in caught.value.remedy
    assert sqlite_store.list_runs() == []


def test_one_run_twice_is_imported_once_and_two_runs_of_one_id_are_refused(sqlite_store):
    document = to_json(make_run(1))
    assert sqlite_store.import_json(json.dumps([document, document])).imported == [make_run(1).run_id]
    other = document | {"label": "the same id, another run"}
    with pytest.raises(StorageError, match=r"runs\[1\]\.run_id.*twice"):
        sqlite_store.import_json(json.dumps([document | {"run_id": "new"}, other | {"run_id": "new"}]))
    assert len(sqlite_store.list_runs()) == 1


def test_of_two_values_for_one_name_none_is_taken(sqlite_store):
    text = json.dumps(to_json(make_run(1))).replace('"label": ""', '"label": "a", "label": "b"')
    with pytest.raises(StorageError, match="occurs twice"):
        sqlite_store.import_json(text)


def test_a_hundred_thousand_runs_and_a_huge_file_are_refused_before_they_are_read(sqlite_store, monkeypatch):
    with pytest.raises(StorageError, match="100,000 runs are more than the 10,000") as caught:
        sqlite_store.import_json("[" + ",".join(["{}"] * 100_000) + "]")
    assert "Export fewer runs at a time" in caught.value.remedy
    with pytest.raises(StorageError, match="objects and lists"):
        sqlite_store.import_json(b"[" + b"[]," * 3_000_001 + b"0]")
    monkeypatch.setattr(documents_module, "MOST_BYTES", 1000)
    with pytest.raises(StorageError, match="MiB"):
        sqlite_store.import_json(b" " * 1001)


def test_whatever_is_imported_can_be_listed_and_exported(sqlite_store):
    """The widest that the limits allow."""
    wide = to_json(make_run(1))
    wide.update(label="=cmd()\t" + "ü" * 900, started_unix_s=7_258_118_400, error="\x1b[31m" + "e" * 10_000)
    wide["metrics"] = {f"metric {n}": 1e18 for n in range(1000)}
    wide["provenance"]["config"]["nested"] = _nested(14)
    wide["requests"][0]["itl_ms"] = [1e12] * 1000
    sqlite_store.import_json(json.dumps(wide))
    [row] = sqlite_store.list_runs()
    assert row.unshowable is None
    assert sqlite_store.export_csv()
    assert sqlite_store.export_requests_csv()
    again = sqlite_store.export_json()
    sqlite_store.delete_runs([row.run_id])
    assert sqlite_store.import_json(again).imported == [row.run_id]

"""``headroom bench``: a run is measured, shown, and put on record or kept."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from engine.measure.metrics import METRICS
from tests.cli.conftest import WORKLOAD, Run, in_subprocess

pytestmark = pytest.mark.slow


@pytest.fixture
def workload_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny-workload.json"
    path.write_text(json.dumps(WORKLOAD))
    return path


def test_bench_measures_and_records(run: Run, tiny_llama: Path, workload_file: Path, tmp_path: Path):
    database = f"sqlite:///{tmp_path}/history.db"
    command = ("bench", "--model", tiny_llama, "--workload", workload_file, "--seed", 3, "--label", "a label")
    code, out, err = run(*command, "--set", "batching=static", "--record", database, "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["status"] == "completed"
    assert (
        {"output_tokens_s", "ttft_ms_p50", "tpot_ms_mean", "itl_ms_p99"} <= document["metrics"].keys() <= METRICS.keys()
    )
    assert document["metrics"]["output_tokens"] == 15
    assert len(document["requests"]) == 3
    provenance = document["provenance"]
    assert (provenance["seed"], provenance["config"]["batching"]) == (3, "static")
    listed = in_subprocess("-m", "storage", "list", "--db", database, "--json")
    rows = json.loads(listed.stdout)
    assert [(row["run_id"], row["label"], row["status"]) for row in rows] == [
        (document["run_id"], "a label", "completed")
    ]


def test_bench_shows_a_table_with_units(run: Run, tiny_llama: Path, workload_file: Path):
    code, out, _ = run("bench", "--model", tiny_llama, "--workload", workload_file)
    assert code == 0
    line = next(line for line in out.splitlines() if line.startswith(METRICS["output_tokens_s"].label))
    assert line.split()[-1] == "tokens/s"
    assert float(line.split()[-2].replace(",", "")) > 0
    assert "tiny on" in out.splitlines()[0]


def test_run_that_cannot_be_recorded_is_kept(
    run: Run, tiny_llama: Path, workload_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HEADROOM_HOME", str(tmp_path / "home"))
    blocked = tmp_path / "a-file"
    blocked.write_text("not a folder")
    command = ("bench", "--model", tiny_llama, "--workload", workload_file, "--json")
    code, out, err = run(*command, "--record", f"sqlite:///{blocked}/history.db")
    assert code == 1
    document = json.loads(out)
    kept = tmp_path / "home" / "unsaved" / f"headroom-run-{document['run_id']}.json"
    assert json.loads(kept.read_text()) == document
    assert list(folder.iterdir()) == []  # the current folder may be anybody's
    assert str(kept) in err
    assert "could not be put on record" in err
    recorded = in_subprocess(
        "-m", "storage", "record", "--db", f"sqlite:///{tmp_path}/other.db", input=kept.read_text()
    )
    assert recorded.returncode == 0, recorded.stderr


def test_interrupted_run_is_still_printed_and_recorded(run: Run, tiny_llama: Path, tmp_path: Path):
    endless = tmp_path / "endless.json"
    endless.write_text(json.dumps({**WORKLOAD, "num_requests": 500, "output_tokens": 400}))
    before = signal.getsignal(signal.SIGINT)

    def interrupt() -> None:
        while signal.getsignal(signal.SIGINT) is before:  # until the run has taken it over
            time.sleep(0.01)
        time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    database = f"sqlite:///{tmp_path}/history.db"
    code, out, _ = run("bench", "--model", tiny_llama, "--workload", endless, "--record", database, "--json")
    thread.join()
    assert code == 130
    document = json.loads(out)
    assert document["status"] == "cancelled"
    assert len(document["requests"]) == 500
    assert signal.getsignal(signal.SIGINT) is before
    listed = in_subprocess("-m", "storage", "list", "--db", database, "--json")
    assert [row["status"] for row in json.loads(listed.stdout)] == ["cancelled"]

"""Runs started from the pages are on record whatever happens to the page, the worker or the disk."""

from __future__ import annotations

import pytest
from streamlit.testing.v1 import AppTest

from engine.measure.results import from_json
from pages.services import Services, describe_exit
from storage import StorageError
from tests.pages.engine_fakes import PAGES, FullStore

pytestmark = pytest.mark.slow

STRIP = """
from pages.services import get_services
from pages.shared.status import status_strip
status_strip(get_services())
"""


def launch(services):
    return services.recorder.launch({"workload": "burst", "seed": 1, "label": "burst"}, title="burst")


def test_a_run_is_announced_as_running_and_then_saved(services, store, client, wait_until):
    client.job_polls = 5
    job = launch(services)
    wait_until(lambda: [row.status for row in store.list_runs()] == ["running"])
    wait_until(lambda: not job.active)
    assert [row.status for row in store.list_runs()] == ["completed"]
    assert store.get_run(job.run_ids[0]).requests


def test_a_killed_worker_fails_the_run_and_keeps_the_history(services, store, client, worker, wait_until):
    first = launch(services)
    wait_until(lambda: not first.active)
    client.job_polls = 1000
    second = launch(services)
    wait_until(lambda: len(store.list_runs()) == 2)
    worker.kill()
    wait_until(lambda: not second.active)
    assert second.state == "failed"
    assert "signal 9 (SIGKILL)" in second.error
    assert store.get_run(first.run_ids[0]).status == "completed"
    failed = store.get_run(second.run_ids[0])
    assert failed.status == "failed"
    assert "SIGKILL" in failed.error
    services.restart()
    client.job_polls = 1
    third = launch(services)
    wait_until(lambda: not third.active)
    assert store.get_run(third.run_ids[0]).status == "completed"


def test_a_worker_restarted_between_two_looks_fails_the_run(services, store, client, wait_until):
    client.job_polls = 1000
    job = launch(services)
    wait_until(lambda: store.list_runs())
    client.jobs.clear()
    wait_until(lambda: not job.active)
    assert "restarted" in store.get_run(job.run_ids[0]).error


def test_a_full_disk_is_told_with_the_remedy_and_loses_nothing(
    client, worker, store, monkeypatch, wait_until, tmp_path
):
    from pages import services as services_module

    monkeypatch.setenv("HEADROOM_HOME", str(tmp_path / "home"))
    full = FullStore(store)
    services = Services(worker, lambda: client, lambda: full, "fake-135m")
    monkeypatch.setattr(services_module, "_services", services)
    job = launch(services)
    wait_until(lambda: not job.active)
    assert job.state == "completed"
    page = AppTest.from_string(STRIP, default_timeout=20).run()
    assert not page.exception
    shown = " ".join(item.value for item in page.error)
    assert "the disk is full" in shown
    assert "Free some space" in shown
    assert page.get("download_button")
    full.full = False
    page.button(key=f"retry-{job.job_id}").click().run()
    assert not page.error
    assert [row.status for row in store.list_runs()] == ["completed"]


def test_a_run_whose_database_cannot_even_be_opened_is_kept_under_the_home(
    client, worker, monkeypatch, wait_until, tmp_path
):
    monkeypatch.setenv("HEADROOM_HOME", str(tmp_path / "home"))

    def closed():
        raise StorageError("the database file cannot be opened.", field="record.db", remedy="Check the folder.")

    services = Services(worker, lambda: client, closed, "fake-135m")
    job = launch(services)
    wait_until(lambda: not job.active)
    kept = tmp_path / "home" / "unsaved" / f"headroom-run-{job.run_ids[0]}.json"
    assert from_json(kept.read_text()) == job.unrecorded[0]
    assert str(kept) in job.storage_error
    assert "cannot be opened" in job.storage_error


def test_the_strip_tells_how_the_worker_died_and_restarts_it(services, worker):
    page = AppTest.from_string(STRIP, default_timeout=20).run()
    assert not page.error
    worker.kill()
    page.run()
    assert "signal 9 (SIGKILL)" in page.error[0].value
    assert "step 42" in page.code[0].value
    page.button[0].click().run()
    assert worker.restarts == 1
    assert not page.error


def test_the_strip_shows_the_progress_of_a_load(services, client):
    client.phase = {"status": "loading", "progress": 0.25, "stage": "reading weights"}
    page = AppTest.from_string(STRIP, default_timeout=20).run()
    assert not page.exception
    assert "reading weights" in str(page.get("progress")[0].proto.text)


def test_an_engine_that_gave_up_can_be_restarted(services, client, worker):
    client.phase = {"status": "dead", "error": {"message": "the step failed: out of memory"}}
    page = AppTest.from_string(STRIP, default_timeout=20).run()
    assert "out of memory" in page.error[0].value
    client.phase = {"status": "ready"}
    services._forget_health()
    services.restart()
    assert worker.restarts == 0  # another tab was quicker
    client.phase = {"status": "dead"}
    services._forget_health()
    services.restart()
    assert worker.restarts == 1


def test_a_failed_load_tells_that_the_previous_model_keeps_serving(services, client):
    client.phase = {"status": "ready", "error": {"message": "no such file", "remedy": "Give a path."}}
    page = AppTest.from_string(STRIP, default_timeout=20).run()
    assert "no such file" in page.warning[0].value
    assert "keeps serving" in page.warning[0].value


def test_a_job_leaves_a_line_with_its_runs_in_the_log(services, wait_until, caplog):
    with caplog.at_level("INFO", logger="pages"):
        job = launch(services)
        wait_until(lambda: not job.active)
    lines = [record.getMessage() for record in caplog.records if job.job_id in record.getMessage()]
    assert [job.run_ids[0] in lines[0], f"{job.job_id} completed, finished runs: 1" in lines[1]] == [True, True]


def test_exit_codes_are_told_in_words():
    assert describe_exit(-9) == "killed by signal 9 (SIGKILL)"
    assert describe_exit(3) == "exit code 3"


def test_pages_hold_no_formula_and_no_sql():
    for path in PAGES.rglob("*.py"):
        text = path.read_text()
        assert "sqlalchemy" not in text, path
        assert "import torch" not in text, path

"""A worker that is killed during a run: the page says so, the record is intact, the next run works."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

from storage import open_store
from tests.e2e.steps import open_page, run_workload, wait_ready

pytestmark = [pytest.mark.browser, pytest.mark.model, pytest.mark.slow]


def test_a_killed_worker_is_told_restarted_and_loses_no_history(page, dashboard):
    page.goto(f"{dashboard.url}/live")
    wait_ready(page)
    run_workload(page, "quick")
    expect(page.get_by_text("recorded", exact=True)).to_be_visible(timeout=120_000)
    run_workload(page, "burst-32")
    expect(page.get_by_role("button", name="Cancel")).to_be_visible()
    dashboard.kill_worker()
    expect(page.get_by_text("killed by signal 9 (SIGKILL)").first).to_be_visible()
    open_page(page, "History")
    expect(page.get_by_text("2 runs").first).to_be_visible()
    page.get_by_role("button", name="Restart worker").click()
    open_page(page, "Live")
    wait_ready(page)
    run_workload(page, "quick")
    expect(page.get_by_text("recorded", exact=True)).to_have_count(2, timeout=120_000)  # the first run's and this one's
    store = open_store(f"sqlite:///{dashboard.home}/headroom.db")
    rows = sorted(store.list_runs(), key=lambda row: row.started_unix_s)
    store.close()
    assert [row.status for row in rows] == ["completed", "failed", "completed"]
    assert "SIGKILL" in rows[1].error
    assert rows[0].metrics["output_tokens_s"] > 0

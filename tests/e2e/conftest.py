"""Fixtures of the browser tests."""

from __future__ import annotations

import contextlib

import pytest

from tests.e2e.dashboard import chromium_path, running_dashboard

# The worker shares the machine's cores with the browser and perhaps with other tests.
_PATIENCE_MS = 90_000


@pytest.fixture(scope="module")
def dashboard(tmp_path_factory):
    with running_dashboard(tmp_path_factory.mktemp("home")) as started:
        yield started


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=_PATIENCE_MS)
    path = chromium_path()
    assert path is not None, "Chromium is missing: `make test` installs it"
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=arguments)
        yield opened
        opened.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Add to a failed test's report what the browser shows, how the connection is, and the end of the server's log."""
    report = yield
    if call.when == "call" and report.failed and "page" in item.funcargs:
        opened, dashboard = item.funcargs["page"], item.funcargs["dashboard"]
        with contextlib.suppress(Exception):  # the page itself may be what has died
            app = opened.get_by_test_id("stApp")
            state = {name: app.get_attribute(f"data-test-{name}") for name in ("script-state", "connection-state")}
            report.sections.append(("page", f"{opened.url} {state}\n{opened.locator('body').inner_text()}"))
        report.sections.append(("dashboard", dashboard.log.read_text()[-4000:]))
    return report


@pytest.fixture
def page(browser, dashboard):
    """A tab; a script error, a request that leaves this machine or that the content policy refuses fails the test."""
    context = browser.new_context(viewport={"width": 1400, "height": 1000}, accept_downloads=True)
    opened = context.new_page()
    opened.set_default_timeout(_PATIENCE_MS)
    abroad: list[str] = []
    opened.on("request", lambda request: abroad.append(request.url) if is_abroad(request.url) else None)
    refused: list[str] = []
    opened.on("console", lambda said: refused.append(said.text) if "Content Security Policy" in said.text else None)
    yield opened
    assert not abroad
    assert not refused
    assert opened.get_by_test_id("stException").count() == 0
    context.close()


def is_abroad(url: str) -> bool:
    return url.startswith("http") and "://127.0.0.1" not in url

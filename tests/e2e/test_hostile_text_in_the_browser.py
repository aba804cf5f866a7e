"""In a real browser hostile text loads nothing, leads nowhere and is shown as it is written."""

from __future__ import annotations

import contextlib
import subprocess
import sys

import pytest
from playwright.sync_api import expect

from tests.e2e.dashboard import ROOT, free_port, stop, wait_until_up
from tests.e2e.hostile_page import HOSTILE

pytestmark = [pytest.mark.browser, pytest.mark.slow]


@pytest.fixture
def hostile_url(tmp_path):
    """A page full of hostile text, without what guards the dashboard: the text alone must be harmless."""
    port = free_port()
    log = tmp_path / "log"
    command = [sys.executable, "-m", "streamlit", "run", "tests/e2e/hostile_page.py", "--server.port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
    with contextlib.ExitStack() as stack:
        stack.callback(stop, process)
        wait_until_up(process, f"http://127.0.0.1:{port}", log)
        yield f"http://127.0.0.1:{port}"


def test_hostile_text_becomes_no_image_no_link_no_icon_and_asks_no_other_host(browser, hostile_url):
    opened = browser.new_page(viewport={"width": 1400, "height": 1000})
    asked: list[str] = []
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(hostile_url)
    expect(opened.get_by_text("the end")).to_be_visible()
    opened.wait_for_timeout(1500)
    assert not [url for url in asked if "evil" in url or not url.startswith((hostile_url, "data:", "blob:"))]
    main = opened.get_by_test_id("stApp")
    assert main.locator("img, iframe, script, .katex, a[href]:not([href^='#'])").count() == 0
    icons = main.locator("[data-testid=stIconMaterial]").all_inner_texts()
    assert "delete" not in icons
    body = main.inner_text().replace("\u2060", "")
    for text in HOSTILE:
        assert body.count(text) >= 8, text
    opened.close()

"""The README's screenshots, made again from real data: ``python -m tests.e2e.screenshots --out docs/images``.

Starts a dashboard with an empty record, serves and measures on the default model, and takes every page at the asked
widths in the light and the dark theme.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from playwright.sync_api import Browser, Page, expect, sync_playwright

from storage import open_store
from tests.e2e.dashboard import chromium_path, running_dashboard
from tests.e2e.steps import ask, choose, open_page, run_workload, set_number, wait_ready

_HEIGHT = 1000
_SETTLE_MS = 2500
_PATIENCE_MS = 120_000
_LONG_MS = 600_000
_TALLEST = 2400
_QUESTIONS = ("Static or continuous batching", "Model weights or INT4")
_PROMPTS = (
    "Write a long story about a lighthouse keeper and the sea.",
    "Write a long letter from a sailor to the lighthouse keeper.",
    "Repeat the same line twenty times: the quick brown fox jumps over the lazy dog.",
)


def main() -> None:
    """Parse the command line and take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the PNG files")
    parser.add_argument("--widths", type=int, nargs="+", default=[1280, 1600])
    parser.add_argument("--themes", nargs="+", default=["light", "dark"], choices=["light", "dark"])
    parser.add_argument("--repeats", type=int, default=5, help="of the comparison that is shown")
    parser.add_argument(
        "--questions", nargs="+", default=list(_QUESTIONS), choices=_QUESTIONS, help="that are compared"
    )
    parser.add_argument("--workload", default="burst-8", help="of the runs and comparisons that are shown")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    expect.set_options(timeout=_PATIENCE_MS)
    with (
        tempfile.TemporaryDirectory() as folder,
        running_dashboard(Path(folder) / "home") as dashboard,
        sync_playwright() as playwright,
    ):
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=chromium_path(), args=flags)
        _make_data(browser, dashboard.url, arguments.questions, arguments.repeats, arguments.workload)
        opened = _runs_of_a_comparison(dashboard.home)
        for width in arguments.widths:
            for theme in arguments.themes:
                _take_all(browser, dashboard.url, opened, arguments.out, width, theme)
        browser.close()


def _tab(browser: Browser, width: int, theme: str) -> Page:
    page = browser.new_page(
        viewport={"width": width, "height": _HEIGHT},
        color_scheme=theme,  # type: ignore[arg-type]
    )
    page.set_default_timeout(_PATIENCE_MS)
    return page


def _make_data(browser: Browser, url: str, questions: Sequence[str], repeats: int, workload: str) -> None:
    """Two workload runs and the comparisons, so that Compare and History have something to show."""
    page = _tab(browser, 1600, "light")
    page.goto(f"{url}/live")
    wait_ready(page)
    for count, name in enumerate(("quick", workload), start=1):
        run_workload(page, name)
        expect(page.get_by_text("recorded", exact=True)).to_have_count(count, timeout=_LONG_MS)
        page.reload()
        wait_ready(page)
    for question in questions:
        open_page(page, "Compare")
        choose(page, "Question", question)
        choose(page, "Workload", workload)
        set_number(page, "Repeats", repeats)
        page.get_by_role("button", name="Compare", exact=True).click()
        expect(page.get_by_role("button", name="Cancel")).to_be_visible()
        expect(page.get_by_role("button", name="Cancel")).to_be_hidden(timeout=_LONG_MS)
    page.close()


def _runs_of_a_comparison(home: Path) -> list[str]:
    """The first run of each setting of the newest comparison: History opens them side by side."""
    store = open_store(f"sqlite:///{home}/headroom.db")
    newest = store.list_comparisons()[0]
    store.close()
    return [run_ids[0] for run_ids in newest.run_ids.values()]


def _take_all(browser: Browser, url: str, opened: Sequence[str], out: Path, width: int, theme: str) -> None:
    page = _tab(browser, width, theme)
    places = {"plan": "", "compare": "compare", "history": f"history?run={'&run='.join(opened)}"}
    for name, place in places.items():
        page.goto(f"{url}/{place}")
        wait_ready(page)
        _take(page, out / f"{name}-{width}-{theme}.png")
    _live(page, url, out / f"live-{width}-{theme}.png")
    page.close()


def _live(page: Page, url: str, target: Path) -> None:
    """Live with two streams and two toggles in the charts."""
    page.goto(f"{url}/live")
    wait_ready(page)
    page.get_by_role("button", name="Sampling").click()
    set_number(page, "Max tokens", 3000)  # still streaming when the picture is taken
    page.keyboard.press("Escape")
    for prompt in _PROMPTS:
        ask(page, prompt)
        page.wait_for_timeout(4000)
    page.get_by_role("radiogroup", name="Weight precision").get_by_role("radio", name="int4").click()
    page.wait_for_timeout(6000)
    page.get_by_role("radio", name="ngram").click()
    page.wait_for_timeout(7000)
    _take(page, target)
    stop = page.get_by_role("button", name="Stop")
    if stop.count():  # on a quick machine the answer may have come to its end
        stop.first.click()
    page.get_by_role("radio", name="off").click()
    page.get_by_role("radiogroup", name="Weight precision").get_by_role("radio", name="model").click()
    page.wait_for_timeout(2000)


def _take(page: Page, target: Path) -> None:
    expect(page.get_by_test_id("stApp")).to_have_attribute("data-test-script-state", "notRunning")
    expect(page.get_by_test_id("stSkeleton")).to_have_count(0)  # parts of the page that are still on their way
    page.wait_for_timeout(_SETTLE_MS)
    height = page.evaluate("document.querySelector('[data-testid=stMain]').scrollHeight")
    width = page.viewport_size["width"] if page.viewport_size else 1280
    page.set_viewport_size({"width": width, "height": min(max(height + 40, 720), _TALLEST)})
    page.wait_for_timeout(1200)
    page.screenshot(path=str(target))
    page.set_viewport_size({"width": width, "height": _HEIGHT})


if __name__ == "__main__":
    main()

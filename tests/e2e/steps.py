"""What a person does in the browser, in words."""

from __future__ import annotations

import contextlib
import re
import warnings

from playwright.sync_api import Locator, Page, TimeoutError, expect


def open_page(page: Page, name: str) -> None:
    """Go to a page by the navigation at the top.

    Again if need be: where a part of the old page asks for a rerun in the same instant, Streamlit runs the old page.
    """
    link = page.get_by_role("link", name=name, exact=True).first
    for _ in range(3):
        link.click()
        settle(page)
        if link.get_attribute("aria-current") == "page":
            break
        page.wait_for_timeout(500)
    expect(link).to_have_attribute("aria-current", "page")


def wait_ready(page: Page) -> None:
    """Wait until the strip says that the model is ready."""
    expect(page.get_by_text(re.compile(r"\d+ running, \d+ waiting")).first).to_be_visible(timeout=90_000)


def choose(page: Page, label: str, option: str) -> None:
    """Choose an option of a select box; again if a rerun of the page has closed its list meanwhile."""
    field = page.get_by_role("combobox", name=re.compile(rf"\b{re.escape(label)}$")).first
    for _ in range(5):
        settle(page)
        if field.input_value() == option:
            return
        field.click()
        field.fill(option)
        with contextlib.suppress(TimeoutError):
            page.get_by_role("option", name=option, exact=True).first.click(timeout=5000)
        page.wait_for_timeout(500)
    expect(field).to_have_value(option)


def settle(page: Page) -> None:
    """Wait until the script of the page has run to its end."""
    expect(page.get_by_test_id("stApp")).to_have_attribute("data-test-script-state", "notRunning")


def enabled(page: Page, control: Locator) -> Locator:
    """The control once it can be used.

    Seen once, in a whole run of the suite, and not yet explained: a tab that stays disabled. It is loaded again, as a
    person would do, and a warning says how its connection was.
    """
    try:
        expect(control).not_to_have_attribute("data-disabled", "true", timeout=30_000)
    except AssertionError:
        app = page.get_by_test_id("stApp")
        state = [app.get_attribute(f"data-test-{name}") for name in ("connection-state", "script-state")]
        applying = page.get_by_text("Applying").all_inner_texts()
        warnings.warn(f"the tab stayed disabled: {state} {applying}", stacklevel=2)
        page.reload()
        wait_ready(page)
        expect(control).not_to_have_attribute("data-disabled", "true")
    return control


def ask(page: Page, prompt: str) -> None:
    """Send a prompt on the Live page."""
    box = page.get_by_placeholder("Ask the loaded model")
    box.fill(prompt)
    box.press("Enter")


def answer(page: Page) -> Locator:
    """The newest answer of the chat."""
    return page.get_by_test_id("stChatMessage").last


def set_number(page: Page, label: str, value: int) -> None:
    """Type a number and leave the field."""
    field = page.get_by_role("spinbutton", name=label).first
    field.fill(str(value))
    field.press("Enter")
    field.press("Tab")


def run_workload(page: Page, workload: str) -> None:
    """Start a named workload on the Live page."""
    page.get_by_role("tab", name="Workload").click()
    choose(page, "Workload", workload)
    page.get_by_role("button", name="Run and record").click()

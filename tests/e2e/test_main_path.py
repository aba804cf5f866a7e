"""The main path in a real browser, on the real model: plan, chat, toggle, compare, find, export."""

from __future__ import annotations

import csv
import re

import pytest
from playwright.sync_api import expect

from tests.e2e.steps import answer, ask, choose, open_page, set_number, wait_ready

TOGGLES = [
    {"weights": ["model", "int4"]},
    {"kv_dtype": ["model", "int8"]},
    {"speculation": ["off", "ngram"]},
    {"speculation": ["ngram", "off"]},
    {"weights": ["int4", "model"]},
    {"kv_dtype": ["int8", "model"]},
]
pytestmark = [pytest.mark.browser, pytest.mark.model, pytest.mark.slow]


def test_a_plan_a_chat_with_a_toggle_a_comparison_and_its_export(page, dashboard, tmp_path):
    page.goto(dashboard.url)
    plan_70b_on_h100(page)
    open_page(page, "Live")
    wait_ready(page)
    chat_while_toggling_int4(page)
    changes = changes_of(dashboard)
    assert [change["changed"] for change in changes] == TOGGLES  # each click once, and nothing went back by itself
    assert [change["requests_in_flight"] for change in changes] == [1, 1, 1, 1, 0, 0]
    open_page(page, "Compare")
    compare_prefix_cache(page)
    page.get_by_role("link", name="Open in History").click()
    rows = export_csv(page, tmp_path)
    assert len(rows) == 4
    assert {row["status"] for row in rows} == {"completed"}
    assert sorted(row["arm"] for row in rows) == ["A", "A", "B", "B"]
    assert all(float(row["metric.output_tokens_s"]) > 0 for row in rows)
    assert all(len(row["model_fingerprint"]) == 64 for row in rows)


def changes_of(dashboard):
    """The changes of knobs that have reached the engine, in order."""
    events = dashboard.client().series()["events"]
    return [event["detail"] for event in events if event["kind"] == "reconfigure"]


def plan_70b_on_h100(page):
    choose(page, "Model", "Llama-3.1-70B")
    choose(page, "GPU", "H100 SXM 80GB")
    choose(page, "GPUs", "1")
    expect(page.get_by_text("cannot hold").first).to_be_visible()
    choose(page, "GPUs", "8")
    expect(page.get_by_text("8 × H100 SXM 80GB hold Llama-3.1-70B")).to_be_visible()


def chat_while_toggling_int4(page):
    """One answer streams on through four toggles, whatever the speed of the machine; then it is stopped."""
    page.get_by_role("button", name="Sampling").click()
    set_number(page, "Max tokens", 6000)
    page.keyboard.press("Escape")
    ask(page, "Write a long story about a lighthouse keeper and the sea.")
    expect(answer(page)).to_contain_text("tokens/s")
    weights = page.get_by_role("radiogroup", name=re.compile("^Weight precision"))
    weights.get_by_role("radio", name="int4").click()
    expect_change(page, "weights: model → int4")
    cache = page.get_by_role("radiogroup", name=re.compile("^KV cache precision"))
    cache.get_by_role("radio", name="int8").click()
    expect_change(page, "kv_dtype: model → int8")
    page.get_by_role("radio", name="ngram").click()
    expect_change(page, "speculation: off → ngram")
    page.get_by_role("radio", name="off").click()
    expect_change(page, "speculation: ngram → off")
    before = tokens_of(page)
    expect_more_tokens(page, before + 20)
    expect(page.get_by_text(re.compile("weights int4")).first).to_be_visible()
    page.get_by_role("button", name="Stop").click()
    expect(answer(page)).to_contain_text("stopped")
    weights.get_by_role("radio", name="model").click()
    expect_change(page, "weights: int4 → model")
    cache.get_by_role("radio", name="model").click()
    expect_change(page, "kv_dtype: int8 → model")


def expect_change(page, summary):
    """Told in a toast for a moment, and in the log of changes from then on."""
    expect(page.get_by_text(summary).first).to_be_visible()


def expect_more_tokens(page, count):
    """The answer goes on until it has at least ``count`` tokens."""
    for _ in range(600):
        if tokens_of(page) >= count:
            return
        page.wait_for_timeout(150)
    raise AssertionError(f"the answer stands at {tokens_of(page)} tokens, {count} wanted")


def tokens_of(page):
    found = re.search(r"(\d+) tokens$", answer(page).inner_text())
    return int(found.group(1)) if found else 0


def compare_prefix_cache(page):
    choose(page, "Question", "Prefix cache off or on")
    choose(page, "Workload", "quick")
    set_number(page, "Repeats", 2)
    page.get_by_role("button", name="Compare", exact=True).click()
    expect(page.get_by_text("All metrics")).to_be_visible(timeout=240_000)
    expect(page.get_by_text("A: prefix_cache = off")).to_be_visible()
    expect(page.get_by_text("B: prefix_cache = on")).to_be_visible()


def export_csv(page, folder):
    with page.expect_download() as download:
        page.get_by_role("button", name="CSV", exact=True).click()
    target = folder / "runs.csv"
    download.value.save_as(target)
    return list(csv.DictReader(target.open(encoding="utf-8")))

"""What the engine does, on the Live page of a real browser: prefix hits, work of its steps, preemptions, execution."""

from __future__ import annotations

import re
import time

import pytest
from playwright.sync_api import expect

from tests.e2e.steps import ask, choose, enabled, run_workload, set_number, wait_ready

pytestmark = [pytest.mark.browser, pytest.mark.model, pytest.mark.slow]

LINES = "Repeat the same line twenty times: the quick brown fox jumps over the lazy dog. " * 4
CHARTS = ("Tokens computed", "Prefix hits and draft acceptance", "Preemptions")
SMALL_CACHE_TOKENS = 900
GIB = 2**30


def test_prefix_hits_rise_with_a_repeated_prompt_and_stand_still_without_the_cache(page, dashboard):
    page.goto(f"{dashboard.url}/live")
    wait_ready(page)
    limit_answers(page, 12)
    for _ in range(2):
        ask_and_wait(page, dashboard, LINES)
    expect(page.get_by_text(re.compile(r"prefix hits: [1-9]\d* % of"))).to_be_visible()
    looked_up = totals(dashboard)["prefix_query_tokens"]
    enabled(page, page.get_by_test_id("stCheckbox").filter(has_text="Prefix cache").locator("label")).click()
    expect(page.get_by_text("prefix_cache: on → off").first).to_be_visible()
    ask_and_wait(page, dashboard, LINES)
    assert totals(dashboard)["prefix_query_tokens"] == looked_up


def test_a_control_that_is_used_while_the_page_draws_itself_again_reaches_the_engine_and_shows_it(page, dashboard):
    page.goto(f"{dashboard.url}/live")
    wait_ready(page)
    limit_answers(page, 2000)
    weights = page.get_by_role("radiogroup", name=re.compile("^Weight precision"))
    for turn in range(6):
        wanted = ("int4", "model")[turn % 2]
        before = totals(dashboard)["requests"]
        ask(page, f"Write a story of twenty long chapters about {turn + 2} lighthouses.")
        wait_until(page, lambda before=before: totals(dashboard)["requests"] > before)
        page.get_by_role("button", name="Stop").click()
        weights.get_by_role("radio", name=wanted).click()  # at once, as the stopped answer makes the page rerun
        wait_until(page, lambda wanted=wanted: engine(dashboard)["config"]["weights"] == wanted)
        expect(weights.get_by_role("radio", name=wanted)).to_be_checked()
        expect(weights.get_by_role("radio", name=wanted)).to_be_enabled()


def test_execution_is_told_and_changes_with_its_control(page, dashboard):
    page.goto(f"{dashboard.url}/live")
    wait_ready(page)
    limit_answers(page, 8)
    here = engine(dashboard)["path"]["execution"]  # native where the machine has a compiler
    for mode, ran in (("eager", "eager"), ("auto", here)):
        choose(page, "Execution :green-badge[live]", mode)
        expect(page.get_by_text(re.compile(rf"layers, {ran} execution"))).to_be_visible()
        ask_and_wait(page, dashboard, "Hello.")
        assert dashboard.client().series()["steps"][-1]["execution"] == ran


def test_steps_show_prompts_answers_and_drafts_and_a_full_cache_shows_preemptions(page, dashboard):
    status = engine(dashboard)
    memory = status["memory"]
    per_token = memory["kv_cache"] / (status["num_blocks"] * status["block_size"])
    small = (memory["weights"] + memory["activations"] + SMALL_CACHE_TOKENS * per_token) / GIB
    dashboard.client().load({"memory_limit_gib": small, "speculation": "ngram"})
    wait_until(page, lambda: engine(dashboard)["num_blocks"] < status["num_blocks"])
    page.goto(f"{dashboard.url}/live")
    wait_ready(page)
    run_workload(page, "burst-8")
    expect(page.get_by_text("recorded", exact=True).first).to_be_visible(timeout=240_000)
    for title in CHARTS:
        expect(page.get_by_text(title, exact=False).first).to_be_visible()
    expect(page.get_by_test_id("stVegaLiteChart").locator("svg.marks")).to_have_count(8)
    steps = dashboard.client().series()["steps"]
    for part in ("prefill_tokens", "decode_tokens", "draft_tokens", "preempted"):
        assert sum(step[part] for step in steps) > 0, part
    shown = page.get_by_test_id("stMetric").filter(has_text="Preempted").get_by_test_id("stMetricValue")
    assert int(shown.inner_text().replace(",", "")) == totals(dashboard)["preemptions"] > 0


def limit_answers(page, tokens):
    page.get_by_role("button", name="Sampling").click()
    set_number(page, "Max tokens", tokens)
    page.keyboard.press("Escape")


def ask_and_wait(page, dashboard, prompt):
    """Send a prompt and wait until the engine has answered it."""
    before = totals(dashboard)["requests"]
    ask(page, prompt)

    def answered():
        status = engine(dashboard)
        return status["totals"]["requests"] > before and not status["running"] and not status["waiting"]

    wait_until(page, answered)


def wait_until(page, holds):
    end = time.monotonic() + 90
    while not holds():
        assert time.monotonic() < end, "it never came about"
        page.wait_for_timeout(200)


def engine(dashboard):
    """Its status; an empty engine while a model is loaded."""
    return dashboard.client().status()["engine"] or {"num_blocks": float("inf"), "totals": {}}


def totals(dashboard):
    return engine(dashboard)["totals"]

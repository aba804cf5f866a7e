"""The Live page over a fake engine: what an operator sees and what reaches the engine."""

from __future__ import annotations

import dataclasses
import re
import time

import pytest
from streamlit.testing.v1 import AppTest

from engine.config import EngineConfig, Tier, knobs
from tests.pages.engine_fakes import PAGES, FakeApiError


@pytest.fixture
def page(services):
    return AppTest.from_file(str(PAGES / "live" / "page.py"), default_timeout=20)


def knob(page, kind, name):
    """The control of a knob; its key bears a version behind the name."""
    return next(item for item in page.get(kind) if str(item.key).startswith(f"knob-{name}-"))


def texts(elements):
    return " ".join(str(element.value) for element in elements)


def drawn_knobs(page, prefix):
    """The names of the knobs whose controls have keys of this prefix."""
    kinds = (page.toggle, page.number_input, page.selectbox, page.text_input, page.button_group)
    keys = [str(item.key) for kind in kinds for item in kind]
    return {key.split("-")[1] for key in keys if key.startswith(f"{prefix}-")}


def settings_that_show_everything():
    """Changes of the configuration under which each knob that depends on another one is drawn at least once."""
    wanted = {knob.depends_on for knob in knobs() if knob.depends_on is not None}
    return [{}, *({name: {"on": True, "off": False}.get(value, value)} for name, value in sorted(wanted))]


def test_every_knob_of_the_schema_has_a_control_or_is_named_as_fixed(services, client):
    changed_live, in_the_load_form, fixed = set(), set(), ""
    for changes in settings_that_show_everything():
        client.config_now = EngineConfig().with_changes(changes)
        services.feed.read(max_age_s=0.0, patience_s=5.0)
        page = AppTest.from_file(str(PAGES / "live" / "page.py"), default_timeout=20).run()
        changed_live |= drawn_knobs(page, "knob")
        in_the_load_form |= drawn_knobs(page, "reload")
        fixed += texts(page.caption)
    single = [knob for knob in knobs() if len(knob.choices) == 1 and knob.tier is not Tier.RELOAD]
    assert [knob.name for knob in single if knob.label not in fixed] == []
    assert in_the_load_form == {knob.name for knob in knobs() if knob.tier is Tier.RELOAD}
    assert changed_live == {knob.name for knob in knobs() if knob.tier is not Tier.RELOAD and knob not in single}


def test_a_dependent_knob_appears_only_with_the_value_it_depends_on(page, client):
    page.run()
    assert not [item for item in page.number_input if str(item.key).startswith("knob-draft_length")]
    client.config_now = client.config_now.with_changes({"speculation": "ngram"})
    time.sleep(0.5)  # the feed shares one reading for a moment
    page.run()
    assert knob(page, "number_input", "draft_length").value == 4


def test_toggling_a_knob_changes_the_engine_and_tells_the_outcome(page, client):
    page.run()
    knob(page, "toggle", "prefix_cache").set_value(False).run()
    assert client.patches == [{"prefix_cache": False}]
    assert client.config_now.prefix_cache is False
    assert any("prefix_cache" in toast.value and "paused" in toast.value for toast in page.toast)


def test_prefix_hits_are_shown_and_the_cache_can_be_reset(page, client):
    page.run()
    assert "25 % of 400 prompt tokens" in texts(page.markdown)
    page.button(key="reset-prefix-cache").click().run()
    assert client.prefix_resets == 1
    assert any("17 blocks" in toast.value for toast in page.toast)


def test_a_reset_that_the_worker_does_not_answer_is_told(page, client):
    page.run()
    client.alive = False
    page.button(key="reset-prefix-cache").click().run()
    assert any("could not be reset" in toast.value for toast in page.toast)


def test_a_change_stays_in_the_log_with_its_pause_after_the_toast_has_gone(page, client, services):
    page.run()
    assert "appear here" in texts(page.caption)
    knob(page, "toggle", "prefix_cache").set_value(False).run()
    services.feed.read(max_age_s=0.0, patience_s=5.0)
    page.run()
    assert not page.toast
    logged = [item.value for item in page.markdown if "prefix_cache: on → off" in item.value]
    assert len(logged) == 1
    assert "paused" in logged[0]
    assert re.search(r"at \d\d:\d\d:\d\d", logged[0])


def test_a_rerun_in_the_same_run_does_not_swallow_the_toast(page, client):
    """A change that another part of the page answers with a rerun is told all the same."""
    page.run()
    client.running = 1  # the monitor finds the engine busy, which it was not: it asks for a rerun at its new pace
    time.sleep(0.5)
    knob(page, "toggle", "prefix_cache").set_value(False).run()
    assert any("prefix_cache" in toast.value for toast in page.toast)


def test_a_change_by_another_client_is_shown_and_not_sent_back(page, client):
    page.run()
    client.config_now = client.config_now.with_changes({"prefix_cache": False})
    time.sleep(0.5)
    page.run()
    assert knob(page, "toggle", "prefix_cache").value is False
    assert client.patches == []


def test_a_stale_reading_does_not_undo_a_change(page, client, services):
    """The reading that was under way while a knob was changed still bears the old value."""
    page.run()
    stale = services.feed.latest()
    knob(page, "toggle", "prefix_cache").set_value(False).run()
    services.feed._snapshot = dataclasses.replace(stale, taken_unix_s=time.time() + 60)
    for _ in range(3):
        page.run()
        assert knob(page, "toggle", "prefix_cache").value is False
    assert client.patches == [{"prefix_cache": False}]


def test_a_refused_change_is_shown_at_its_knob_and_the_control_goes_back(page, client):
    page.run()
    knob(page, "number_input", "max_running").set_value(500).run()
    assert "max_running" in texts(page.error)
    assert "max_num_seqs" in texts(page.error)
    assert knob(page, "number_input", "max_running").value == 64
    assert client.config_now.max_running == 64


def test_a_prompt_streams_beside_the_script_and_survives_a_toggle(page, client, wait_until):
    client.hold_after = 10
    page.run()
    page.number_input(key="chat-max-tokens").set_value(30).run()
    page.chat_input(key="chat-input").set_value("hello").run()
    stream = page.session_state["chat_streams"][0]
    assert stream.active
    knob(page, "toggle", "prefix_cache").set_value(False).run()
    assert stream.active
    client.release.set()
    wait_until(lambda: not stream.active)
    assert stream.state == "done"
    assert stream.text.split() == [f"word{index}" for index in range(30)]
    page.run()
    assert "TTFT" in texts(page.caption)
    assert "30 tokens" in texts(page.caption)


def test_two_prompts_stream_at_once(page, client, wait_until):
    client.hold_after = 3
    page.run()
    page.chat_input(key="chat-input").set_value("one").run()
    page.chat_input(key="chat-input").set_value("two").run()
    first, second = page.session_state["chat_streams"]
    wait_until(lambda: client.running == 2)
    assert first.active
    assert second.active
    page.button(key="chat-stop").click().run()
    client.release.set()
    wait_until(lambda: not first.active and not second.active)
    assert {first.state, second.state} == {"stopped"}
    wait_until(lambda: client.running == 0)


def test_a_workload_run_is_on_record_without_the_page(page, services, store, wait_until):
    page.run()
    page.button(key="live-run").click().run()
    job = services.recorder.jobs()[0]
    wait_until(lambda: not job.active)  # nobody looks at the page meanwhile
    assert [row.status for row in store.list_runs()] == ["completed"]
    page.run()
    assert not page.exception
    assert any(item.label == "Output tokens/s" and item.value == "100.0" for item in page.metric)


def test_charts_and_facts_are_drawn_from_the_engine(page, client):
    client.running = 3
    for index in range(200):
        client.add_step(time.time() - 20 + index * 0.1)
    page.run()
    assert not page.exception
    assert any(item.label == "Running / waiting" and item.value == "3 / 0" for item in page.metric)
    assert len(page.get("vega_lite_chart") + page.get("arrow_vega_lite_chart")) == 6


def test_before_the_model_is_ready_nothing_can_be_sent(page, client):
    client.phase = {"status": "loading", "progress": 0.4, "stage": "reading weights"}
    page.run()
    assert not page.exception
    assert page.chat_input(key="chat-input").disabled
    assert not [item for item in page.toggle if str(item.key).startswith("knob-")]


def test_a_failed_load_opens_the_load_form_again(page, client):
    client.phase = {"status": "failed", "error": {"message": "no such file", "remedy": "Give a path."}}
    page.run()
    assert not page.exception
    assert page.text_input(key="reload-model").value == "smollm2-135m"
    form = next(expander for expander in page.expander if expander.label == "Load model")
    assert form.proto.expanded


def test_load_model_sends_the_knobs_of_the_form(page, client):
    page.run()
    page.number_input(key="reload-max_num_seqs").set_value(8)
    next(button for button in page.button if button.label == "Load model").click().run()
    assert client.loads[-1]["max_num_seqs"] == 8
    assert client.loads[-1]["max_running"] == 8


def test_a_dead_worker_leaves_a_page_that_can_be_read(page, worker, client):
    page.run()
    client.add_step()
    page.run()
    worker.kill()
    page.run()
    assert not page.exception
    assert page.chat_input(key="chat-input").disabled
    assert "The controls appear when the model is ready." in texts(page.caption)
    assert "The last step was" in texts(page.caption)


def test_execution_mode_and_what_is_prepared_are_among_the_facts(page, client):
    client.execution = {
        "asked": "compiled", "last": "compiled", "reason": "prepared for 1 tokens", "prepared": ["1"], "failed": [],
        "preparing": {"done": 1, "total": 2, "current": "2–2048 tokens", "seconds": 12.5},
    }  # fmt: skip
    page.run()
    assert not page.exception
    facts = page.table[0].value.to_string()
    assert "compiled, prepared for 1 tokens; the last step ran compiled" in facts
    progress = page.get("progress")[0].proto
    assert "1 of 2 shapes, now 2–2048 tokens" in progress.text
    assert progress.value == 50


def test_a_shape_that_could_not_be_prepared_is_shown_with_its_reason(page, client):
    failure = {"tokens": "2–2048", "error": "CppCompileError: no space left"}
    client.execution = {"asked": "compiled", "last": "eager", "reason": "", "prepared": [], "failed": [failure]}
    page.run()
    assert not page.exception
    assert "2–2048 tokens stay eager: CppCompileError: no space left" in texts(page.warning)


def test_a_change_during_a_run_is_refused_and_can_be_made_all_the_same(page, client):
    client.recording = "run 4f2a"
    page.run()
    knob(page, "toggle", "prefix_cache").set_value(False).run()
    assert client.patches == []
    assert "run 4f2a is in progress" in texts(page.error)
    assert knob(page, "toggle", "prefix_cache").value is True
    page.button(key="force-prefix_cache").click().run()
    assert client.patches == [{"prefix_cache": False}]
    assert knob(page, "toggle", "prefix_cache").value is False
    assert not page.error
    assert not [button for button in page.button if str(button.key).startswith("force-")]


def test_a_load_during_a_run_is_refused_and_can_be_made_all_the_same(page, client):
    client.recording = "run 4f2a"
    page.run()
    next(button for button in page.button if button.label == "Load model").click().run()
    assert client.loads == []
    assert "run 4f2a is in progress" in texts(page.error)
    page.button(key="force-load").click().run()
    assert len(client.loads) == 1
    assert not page.exception
    assert not [button for button in page.button if button.key == "force-load"]


def test_another_refusal_offers_no_change_at_the_cost_of_a_run(page, client):
    def refuse(changes, **_):
        raise FakeApiError("too many", field="max_running", status_code=400)

    client.patch_config = refuse
    page.run()
    knob(page, "toggle", "prefix_cache").set_value(False).run()
    assert "too many" in texts(page.error)
    assert not [button for button in page.button if str(button.key).startswith("force-")]


def test_beside_quantized_weights_stands_what_their_loss_is_counted_from(page, client):
    page.run()
    assert "Q4_1" not in texts(page.caption)
    client.config_now = client.config_now.with_changes({"weights": "int4"})
    time.sleep(0.5)  # the feed shares one reading for a moment
    page.run()
    assert "as the file stores them: mostly Q4_1 (79 %, GGUF)" in texts(page.caption)
    assert "says nothing of other models" in texts(page.caption)


@pytest.mark.parametrize(("happens", "times"), [("nothing", 1), ("a request", 2), ("a change", 2)])
def test_a_page_that_stands_still_is_drawn_again_when_something_happens(services, client, happens, times):
    def page_with_strip():
        import streamlit as st

        from pages.services import get_services
        from pages.shared.status import _strip, status_strip

        services = get_services()
        status_strip(services)
        st.session_state["drawn"] = st.session_state.get("drawn", 0) + 1
        st.session_state["drawn_version"] = services.feed.latest().version
        if st.session_state["drawn"] == 1:
            services.happens()
            _strip(services)  # as at its next poll

    def happen():
        if happens == "a request":
            client.running = 1
        elif happens == "a change":
            client.patch_config({"prefix_cache": False})
        services.feed.read(max_age_s=0.0)

    services.happens = happen
    page = AppTest.from_function(page_with_strip).run()
    assert not page.exception
    assert page.session_state["drawn"] == times

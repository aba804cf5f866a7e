"""Every page with hostile names, labels, errors and answers: nothing of them becomes an image, a link or markup."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
from google.protobuf.message import Message
from markdown_it import MarkdownIt
from streamlit.testing.v1 import AppTest

from engine.config import EngineConfig
from engine.measure.results import EventRecord
from engine.outputs import EngineEvent
from pages.background.streams import ChatStream
from pages.shared.store import close_stores, get_store
from tests.capacity.test_capacity_spec import model_config
from tests.pages.engine_fakes import PAGES, FakeApiError, fake_run
from tests.storage.run_examples import failed_run, make_run

HOSTILE = (
    "![evil](http://evil.example/x.png) [evil](http://evil.example/a) <img src=http://evil.example/y.png> "
    "https://evil.example www.evil.example :red[evil] :material/evil: $evil$"
)
# Elements that show what they are given as it is
_LITERAL = {"code", "text", "json", "iframe", "html", "arrow_vega_lite_chart", "vega_lite_chart", "arrow_data_frame"}
_FIELDS = ("body", "label", "help", "text", "value", "delta", "caption")
_MARKUP = re.compile(r"https?://evil|www\.evil|(?<!\\):red\[evil|:material[/_]evil|(?<!\\)\$evil", re.IGNORECASE)


@pytest.fixture(autouse=True)
def record(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADROOM_HOME", str(tmp_path))
    monkeypatch.delenv("HEADROOM_DB", raising=False)
    yield get_store()
    close_stores()


def page_of(name):
    return AppTest.from_file(str(PAGES / name / "page.py"), default_timeout=30)


def markdown_of(node):
    """Every piece of Markdown under a node of the page, with where it stands."""
    kind = getattr(node, "type", "")
    proto = getattr(node, "proto", None)
    if isinstance(proto, Message) and kind not in _LITERAL:
        for field in proto.DESCRIPTOR.fields:
            is_text = field.type == field.TYPE_STRING and not field.is_repeated
            if field.name in _FIELDS and is_text:
                yield f"{kind}.{field.name}", getattr(proto, field.name)
    if kind in ("arrow_table", "table"):
        table = node.value
        for cell in [*table.columns, *table.index, *table.to_numpy().ravel()]:
            yield kind, str(cell)
    for child in getattr(node, "children", {}).values():
        yield from markdown_of(child)


def assert_harmless(page):
    """No exception, the hostile text is on the page, and it is text."""
    assert not page.exception, [item.value for item in page.exception]
    found = [(place, text) for place, text in markdown_of(page._tree) if "evil" in text]
    assert found
    for place, text in found:
        for token in MarkdownIt("commonmark", {"html": True}).parse(text):
            for part in token.children or [token]:
                assert part.type not in ("image", "link_open", "html_inline", "html_block"), (place, text)
        assert not _MARKUP.search(re.sub(r"(`+).*?\1", "", text)), (place, text)


def hostile_status(client):
    """An engine whose every name and message is hostile."""
    answer = client.status

    def status():
        document = answer()
        engine = document["engine"]
        engine["model"] |= dict.fromkeys(("name", "family", "source", "fingerprint"), HOSTILE)
        engine["path"] = {HOSTILE: HOSTILE, "device": HOSTILE, "dtype": HOSTILE, "execution": HOSTILE}
        preparing = {"done": 1, "total": 2, "current": HOSTILE, "seconds": 1.0}
        failed = [{"tokens": "8", "error": HOSTILE}]
        engine["execution"] = {"asked": HOSTILE, "last": HOSTILE, "preparing": preparing, "failed": failed}
        return document

    return status


def test_live_shows_hostile_names_events_errors_and_answers_as_text(services, client, wait_until):
    client.status = hostile_status(client)
    client.events += [EngineEvent(number, 1.0, kind, HOSTILE, {}) for number, kind in enumerate(("load", "error"))]
    services.recorder.launch({"workload": "burst", "seed": 0, "label": HOSTILE}, title=HOSTILE)
    wait_until(lambda: services.recorder.active() is None)
    broken = ChatStream("hello", {}, state="failed", error=HOSTILE)
    told = ChatStream(HOSTILE, {}, state="done")
    told._parts.append(f"{HOSTILE}\n\n# {HOSTILE}\n\n- {HOSTILE}\n\n| a |\n|---|\n| {HOSTILE} |")
    page = page_of("live")
    page.session_state["chat_streams"] = [broken, told]
    page.session_state["toasts"] = []
    page.run()
    assert_harmless(page)
    client.reset_prefix_cache = lambda: refuse()
    page.button(key="reset-prefix-cache").click().run()
    assert any("could not be reset" in toast.value for toast in page.toast)
    assert_harmless(page)


def refuse(*_, **__):
    raise FakeApiError(HOSTILE, field=HOSTILE, remedy=HOSTILE)


def test_live_shows_a_hostile_refusal_of_a_knob_as_text(services, client):
    client.patch_config = refuse
    page = page_of("live").run()
    next(item for item in page.toggle if str(item.key).startswith("knob-prefix_cache-")).set_value(False).run()
    assert_harmless(page)


@pytest.mark.parametrize(
    "phase",
    [
        {"status": "loading", "stage": HOSTILE, "model": HOSTILE, "progress": 0.5},
        {"status": "failed", "error": {"message": HOSTILE, "remedy": HOSTILE}, "model": HOSTILE},
        {"status": "ready", "error": {"message": HOSTILE, "remedy": HOSTILE}, "model": HOSTILE},
        {"status": "dead", "error": {"message": HOSTILE}, "model": HOSTILE},
    ],
)
def test_the_strip_shows_hostile_loads_and_failures_as_text(services, client, phase):
    client.phase = phase

    def strip():
        from pages.services import get_services
        from pages.shared.status import status_strip

        status_strip(get_services())

    assert_harmless(AppTest.from_function(strip).run())


def test_compare_shows_a_hostile_comparison_as_text(services, store):
    for letter, weights in (("A", "model"), ("B", "int4")):
        for repeat in range(2):
            run = fake_run(f"{letter}{repeat}", arm=letter, repeat=repeat, comparison_id="c" * 32)
            config = EngineConfig(weights=weights).to_dict() | {"attention": f"{HOSTILE} {letter}"}
            path = {"device": HOSTILE, HOSTILE: f"{HOSTILE} {letter}"}
            run.provenance = dataclasses.replace(run.provenance, model=HOSTILE, config=config, path=path)
            run.events.append(EventRecord(0.0, "note", f"quality: 1 ({HOSTILE})", {}))
            run.events.append(EventRecord(0.0, "energy", HOSTILE, {}))
            run.metrics["perplexity"] = 20.0
            run.label = HOSTILE
            store.save_run(run)
    page = page_of("compare").run()
    assert_harmless(page)


def hostile_run(seed):
    run = make_run(seed, label=HOSTILE)
    config = run.provenance.config | {"attention": HOSTILE, HOSTILE: HOSTILE}
    hostile = {HOSTILE: HOSTILE}
    run.provenance = dataclasses.replace(
        run.provenance, model=HOSTILE, model_fingerprint=HOSTILE, config=config, path=hostile, versions=hostile,
        hardware={**hostile, "gpus": [{"name": HOSTILE}]}, code_revision=f"{HOSTILE}{seed}", workload=hostile,
    )  # fmt: skip
    run.metrics[HOSTILE] = 1.0
    run.events += [EventRecord(0.0, HOSTILE, HOSTILE, {}), EventRecord(0.0, "energy", HOSTILE, {})]
    return run


def test_history_shows_a_hostile_run_and_two_side_by_side_as_text(record):
    runs = [hostile_run(1), hostile_run(2)]
    failed = failed_run(3, label=HOSTILE)
    failed.error = HOSTILE
    for run in (*runs, failed):
        record.save_run(run)
    for tab in ("Over time", "Latencies", "Requests", "All metrics", "Provenance"):
        page = page_of("history")
        page.session_state["history-tab"] = tab
        page.query_params["run"] = runs[0].run_id
        assert_harmless(page.run())
    page = page_of("history")
    page.query_params["run"] = failed.run_id
    assert_harmless(page.run())
    page = page_of("history")
    page.query_params["run"] = [run.run_id for run in runs]
    page.run()
    page.toggle(key="history-all-metrics").set_value(True).run()
    assert_harmless(page)


def test_plan_shows_the_name_of_a_hostile_file_as_text():
    from pages.plan.fields import key
    from pages.plan.model import UPLOAD

    page = page_of("plan")
    page.session_state[key("model")] = UPLOAD
    page.run()
    content = json.dumps(model_config("Qwen3-8B")).encode()
    name = HOSTILE.replace("/", ":") + ".json"
    page.file_uploader(key=key("config")).set_value((name, content, "application/json")).run()
    assert_harmless(page)
    broken = json.dumps(model_config("Qwen3-8B") | {"model_type": HOSTILE, "architectures": [HOSTILE]}).encode()
    page.file_uploader(key=key("config")).set_value(("config.json", broken, "application/json")).run()
    assert_harmless(page)

"""Every limit has an answer of its own, and health is answered at once whatever attacks the worker."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from fastapi import Request

from engine.cli import app as cli
from engine.config import EngineConfig
from engine.errors import ConfigError, QueueFullError, RequestError
from engine.server.bodies import BodyReader
from engine.server.limits import ServerLimits, limits_from_environment
from engine.server.texts import TextPool
from tests.conftest import save_tiny_llama
from tests.server.conftest import KNOBS, ServedApp, wait_until

pytestmark = pytest.mark.slow

PLAIN, CHAT = "/v1/completions", "/v1/chat/completions"
JSON = {"content-type": "application/json"}
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}{% endfor %}{% endfor %}"
ENDLESS += "{% endfor %}"
SMALL = ServerLimits(
    max_body_bytes=20_000,
    max_header_bytes=4096,
    max_connections=12,
    header_seconds=0.5,
    body_seconds=0.5,
    idle_seconds=0.5,
    write_seconds=1.0,
    max_prompt_characters=2000,
    max_messages=8,
    max_stop_strings=4,
    max_stop_characters=100,
    max_choices=16,
    text_seconds=1.0,
)


@pytest.fixture(scope="module")
def looping_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with a chat template that does not end, unless the first message says "quick"."""
    folder = save_tiny_llama(tmp_path_factory.mktemp("looping"))
    template = "{% if messages[0]['content'] != 'quick' %}" + ENDLESS + "{% endif %}{{ messages[0]['content'] }}"
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture(scope="module")
def small(looping_model: Path) -> Iterator[ServedApp]:
    """A worker with small limits and the template that does not end."""
    app = ServedApp(EngineConfig.from_mapping({**KNOBS, "model": str(looping_model)}), SMALL)
    app.wait_ready()
    yield app
    app.close()


def post(served: ServedApp, path: str, **body: Any) -> httpx.Response:
    return httpx.post(served.url + path, json=body, timeout=30, trust_env=False)


def connect(served: ServedApp) -> socket.socket:
    place = urlsplit(served.url)
    return socket.create_connection((place.hostname or "", place.port or 0), timeout=10)


def answer_to(connection: socket.socket) -> bytes:
    """Everything until the other side closes."""
    content = b""
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(65536):
            content += piece
    return content


@pytest.mark.parametrize(
    ("path", "body", "status", "field"),
    [
        (PLAIN, {"prompt": "x" * 30_000}, 413, "body"),
        (PLAIN, {"prompt": "x" * 2001}, 413, "prompt"),
        (PLAIN, {"prompt": ["x" * 1001] * 2}, 413, "prompt"),
        (PLAIN, {"prompt": [1] * 2001}, 413, "prompt"),
        (PLAIN, {"prompt": [[1] * 1001] * 2}, 413, "prompt"),
        (PLAIN, {"prompt": ["x"] * 17}, 422, "prompt"),
        (PLAIN, {"prompt": ["x"] * 5, "n": 4}, 422, "n"),
        (PLAIN, {"prompt": "x", "n": 17}, 422, "n"),
        (PLAIN, {"prompt": "x", "stop": ["x"] * 5}, 422, "stop"),
        (PLAIN, {"prompt": "x", "stop": "x" * 101}, 422, "stop"),
        (PLAIN, {"prompt": "x", "stop_token_ids": [1] * 5}, 422, "stop_token_ids"),
        (CHAT, {"messages": [{"role": "user", "content": "x"}] * 9}, 422, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 9}]}, 422, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 1001}] * 2}, 413, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": "x"}], "n": 17}, 422, "n"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_too_much_is_refused_by_name(small: ServedApp, path: str, body: dict[str, Any], status: int, field: str):
    response = post(small, path, **body)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["param"] == field
    assert "--max-" in error["message"]


def test_body_of_unknown_length_is_cut_off_at_the_limit(small: ServedApp):
    def endless() -> Iterator[bytes]:
        yield b'{"prompt": "'
        for _ in range(200):
            yield b"x" * 1000

    response = httpx.post(small.url + PLAIN, content=endless(), headers=JSON, timeout=30, trust_env=False)
    assert response.status_code == 413


def test_long_headers_are_refused_whether_they_come_at_once_or_in_pieces(small: ServedApp):
    response = httpx.get(small.url + "/health", headers={"x": "y" * 5000}, trust_env=False)
    assert response.status_code == 431
    with connect(small) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nx: ")
        connection.sendall(b"y" * 4500)
        assert answer_to(connection).startswith(b"HTTP/1.1 431 ")


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"", None),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nx: y", 408),
        (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{", 408),
        (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n", 408),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", 200),
    ],
    ids=["nothing", "half a head", "half a body", "half a chunked body", "idle afterwards"],
)
def test_slow_client_is_answered_and_put_out(small: ServedApp, sent: bytes, status: int | None):
    with connect(small) as connection:
        connection.sendall(sent)
        began = time.monotonic()
        answer = answer_to(connection)  # until it is closed: the client does nothing for it
        assert time.monotonic() - began < 6
    assert (int(answer.split(b" ")[1]) if answer else None) == status


def test_client_that_trickles_its_headers_is_put_out(small: ServedApp):
    with connect(small) as connection:
        began = time.monotonic()
        with contextlib.suppress(OSError):  # broken pipe, or reset
            while time.monotonic() - began < 6:
                connection.sendall(b"x")
                time.sleep(0.05)
        assert time.monotonic() - began < 6


def test_connections_that_say_nothing_keep_nobody_out(small: ServedApp):
    held = [connect(small) for _ in range(40)]
    try:
        assert httpx.get(small.url + "/health", timeout=5, trust_env=False).status_code == 200
    finally:
        for connection in held:
            connection.close()


def test_full_queue_is_answered_with_503_and_when_to_come_again(small: ServedApp, monkeypatch: pytest.MonkeyPatch):
    loop, submitted = small.app.state.host.loop, []

    def submit(*arguments: Any, **named: Any) -> str:
        if len(submitted) == 2:
            raise QueueFullError("2 requests wait already.", field="max_waiting", remedy="Try again.")
        submitted.append(type(loop).submit(loop, *arguments, **named))
        return submitted[-1]

    monkeypatch.setattr(loop, "submit", submit)
    response = post(small, PLAIN, prompt="hello", n=3, max_tokens=100)
    assert response.status_code == 503
    assert response.headers["retry-after"]
    assert len(submitted) == 2
    monkeypatch.undo()
    wait_until(small.idle)  # those that had been queued were taken back


def test_template_that_does_not_end_is_ended_and_the_core_is_free(small: ServedApp):
    began = time.monotonic()
    response = post(small, CHAT, messages=[{"role": "user", "content": "slow"}])
    assert response.status_code == 422, response.text
    assert "chat template" in response.json()["error"]["message"]
    assert time.monotonic() - began < 6
    assert post(small, CHAT, messages=[{"role": "user", "content": "quick"}], max_tokens=1).status_code == 200
    workers = [p for p in psutil.Process().children() if "engine.server.text_worker" in " ".join(p.cmdline())]
    time.sleep(0.2)
    used = [sum(worker.cpu_times()[:2]) for worker in workers]
    time.sleep(0.5)
    assert [sum(worker.cpu_times()[:2]) for worker in workers] == pytest.approx(used, abs=0.2)


@pytest.mark.parametrize(
    "template",
    [
        "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
        "{% for i in range(99999) %}{{ 'x' * 100 }}{% endfor %}",
        "{{ messages['no'].such.thing }}",
        "{{ raise_exception('never') }}",
        "{{ '' | center(10 ** 12) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% if %}",
    ],
    ids=lambda text: text[:30],
)  # fmt: skip
def test_template_that_wants_too_much_is_refused_and_the_next_text_is_tokenized(tiny_tokenizer: Any, template: str):
    async def run() -> None:
        pool = TextPool(ServerLimits(text_seconds=4, text_memory_mib=1024, text_workers=1))
        tiny_tokenizer.chat_template = template
        try:
            with pytest.raises(RequestError):
                await pool.chat(tiny_tokenizer, [{"role": "user", "content": "x"}])
            assert await pool.encode(tiny_tokenizer, ["a"]) == [[64]]
        finally:
            pool.close()

    in_a_thread(run)


def test_token_ids_are_those_of_the_models_own_tokenizer(tiny_tokenizer: Any):
    messages = [{"role": "user", "content": "Hi 😊 \u00e9"}, {"role": "assistant", "content": "<|end|>"}]

    async def run() -> tuple[list[list[int]], list[int]]:
        pool = TextPool(ServerLimits())
        try:
            return await pool.encode(tiny_tokenizer, ["Hi 😊", "", "\u6f22"]), await pool.chat(tiny_tokenizer, messages)
        finally:
            pool.close()

    texts, chat = in_a_thread(run)
    assert texts == [tiny_tokenizer(text).input_ids for text in ("Hi 😊", "", "\u6f22")]
    filled = tiny_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat == tiny_tokenizer(filled, add_special_tokens=False).input_ids


def test_more_texts_than_may_wait_are_refused_with_503(tiny_tokenizer: Any):
    async def run() -> list[str]:
        pool = TextPool(ServerLimits(text_workers=1, max_waiting_texts=2, text_seconds=1))
        tiny_tokenizer.chat_template = ENDLESS
        try:
            asked = [pool.chat(tiny_tokenizer, [{"role": "user", "content": "x"}]) for _ in range(5)]
            answers = await asyncio.gather(*asked, return_exceptions=True)
            return [type(answer).__name__ for answer in answers]
        finally:
            pool.close()

    outcome = in_a_thread(run)
    assert outcome.count("TextQueueFullError") >= 2
    assert "UnprocessableError" in outcome


@pytest.fixture
def tiny_tokenizer() -> Any:
    from tests.conftest import byte_tokenizer

    return byte_tokenizer()


def in_a_thread(run: Callable[[], Any]) -> Any:
    """Run a coroutine function; another test may have left an event loop in this thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, run()).result()


def test_answers_do_not_wait_for_the_clients_acknowledgement(small: ServedApp):
    taken = []
    with httpx.Client(base_url=small.url, trust_env=False) as client:
        for _ in range(21):
            began = time.perf_counter()
            client.get("/health")
            taken.append(time.perf_counter() - began)
    assert sorted(taken)[10] < 0.03, taken  # 40 ms each if the head and the body of an answer go apart


# -- health under attack -----------------------------------------------------------------------------------


def health_times(served: ServedApp, attack: Callable[[], object], seconds: float = 1.5) -> list[float]:
    """How long health took each time while eight clients attacked."""
    end = time.monotonic() + seconds

    def go_on() -> None:
        while time.monotonic() < end:
            with contextlib.suppress(httpx.HTTPError, OSError):
                attack()

    threads = [threading.Thread(target=go_on, daemon=True) for _ in range(8)]
    taken: list[float] = []
    with httpx.Client(base_url=served.url, trust_env=False, timeout=10) as client:
        client.get("/health")
        for thread in threads:
            thread.start()
        while time.monotonic() < end:
            began = time.perf_counter()
            assert client.get("/health").json()["status"] == "ready"
            taken.append(time.perf_counter() - began)
            time.sleep(0.02)
    for thread in threads:
        thread.join(30)
    return taken


@pytest.fixture(scope="module")
def attacked(looping_model: Path) -> Iterator[ServedApp]:
    """A worker with the limits as they are by default."""
    limits = ServerLimits(text_seconds=2.0, header_seconds=1.0, max_connections=64)
    app = ServedApp(EngineConfig.from_mapping({**KNOBS, "model": str(looping_model)}), limits)
    app.wait_ready()
    yield app
    app.close()


def attack_with(kind: str, served: ServedApp) -> Callable[[], object]:
    """One of the attacks, to be repeated."""
    prompts = {
        "oversized prompts": {"prompt": "the quick brown fox " * 100_000},
        "allowed but huge prompts": {"prompt": "the quick brown fox " * 49_000},
        "token ids": {"prompt": [1] * 900_000},
        "wrong kinds": {"prompt": [[1]] * 200 + [["x"] * 100_000]},
        "many answers": {"prompt": ["hello"] * 2, "n": 128, "max_tokens": 1},
        "too many answers": {"prompt": ["hello"] * 300, "n": 128, "max_tokens": 1},
    }
    if kind in prompts:
        content = json.dumps(prompts[kind]).encode()
        return lambda: httpx.post(served.url + PLAIN, content=content, headers=JSON, timeout=30, trust_env=False)
    if kind == "endless templates":
        return lambda: post(served, CHAT, messages=[{"role": "user", "content": "slow"}])

    def slow() -> None:
        with contextlib.ExitStack() as stack:
            for connection in [stack.enter_context(connect(served)) for _ in range(20)]:
                connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Len")
            time.sleep(0.5)

    return slow


@pytest.mark.parametrize(
    "kind",
    [
        *("oversized prompts", "allowed but huge prompts", "token ids", "wrong kinds", "many answers"),
        *("too many answers", "endless templates", "slow clients"),
    ],
)
def test_health_is_answered_at_once_under_attack(attacked: ServedApp, kind: str, record_property: Any):
    taken = sorted(health_times(attacked, attack_with(kind, attacked)))
    record_property("health_ms", [round(value * 1e3, 1) for value in (taken[len(taken) // 2], taken[-1])])
    print(f"{kind}: {len(taken)} asked, median {taken[len(taken) // 2] * 1e3:.1f} ms, worst {taken[-1] * 1e3:.1f} ms")
    # The promise is 250 ms. Attackers and attacked share the cores of this test, and one Python: hence the rank.
    assert taken[int(0.95 * (len(taken) - 1))] < 0.25, taken
    assert taken[-1] < 1.0, taken
    wait_until(attacked.idle, 60)


# -- the settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", dataclasses.fields(ServerLimits), ids=lambda field: field.name)
def test_every_limit_has_bounds_and_help_and_is_set_by_its_variable(field: Any, monkeypatch: pytest.MonkeyPatch):
    assert field.metadata["help"].endswith(".")
    for wrong in (field.metadata["low"] - 1, field.metadata["high"] + 1, float("nan"), "x", None, True):
        if isinstance(wrong, bool) and isinstance(field.default, float):
            continue
        with pytest.raises(ConfigError) as refused:
            ServerLimits(**{field.name: wrong})
        assert (refused.value.field, bool(refused.value.remedy)) == (field.name, True)
    monkeypatch.setenv(f"HEADROOM_{field.name.upper()}", str(field.metadata["high"]))
    assert getattr(limits_from_environment(), field.name) == field.metadata["high"]
    monkeypatch.setenv(f"HEADROOM_{field.name.upper()}", "many")
    with pytest.raises(ConfigError, match=field.name):
        limits_from_environment()


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (("serve", "--max-choices", "0"), "max_choices"),
        (("serve", "--max-body-bytes", "9" * 30), "max_body_bytes"),
        (("serve", "--drain-seconds", "nan"), "drain_seconds"),
        (("serve", "--header-seconds", "inf"), "header_seconds"),
        (("serve", "--text-workers", "many"), "text_workers"),
        (("serve", "--port", "70000"), "port"),
        (("serve", "--port", "-1"), "port"),
        (("serve", "--parent-pid", "0"), "parent_pid"),
        (("generate", "--prompt", "x", "--seed", "9" * 30), "seed"),
        (("generate", "--prompt", "x", "--top-k", "9" * 30), "top_k"),
        (("generate", "--prompt", "x", "--max-tokens", "9" * 30), "max_tokens"),
        (("generate", "--prompt", "x", "--temperature", "nan"), "temperature"),
        (("bench", "--workload", "x", "--seed", "-1"), "seed"),
        (("bench", "--workload", "x", "--seed", "9" * 30), "seed"),
    ],
)
def test_number_out_of_bounds_on_the_command_line_is_wrong_input(
    arguments: tuple[str, ...], field: str, capsys: pytest.CaptureFixture[str]
):
    assert cli.main([*arguments, "--json"] if arguments[0] != "serve" else arguments) == 2
    captured = capsys.readouterr()
    if arguments[0] == "serve":
        assert captured.err.startswith("error: ")
        assert field.replace("_", "-") in captured.err.replace("_", "-")
    else:
        error = json.loads(captured.out)["error"]
        assert (error["field"], bool(error["remedy"])) == (field, True)


def test_large_bodies_that_come_at_once_are_refused_before_memory_runs_out():
    reader = BodyReader(ServerLimits(max_body_bytes=1024))

    async def read(release: asyncio.Event) -> str:
        async def receive() -> dict[str, Any]:
            if release.is_set():
                return {"type": "http.request", "body": b"}", "more_body": False}
            if sent:
                await release.wait()
                return {"type": "http.request", "body": b"}", "more_body": False}
            sent.append(True)
            return {"type": "http.request", "body": b"{" + b" " * 1000, "more_body": True}

        sent: list[bool] = []
        scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"content-type", b"application/json")]}
        try:
            return str(await reader.document()(Request(scope, receive)))
        except QueueFullError as problem:
            return str(problem.field)

    async def run() -> list[str]:
        release = asyncio.Event()
        tasks = [asyncio.create_task(read(release)) for _ in range(20)]
        await asyncio.sleep(0.1)
        release.set()
        return await asyncio.gather(*tasks)

    answers = in_a_thread(run)
    assert answers.count("{}") == 16
    assert answers.count("body") == 4
    assert in_a_thread(run) == answers  # all that was held has been given back

"""Who may come in: hosts, the API key, other origins; and under which name the model is served."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.server.limits import DoorSettings, allowed_hosts, host_name
from engine.server.run import door_settings
from engine.worker.supervisor import Worker
from tests.server.conftest import TOKEN, ServedApp, wait_until

KEY = "the-key-of-the-tests"
ORIGIN = "https://chat.example.org"


@pytest.fixture(scope="module")
def guarded(tiny_config: EngineConfig) -> Iterator[ServedApp]:
    """A worker with a key, one other origin and names of its own."""
    door = DoorSettings(api_key=KEY, cors_origins=(ORIGIN,), served_names=("small", "tiny"))
    app = ServedApp(tiny_config, door=door)
    app.wait_ready()
    yield app
    app.close()


def ask(served: ServedApp, path: str = "/v1/models", method: str = "GET", **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.request(method, served.url + path, headers=named, timeout=30, trust_env=False)


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil", "[::2]", "", "@", "[", "é"]
)
def test_request_for_another_host_gets_no_answer(served: ServedApp, host: str):
    for path in ("/health", "/metrics", "/v1/models", "/admin/status", "/no-such"):
        response = httpx.get(served.url + path, headers={"Host": host.encode()}, trust_env=False)
        assert response.status_code in (400, 421), path
        assert response.json()["error"]["message"]


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "localhost.", "127.0.0.1:1", "[::1]", "[::1]:8000"])
def test_this_machine_by_its_loopback_names_is_answered(served: ServedApp, host: str):
    assert ask(served, Host=host).status_code == 200


def test_allowed_hosts_are_those_stated_and_a_public_address_is_warned_of():
    warnings: list[str] = []
    assert "gpu-7" in allowed_hosts("127.0.0.1", ["GPU-7:8000"], warnings.append)
    assert "gpu-7" in allowed_hosts("0.0.0.0", ["gpu-7"], warnings.append)
    assert warnings == []
    assert "127.0.0.1" in allowed_hosts("0.0.0.0", [], warnings.append)
    assert "--allowed-host" in warnings[0]
    assert DoorSettings(allowed_hosts=frozenset({"*"})).admits("evil.example")
    assert [host_name(text) for text in ("A.b:80", "[::1]:80", "x.")] == ["a.b", "::1", "x"]
    assert not DoorSettings().admits("[::1].evil.example")


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"hosts": [""]}, "allowed_host"),
        ({"api_key": ""}, "api_key"),
        ({"api_key": " "}, "api_key"),
        ({"api_key": "ké\n"}, "api_key"),
        ({"cors_origins": ["chat.example.org"]}, "cors_origin"),
        ({"served_names": [" "]}, "served_model_name"),
    ],
)
def test_setting_that_would_not_guard_is_refused_by_name(settings: dict[str, Any], field: str):
    with pytest.raises(ConfigError) as refused:
        door_settings("127.0.0.1", **settings)
    assert (refused.value.field, bool(refused.value.remedy)) == (field, True)


def test_api_key_is_asked_for_by_v1_alone(guarded: ServedApp):
    for wrong in ("", "Bearer", "Bearer wrong", f"Basic {KEY}", f"Bearer {KEY}x", "Bearer \u00e9"):
        response = httpx.get(
            guarded.url + "/v1/models", headers={"Authorization": wrong.encode("latin-1")}, trust_env=False
        )
        assert response.status_code == 401, wrong
        assert response.json()["error"]["type"] == "authentication_error"
        assert KEY not in response.text
    assert ask(guarded, Authorization=f"Bearer {KEY}").status_code == 200
    assert ask(guarded, Authorization=f"Bearer {TOKEN}").status_code == 200, "the administrator may use it too"
    assert ask(guarded, "/health").status_code == 200
    assert ask(guarded, "/metrics").status_code == 200
    assert ask(guarded, "/admin/status", Authorization=f"Bearer {KEY}").status_code == 403


def test_other_origins_may_read_v1_only_if_stated(guarded: ServedApp, served: ServedApp):
    asked = {
        "Origin": ORIGIN,
        "Access_Control_Request_Method": "POST",
        "Access_Control_Request_Headers": "authorization",
    }
    allowed = ask(guarded, "/v1/completions", "OPTIONS", **asked)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == ORIGIN
    refusal = ask(guarded, Origin=ORIGIN)
    assert (refusal.status_code, refusal.headers["access-control-allow-origin"]) == (401, ORIGIN)
    for response in (
        ask(guarded, "/v1/completions", "OPTIONS", **{**asked, "Origin": "https://evil.example"}),
        ask(guarded, "/admin/status", "OPTIONS", **asked),
        ask(served, "/v1/completions", "OPTIONS", **asked),
        ask(served, Origin=ORIGIN),
    ):
        assert "access-control-allow-origin" not in response.headers


def test_model_is_served_under_its_names(guarded: ServedApp):
    headers = {"Authorization": f"Bearer {KEY}"}
    cards = ask(guarded, Authorization=headers["Authorization"]).json()["data"]
    assert [card["id"] for card in cards] == ["small", "tiny"]
    for name, status in (("small", 200), ("tiny", 200), (None, 200), ("gpt-5", 404)):
        body = {"prompt": "x", "model": name, "max_tokens": 1}
        response = httpx.post(guarded.url + "/v1/completions", json=body, headers=headers, timeout=30, trust_env=False)
        assert response.status_code == status
        if status == 200:
            assert response.json()["model"] == "small"


@pytest.mark.slow
def test_supervised_worker_has_the_key_but_not_among_its_arguments_nor_do_its_children(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, start_worker: Callable[[Worker], Worker]
):
    monkeypatch.setenv("HEADROOM_API_KEY", KEY)
    monkeypatch.setenv("HEADROOM_MAX_CHOICES", "3")
    worker = start_worker(Worker(str(tiny_llama), EngineConfig.from_mapping({"memory_limit_gib": 0.25})))
    wait_until(lambda: worker.poll().state == "running" and worker.client.health()["status"] == "ready", 90)
    url = worker.client.base_url
    assert httpx.get(url + "/v1/models", trust_env=False).status_code == 401
    assert worker.client.models(), "the dashboard's own token opens it"
    body = {"prompt": "x", "n": 4}
    headers = {"Authorization": f"Bearer {KEY}"}
    assert httpx.post(url + "/v1/completions", json=body, headers=headers, trust_env=False).status_code == 422
    assert worker.pid is not None
    process = psutil.Process(worker.pid)
    children = process.children(recursive=True)
    assert children
    for each in (process, *children):
        assert KEY not in " ".join(each.cmdline())
        assert worker._token not in " ".join(each.cmdline())
    assert all("HEADROOM_API_KEY" not in child.environ() for child in children)


@pytest.fixture
def start_worker() -> Iterator[Callable[[Worker], Worker]]:
    started: list[Worker] = []

    def start(worker: Worker) -> Worker:
        started.append(worker)
        worker.start()
        return worker

    yield start
    for worker in started:
        worker.stop()

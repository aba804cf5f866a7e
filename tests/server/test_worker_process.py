"""The worker as a process of its own: the OpenAI client on the default model, and every way in which it ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from engine.config import EngineConfig
from engine.worker.client import EngineClient, EngineUnreachableError, WorkerError
from engine.worker.supervisor import Worker
from tests.server.conftest import wait_until

pytestmark = pytest.mark.slow

TOKEN = "a-token-for-this-test"
LONG = {"max_tokens": 480, "temperature": 0, "ignore_eos": True}


class Process:
    """A worker started as a person starts it."""

    def __init__(self, folder: Path, *options: str, token: str | None = TOKEN) -> None:
        self.ready_file, self.log = folder / "ready.json", folder / "log"
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        environment.pop("HEADROOM_ADMIN_TOKEN", None)
        if token is not None:
            environment["HEADROOM_ADMIN_TOKEN"] = token
        command = [sys.executable, "-m", "engine", "serve", "--port", "0", "--ready-file", str(self.ready_file)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([*command, *options], env=environment, stdout=log, stderr=log)
        self.token = token

    def client(self) -> EngineClient:
        """A client, as soon as the port is open."""
        wait_until(lambda: self.ready_file.exists() or self.process.poll() is not None, 60)
        assert self.process.poll() is None, self.log.read_text()
        port = json.loads(self.ready_file.read_text())["port"]
        return EngineClient(f"http://127.0.0.1:{port}", self.token or self._shown_token())

    def ready(self) -> EngineClient:
        """A client, as soon as the model is loaded."""
        client = self.client()
        wait_until(lambda: client.health()["status"] == "ready", 60)
        return client

    def _shown_token(self) -> str:
        line = next(line for line in self.log.read_text().splitlines() if line.startswith("admin token: "))
        return line.removeprefix("admin token: ")

    def end(self) -> None:
        """Kill it if it is still there."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def started(folder: Path, *options: str, **arguments: Any) -> Iterator[Process]:
    process = Process(folder, *options, **arguments)
    try:
        yield process
    finally:
        process.end()


@pytest.fixture
def tiny_options(tiny_llama: Path) -> tuple[str, ...]:
    return ("--model", str(tiny_llama), "--set", "dtype=float32", "--set", "memory_limit_gib=0.25")


@pytest.mark.model
def test_openai_client_talks_to_the_default_model(tmp_path: Path, default_gguf: Path):
    with started(tmp_path, "--model", "smollm2-135m") as worker:
        url = worker.ready().base_url
        client = openai.OpenAI(base_url=url + "/v1", api_key="unused", http_client=httpx.Client(trust_env=False))
        (model,) = [card.id for card in client.models.list()]
        assert model == "smollm2-135m"
        asked: Any = {"model": model, "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
        whole = client.completions.create(**asked)
        assert "Paris" in whole.choices[0].text
        chunks = list(client.completions.create(**asked, stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
        ask: Any = {
            "model": model,
            "messages": [{"role": "user", "content": "Name the capital of Italy. Answer in one short sentence."}],
            "max_completion_tokens": 40,
            "temperature": 0,
        }
        chat = client.chat.completions.create(**ask)
        assert "Rome" in (chat.choices[0].message.content or "")
        assert chat.choices[0].finish_reason == "stop"
        stream = client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True})
        parts = list(stream)
        text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
        assert text == chat.choices[0].message.content
        counts = [(answer.usage.prompt_tokens, answer.usage.completion_tokens) for answer in (parts[-1], chat)]
        assert counts[0] == counts[1]


def test_sigterm_answers_what_is_in_flight_and_ends_with_exit_code_0(tmp_path: Path, tiny_options: tuple[str, ...]):
    with started(tmp_path, *tiny_options, "--set", "attention=reference", "--drain-seconds", "0") as worker:
        client = worker.ready()
        chunks = client.stream_chat([{"role": "user", "content": "hello"}], **LONG)
        next(chunks)
        worker.process.send_signal(signal.SIGTERM)
        with pytest.raises(WorkerError, match="shut down"):
            list(chunks)
        assert worker.process.wait(10) == 0, worker.log.read_text()
        assert not worker.ready_file.exists()
        with pytest.raises(EngineUnreachableError):
            client.health()


def test_sigterm_while_a_model_loads_ends_it_at_once(tmp_path: Path, tiny_options: tuple[str, ...]):
    with started(tmp_path, *tiny_options) as worker:
        worker.client()
        worker.process.send_signal(signal.SIGTERM)
        assert worker.process.wait(10) == 0, worker.log.read_text()


def test_token_is_made_up_and_shown_where_none_is_given(tmp_path: Path, tiny_options: tuple[str, ...]):
    with started(tmp_path, *tiny_options, token=None) as worker:
        client = worker.client()
        assert client.status()["worker"]["pid"] == worker.process.pid
        with pytest.raises(WorkerError) as refused:
            EngineClient(client.base_url, "another").status()
        assert refused.value.status_code == 403
        client.shutdown()
        assert worker.process.wait(10) == 0


def test_taken_port_and_unwritable_ready_file_are_wrong_input(tmp_path: Path, tiny_options: tuple[str, ...]):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with started(tmp_path, *tiny_options, "--port", port) as worker:
            assert worker.process.wait(60) == 2
            assert "Choose another port" in worker.log.read_text()
    with started(tmp_path, *tiny_options, "--ready-file", str(tmp_path / "no-such" / "file")) as worker:
        assert worker.process.wait(60) == 2
        assert "cannot be written" in worker.log.read_text()


def test_home_that_cannot_be_written_does_not_keep_the_worker_from_starting(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "home").write_text("a file where a folder should be")
    monkeypatch.setenv("HEADROOM_HOME", str(tmp_path / "home"))
    worker = Worker(str(tiny_llama), EngineConfig.from_mapping({"dtype": "float32", "memory_limit_gib": 0.25}))
    worker.start()
    try:
        wait_until(lambda: worker.poll().state != "starting", 60)
        assert worker.poll().state == "running", worker.poll().log
        wait_until(lambda: worker.client.health()["status"] != "loading", 60)
        assert worker.client.health()["status"] == "ready"
    finally:
        worker.stop()
    assert worker.poll().exit_code == 0

"""Fixtures of the page tests: the dashboard's services over a fake engine and a real store in a temporary folder."""

from __future__ import annotations

import time

import pytest

from pages import services as services_module
from pages.services import Services
from storage import open_store
from tests.pages.engine_fakes import FakeClient, FakeWorker


@pytest.fixture
def client():
    return FakeClient(token_s=0.002)


@pytest.fixture
def worker(client):
    return FakeWorker(client)


@pytest.fixture
def store(tmp_path):
    opened = open_store(f"sqlite:///{tmp_path}/runs.db")
    yield opened
    opened.close()


@pytest.fixture
def services(client, worker, store, monkeypatch):
    made = Services(worker, lambda: client, lambda: store, "fake-135m")
    monkeypatch.setattr(services_module, "_services", made)
    return made


@pytest.fixture
def wait_until():
    def wait(condition, timeout_s=10.0):
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, "it did not happen in time"
            time.sleep(0.02)

    return wait

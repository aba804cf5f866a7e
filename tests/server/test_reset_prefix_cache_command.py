"""``headroom reset-prefix-cache`` on a running worker."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engine.cli.app import main
from tests.server.conftest import TOKEN


def test_prefix_cache_of_a_running_worker_is_reset_from_the_command_line(
    capfd: pytest.CaptureFixture[str], served: Any, monkeypatch: pytest.MonkeyPatch
):
    served.client.complete(list(range(40)), max_tokens=2, temperature=0)
    monkeypatch.setenv("HEADROOM_ADMIN_TOKEN", TOKEN)
    capfd.readouterr()
    assert main(["reset-prefix-cache", "--url", served.url, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["blocks"] >= 10
    monkeypatch.setenv("HEADROOM_ADMIN_TOKEN", "wrong")
    assert main(["reset-prefix-cache", "--url", served.url]) == 2

"""Which hosts and origins reach the dashboard, and what its pages may load: by raw sockets against the real server."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from engine.errors import ConfigError
from pages.door import allowed_hosts, host_is_allowed

ROOT = Path(__file__).parents[2]
UPGRADE = (
    "Connection: Upgrade",
    "Upgrade: websocket",
    "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    "Sec-WebSocket-Protocol: streamlit",
)
FOREIGN_HOSTS = (
    "evil.example",
    "evil.example:{port}",
    "localhost.evil.example:{port}",
    "127.0.0.1.evil.example",
    "127.0.0.1:{port}@evil.example",
    "evil.example#127.0.0.1",
    "0.0.0.0:{port}",
    "gpu.example.com.evil.example",
    "",
)
OWN_HOSTS = ("127.0.0.1:{port}", "localhost:{port}", "LOCALHOST", "[::1]:{port}", "gpu.example.com", "a.lab.example")


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    """The port of a dashboard, started as plain ``streamlit run app.py`` does it; its worker finds no model."""
    home = tmp_path_factory.mktemp("home")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    names = {"HEADROOM_ALLOWED_HOSTS": "gpu.example.com, *.lab.example", "HEADROOM_MODEL": str(home / "none")}
    environment = {**os.environ, **names, "HEADROOM_HOME": str(home)}
    command = [sys.executable, "-m", "streamlit", "run", "app.py", "--server.port", str(free)]
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    try:
        end = time.monotonic() + 60
        while not reachable(free):
            assert process.poll() is None, (home / "log").read_text()
            assert time.monotonic() < end
            time.sleep(0.1)
        yield free
    finally:
        children = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        _, alive = psutil.wait_procs([psutil.Process(process.pid), *children], timeout=15)
        for left in alive:
            left.kill()


def reachable(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def ask(port, path, *headers, method="GET"):
    """Status and headers of the answer to a request written by hand."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as link:
        lines = [f"{method} {path} HTTP/1.1", *headers]
        link.sendall(("\r\n".join(lines) + "\r\n\r\n").format(port=port).encode())
        answer = b""
        while b"\r\n\r\n" not in answer:
            part = link.recv(65536)
            if not part:
                break
            answer += part
    head, _, _ = answer.decode("latin-1").partition("\r\n\r\n")
    first, *rest = head.split("\r\n")
    return int(first.split()[1]), {name.lower(): value for name, _, value in (line.partition(": ") for line in rest)}


@pytest.mark.parametrize("host", FOREIGN_HOSTS)
def test_a_foreign_host_gets_neither_pages_nor_the_websocket(port, host):
    for path in ("/", "/_stcore/health", "/_stcore/host-config", "/static/js/index.js", "/media/x"):
        assert 400 <= ask(port, path, f"Host: {host}")[0] < 500
    assert 400 <= ask(port, "/_stcore/stream", f"Host: {host}", *UPGRADE)[0] < 500


@pytest.mark.parametrize("host", OWN_HOSTS)
def test_the_own_names_and_those_of_the_variable_are_let_in(port, host):
    assert ask(port, "/_stcore/health", f"Host: {host}")[0] == 200
    assert ask(port, "/_stcore/stream", f"Host: {host}", *UPGRADE)[0] == 101
    assert ask(port, "/_stcore/stream", f"Host: {host}", f"Origin: http://{host}", *UPGRADE)[0] == 101


@pytest.mark.parametrize("hosts", [(), ("Host: 127.0.0.1", "Host: evil.example")])
def test_a_request_without_one_host_is_refused(port, hosts):
    assert 400 <= ask(port, "/", *hosts)[0] < 500
    assert 400 <= ask(port, "/_stcore/stream", *hosts, *UPGRADE)[0] < 500


@pytest.mark.parametrize("origin", ["http://evil.example", "http://localhost:3000", "null", "file://", "https://"])
def test_a_page_of_another_origin_gets_no_websocket_and_no_upload(port, origin):
    headers = ("Host: 127.0.0.1:{port}", f"Origin: {origin}")
    assert ask(port, "/_stcore/stream", *headers, *UPGRADE)[0] == 403
    assert ask(port, "/_stcore/upload_file/a/b", *headers, "Content-Length: 0", method="PUT")[0] == 403


@pytest.mark.parametrize("path", ["/", "/live", "/_stcore/health", "/static/nothing.js"])
def test_no_answer_may_be_framed_or_load_images_from_elsewhere(port, path):
    _, headers = ask(port, path, "Host: 127.0.0.1:{port}")
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy["frame-ancestors"] == "'none'"
    assert headers["x-frame-options"] == "DENY"
    assert policy["img-src"] == "'self' data: blob:"
    assert policy["default-src"] == "'self'"


def test_the_dashboard_listens_on_loopback_only(port):
    listening = [item.laddr.ip for item in psutil.net_connections("tcp") if item.laddr and item.laddr.port == port]
    assert set(listening) == {"127.0.0.1"}


def test_a_wildcard_address_lets_nobody_in_by_itself():
    for address in ("0.0.0.0", "::", "", None):
        assert allowed_hosts(address, None) == {"localhost", "127.0.0.1", "::1"}


@pytest.mark.parametrize("text", ["https://gpu.example.com", "gpu.example.com/path", "a b:c", "user@host", "host:port"])
def test_a_wrong_name_in_the_variable_is_said_at_the_start(text):
    with pytest.raises(ConfigError) as refused:
        allowed_hosts(None, text)
    assert refused.value.field == "HEADROOM_ALLOWED_HOSTS"


@pytest.mark.parametrize(
    ("variable", "value"), [("HEADROOM_ALLOWED_HOSTS", "https://gpu.example.com"), ("HEADROOM_LOG_LEVEL", "loud")]
)
def test_a_wrong_variable_ends_the_dashboard_before_it_starts_a_worker(tmp_path, variable, value):
    names = {variable: value, "HEADROOM_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "streamlit", "run", "app.py", "--server.port", "0"]
    ended = subprocess.run(command, cwd=ROOT, env={**os.environ, **names}, capture_output=True, text=True, timeout=120)
    assert ended.returncode != 0
    assert variable in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "logs").exists()


def test_a_wildcard_name_stands_for_the_names_below_it_only():
    allowed = allowed_hosts(None, "*.lab.example")
    assert host_is_allowed("a.b.lab.example:80", allowed)
    assert not host_is_allowed("lab.example", allowed)
    assert not host_is_allowed("evillab.example", allowed)
    assert host_is_allowed("anything.example", allowed_hosts(None, "*"))

"""What is recorded about versions, machine and code."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

import pytest

from engine.measure import provenance


def test_versions_name_headroom_python_and_torch():
    import torch

    found = provenance.versions()
    assert found["torch"] == torch.__version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["headroom"]


def test_hardware_is_json_and_does_not_reveal_the_name_of_the_host():
    found = provenance.hardware()
    assert found["memory_bytes"] > 2**28
    assert found["cores_usable"] >= 1
    assert found["cpu"]
    assert len(found["host_hash"]) == 12
    if len(socket.gethostname()) > 3:
        assert socket.gethostname() not in json.dumps(found)


def test_the_revision_is_the_checkouts_and_knows_whether_it_is_dirty(tmp_path, monkeypatch):
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        done = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init", "--quiet")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "--quiet", "-m", "one")
    monkeypatch.setattr(provenance, "_ROOT", tmp_path.resolve())
    revision = provenance.code_revision.__wrapped__
    assert revision() == (git("rev-parse", "HEAD"), False)
    (tmp_path / "file").write_text("2")
    assert revision() == (git("rev-parse", "HEAD"), True)
    # a copy inside somebody else's repository is not that repository's revision
    (tmp_path / "copy").mkdir()
    monkeypatch.setattr(provenance, "_ROOT", (tmp_path / "copy").resolve())
    assert revision() == ("", None)


@pytest.mark.parametrize("error", [FileNotFoundError("git"), subprocess.TimeoutExpired("git", 5)])
def test_without_git_there_is_no_revision_and_no_error(monkeypatch, error):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(subprocess, "run", fail)
    assert provenance.code_revision.__wrapped__() == ("", None)


def test_reading_records_needs_neither_torch_nor_scipy():
    code = (
        "import sys; import engine.measure, engine.measure.results; from engine.measure import METRICS, WORKLOADS;"
        "print([m for m in ('torch', 'scipy', 'transformers', 'streamlit', 'sqlalchemy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

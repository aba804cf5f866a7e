"""Where a run goes that cannot be recorded: a file of this user's, so that a measurement is never lost."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from engine.paths import private_dir, unsaved_dir
from kernels.trust import PRIVATE_FILE


def keep_document(document: Mapping[str, Any]) -> Path | None:
    """Write a run's document as a JSON file of mode 0600 under HEADROOM_HOME/unsaved.

    Where that is not possible it goes into a new folder of this user's in the one for temporary files; never into the
    current folder, which may be anybody's. The file appears only when it is complete.

    Returns:
        Where it is; None if neither place takes it.
    """
    text = json.dumps(document)
    name = re.sub(r"[^0-9A-Za-z_-]", "_", str(document.get("run_id", "")))[:64] or "run"
    for folder in _folders():
        target = folder / f"headroom-run-{name}.json"
        handle, partial = -1, None
        try:
            handle, partial = tempfile.mkstemp(dir=folder, prefix=f".headroom-run-{name}.")
            os.fchmod(handle, PRIVATE_FILE)
            with os.fdopen(handle, "w", encoding="ascii") as stream:
                stream.write(text)
            os.replace(partial, target)
        except OSError:
            with contextlib.suppress(OSError):
                if partial is not None:
                    os.unlink(partial)
        else:
            return target
    return None


def kept_message(path: Path) -> str:
    """Where a run was kept and what to do with it, in a sentence."""
    return f"The run was kept in {path}; afterwards: headroom history record < {path}"


def _folders() -> Iterator[Path]:
    with contextlib.suppress(OSError):
        yield private_dir(unsaved_dir())
    with contextlib.suppress(OSError):
        # On a full disk tempfile would choose the current folder rather than none
        if Path(tempfile.gettempdir()).resolve() != Path.cwd().resolve():
            yield Path(tempfile.mkdtemp(prefix="headroom-unsaved-"))

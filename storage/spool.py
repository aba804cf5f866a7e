"""Where a run goes that the database would not take: a file, so that a measurement is never lost."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from pathlib import Path

from engine.measure.results import RunResult, to_json
from engine.paths import headroom_home


def keep(result: RunResult) -> Path | None:
    """Write the run as a JSON file under HEADROOM_HOME/unsaved, or where that is not possible in the folder for
    temporary files; None if neither takes it. The file appears only when it is complete."""
    text = json.dumps(to_json(result))
    name = re.sub(r"[^0-9A-Za-z_-]", "_", result.run_id)[:64] or "run"
    for folder in (headroom_home() / "unsaved", Path(tempfile.gettempdir())):
        target = folder / f"headroom-run-{name}.json"
        partial = folder / f".headroom-run-{name}.{os.getpid()}.partial"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            partial.write_text(text, encoding="ascii")
            partial.replace(target)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
        else:
            return target
    return None

"""Where Headroom keeps what it downloads, converts and records."""

from __future__ import annotations

import os
from pathlib import Path


def headroom_home() -> Path:
    """Root of everything Headroom stores: the environment variable HEADROOM_HOME, default ``~/.cache/headroom``.

    Read from the environment at each call, so that a test or a second dashboard can have a home of its own. The
    folder is not created here.
    """
    return Path(os.environ.get("HEADROOM_HOME") or "~/.cache/headroom").expanduser()


def downloads_dir() -> Path:
    """Files as fetched, kept so that a repeated or interrupted fetch does not start over."""
    return headroom_home() / "downloads"


def models_dir() -> Path:
    """One folder per model fetched by name."""
    return headroom_home() / "models"


def cache_dir() -> Path:
    """Derived data that may be deleted at any time: converted tokenizers, checksums."""
    return headroom_home() / "cache"

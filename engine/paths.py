"""Where Headroom keeps what it downloads, converts and records: for this user alone (see :mod:`kernels.trust`)."""

from __future__ import annotations

from pathlib import Path

from kernels import trust


def headroom_home() -> Path:
    """Root of everything Headroom stores: the environment variable HEADROOM_HOME, default ``~/.cache/headroom``.

    Read from the environment at each call, so that a test or a second dashboard can have a home of its own. The
    folder is not created here.
    """
    return trust.home()


def downloads_dir() -> Path:
    """Files as fetched, kept so that a repeated or interrupted fetch does not start over."""
    return headroom_home() / "downloads"


def models_dir() -> Path:
    """One folder per model fetched by name."""
    return headroom_home() / "models"


def cache_dir() -> Path:
    """Derived data that may be deleted at any time: converted tokenizers, checksums."""
    return headroom_home() / "cache"


def unsaved_dir() -> Path:
    """Runs that a database would not take."""
    return headroom_home() / "unsaved"


def private_dir(folder: Path) -> Path:
    """Make a folder with mode 0700, tighten what is between it and HEADROOM_HOME; returns it.

    Raises:
        OSError: if it cannot be made.
    """
    return trust.private_dir(folder, headroom_home())

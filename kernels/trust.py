"""Folders and files of this user alone: made so, and checked before code that lies in them is loaded.

Whoever can write to a shared library, or replace a folder above it, runs code as whoever loads it. So compiled code
is loaded only from where nobody else can write, as ssh (StrictModes) uses only such keys. Modes are set whatever the
umask is.
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import stat
from pathlib import Path

PRIVATE_FOLDER, PRIVATE_FILE = 0o700, 0o600
_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def home() -> Path:
    """HEADROOM_HOME; see :func:`engine.paths.headroom_home`."""
    return Path(os.environ.get("HEADROOM_HOME") or "~/.cache/headroom").expanduser()


def private_dir(folder: Path, home: Path) -> Path:
    """Make a folder (with what is missing above it) with mode 0700, and return it.

    Args:
        folder: may be there already.
        home: it and the folders between it and ``folder`` lose what permissions others have, where they were there
            before and are this user's. A folder outside of it is the user's own choice and stays as it is.

    Raises:
        OSError: if it cannot be made.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(mode=PRIVATE_FOLDER, exist_ok=True)  # another process may have been quicker
        path.chmod(PRIVATE_FOLDER)  # the umask may have taken more away
    for path in (folder, *folder.parents):
        if path.is_relative_to(home):
            tighten(path)
    if not folder.is_dir():
        raise NotADirectoryError(20, "is not a folder", str(folder))
    return folder


def private_file(file: Path) -> Path:
    """Make an empty file with mode 0600 if there is none, tighten one that is this user's; returns its path.

    Raises:
        OSError: if it cannot be made.
    """
    try:
        descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, PRIVATE_FILE)
    except FileExistsError:
        tighten(file)
        return file
    os.fchmod(descriptor, PRIVATE_FILE)  # the umask may have taken more away
    os.close(descriptor)
    return file


def tighten(path: Path) -> None:
    """Take every permission from others on what is this user's own, if it is there: no link, no shared folder like
    /tmp, not the home directory."""
    with contextlib.suppress(OSError):  # not there, or a file system without modes: its mount options decide
        found = path.lstat()
        kept = stat.S_ISLNK(found.st_mode) or found.st_mode & stat.S_ISVTX or path in (Path.home(), Path("/"))
        if found.st_uid == os.geteuid() and not kept and found.st_mode & _OTHERS:
            path.chmod(stat.S_IMODE(found.st_mode) & ~_OTHERS)


def why_not_trusted(path: Path) -> str | None:
    """None if ``path`` and every folder above it belong to this user or root and nobody else can write to them.

    A folder with the sticky bit (/tmp) may stand above: others cannot replace what is in it. Write permission for a
    group of which this user is the only member is nobody else's.

    Returns:
        Else a sentence that names the path at fault and the remedy.
    """
    place = path.resolve()
    for step in (place, *place.parents):
        try:
            found = step.stat()
        except OSError as error:
            return f"{step} cannot be looked at ({error.strerror})."
        if found.st_uid not in (0, os.geteuid()):
            return f"{step} belongs to another user (id {found.st_uid}): point HEADROOM_HOME at a folder of your own."
        shared = step != place and found.st_mode & stat.S_ISVTX
        if found.st_mode & _OTHERS_WRITE and not shared and not _is_own_group(found):
            mode = f"{stat.S_IMODE(found.st_mode):o}"
            return f"{step} can be written by others (mode {mode}), so code in it is not loaded: chmod go-w it."
    return None


def _is_own_group(found: os.stat_result) -> bool:
    """True if only a user's private group may write, as many systems give it to every file."""
    if found.st_mode & stat.S_IWOTH or found.st_gid != os.getegid():
        return False
    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(found.st_gid)
    except KeyError:  # no such user or group is known here, so neither is who else is in it
        return False
    return group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}

"""Which process is running a run, so that only the runs of dead dashboards are declared failed."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import platform

import psutil

# The start time of a process is computed from the boot time, which clock corrections move by a little.
_CLOCK_TOLERANCE_S = 10.0


@dataclasses.dataclass(frozen=True, slots=True)
class Owner:
    """A process: host (hashed), process id and start time, which together are never reused."""

    host: str
    pid: int
    started_unix_s: float

    def is_alive(self) -> bool | None:
        """Whether the process still runs; None if it runs on another host and cannot be looked at from here."""
        if self.host != _host():
            return None
        try:
            started = psutil.Process(self.pid).create_time()
        except psutil.NoSuchProcess:
            return False
        return abs(started - self.started_unix_s) < _CLOCK_TOLERANCE_S


def this_process() -> Owner:
    """The owner that this process is."""
    return Owner(_host(), os.getpid(), psutil.Process().create_time())


def _host() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:16]

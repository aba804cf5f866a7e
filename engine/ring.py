"""A bounded, numbered log that one thread writes and others read."""

from __future__ import annotations

import threading
from collections import deque
from typing import Protocol, TypeVar


class _Numbered(Protocol):
    @property
    def index(self) -> int: ...


T = TypeVar("T", bound=_Numbered)


class Ring(deque[T]):
    """The last ``maxlen`` entries, each with an ``index`` that grows; safe to read from other threads."""

    def __init__(self, maxlen: int) -> None:
        super().__init__(maxlen=maxlen)
        self._lock = threading.Lock()

    def append(self, entry: T) -> None:
        """Add the newest entry; the oldest is dropped once the ring is full."""
        with self._lock:
            super().append(entry)

    @property
    def last_index(self) -> int:
        """Number of the newest entry, -1 if there is none."""
        with self._lock:
            return self[-1].index if self else -1

    def since(self, index: int) -> list[T]:
        """Entries numbered ``index`` or later, oldest first."""
        newer: list[T] = []
        with self._lock:
            for entry in reversed(self):
                if entry.index < index:
                    break
                newer.append(entry)
        newer.reverse()
        return newer

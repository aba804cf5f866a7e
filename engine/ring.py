"""Bounded, numbered logs that one thread writes and others read."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any, Protocol, TypeVar

from engine.outputs import EngineEvent

EVENTS_KEPT = 1024


class _Numbered(Protocol):
    @property
    def index(self) -> int: ...


T = TypeVar("T", bound=_Numbered)


class Ring(deque[T]):
    """The last ``maxlen`` entries, each with an ``index`` that grows.

    :attr:`last_index` and :meth:`since` may be used from any thread; all else is the writer's alone.
    """

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


class EventLog(Ring[EngineEvent]):
    """The last events of an engine: what charts mark."""

    def __init__(self) -> None:
        super().__init__(EVENTS_KEPT)
        self._next_index = 0

    def add(self, kind: str, summary: str, detail: dict[str, Any]) -> None:
        """Write down what has just happened; see :class:`engine.outputs.EngineEvent`."""
        self.append(EngineEvent(self._next_index, time.time(), kind, summary, detail))
        self._next_index += 1

"""Which requests were served when: a measured run must not pass for one that had the engine to itself."""

from __future__ import annotations

import collections
import itertools
import threading
import time

_KEPT = 65_536


class Traffic:
    """The times of requests from outside, now and lately. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._begun: dict[int, float] = {}
        self._ended: collections.deque[tuple[float, float]] = collections.deque(maxlen=_KEPT)

    def begin(self) -> int:
        """A request is about to be served; its number, for :meth:`end`."""
        with self._lock:
            number = next(self._numbers)
            self._begun[number] = time.time()
            return number

    def end(self, number: int) -> None:
        """It is over. Numbers that are not known (any more) are ignored."""
        with self._lock:
            begun = self._begun.pop(number, None)
            if begun is not None:
                self._ended.append((begun, time.time()))

    def during(self, start: float, end: float) -> list[float]:
        """When each request that was served between two moments began, Unix seconds, the earliest first."""
        with self._lock:
            spans = [*self._ended, *((begun, end) for begun in self._begun.values())]
        return sorted(begun for begun, ended in spans if begun <= end and ended >= start)

"""One reading of the telemetry every half second, kept for as long as the longest chart looks back."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import threading
import time
from typing import Any

from engine.errors import ConfigError
from engine.ring import Ring
from engine.telemetry.readings import Sample, Telemetry

logger = logging.getLogger(__name__)

INTERVAL_VARIABLE = "HEADROOM_TELEMETRY_INTERVAL_S"
DEFAULT_INTERVAL_S = 0.5
SHORTEST_INTERVAL_S, LONGEST_INTERVAL_S = 0.05, 60.0
_KEPT_S = 900.0
_MOST_KEPT = 7200


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """A sample in the ring: its running number and when it was taken, ``time.perf_counter()`` seconds."""

    index: int
    perf_s: float
    sample: Sample

    def to_dict(self) -> dict[str, Any]:
        """As ``GET /admin/telemetry`` gives it."""
        return {"index": self.index, **self.sample}


class TelemetrySampler:
    """Takes samples in a thread of its own and keeps those of the last quarter of an hour. Thread-safe.

    Args:
        interval_s: seconds between two samples, 0.05 to 60.
        telemetry: what to sample; one of its own if not given.

    Raises:
        ConfigError: if the interval is outside of its bounds.
    """

    def __init__(self, interval_s: float = DEFAULT_INTERVAL_S, telemetry: Telemetry | None = None) -> None:
        if not SHORTEST_INTERVAL_S <= interval_s <= LONGEST_INTERVAL_S:
            raise ConfigError(
                f"{interval_s:g} s is not an interval to sample at.",
                field=INTERVAL_VARIABLE,
                remedy=f"Give {SHORTEST_INTERVAL_S:g} to {LONGEST_INTERVAL_S:g} seconds.",
            )
        self.interval_s = interval_s
        self._telemetry = telemetry or Telemetry()
        self._ring: Ring[Entry] = Ring(min(_MOST_KEPT, math.ceil(_KEPT_S / interval_s)))
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="telemetry", daemon=True)

    @property
    def engine_gpu(self) -> str | None:
        """Which GPU the engine's model is on; see :attr:`engine.telemetry.readings.Telemetry.engine_gpu`."""
        return self._telemetry.engine_gpu

    @engine_gpu.setter
    def engine_gpu(self, uuid: str | None) -> None:
        self._telemetry.engine_gpu = uuid

    def start(self) -> None:
        """Begin sampling."""
        self._thread.start()

    def close(self) -> None:
        """End sampling and release the management library; what was sampled stays."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(timeout=10)
        with self._lock:
            self._telemetry.close()

    def take(self) -> Entry:
        """A sample of this moment, which also goes into the ring."""
        with self._lock:
            entry = Entry(self._ring.last_index + 1, time.perf_counter(), self._telemetry.sample())
            self._ring.append(entry)
            return entry

    def latest(self) -> Entry:
        """The newest sample; taken now if there is none yet."""
        entries = self.since(self.last_index)
        return entries[-1] if entries else self.take()

    def since(self, index: int) -> list[Entry]:
        """Samples numbered ``index`` or later that are still kept, oldest first."""
        return self._ring.since(index)

    @property
    def last_index(self) -> int:
        """Number of the newest sample, -1 if there is none."""
        return self._ring.last_index

    def _run(self) -> None:
        failing = False
        while not self._stop.is_set():
            try:
                self.take()
                failing = False
            except Exception:  # a reading must never be the end of the readings; said once, not twice a second
                if not failing:
                    logger.exception("the telemetry could not be read")
                failing = True
            self._stop.wait(self.interval_s)


def interval_from_environment() -> float:
    """Seconds between two samples, from ``HEADROOM_TELEMETRY_INTERVAL_S``.

    Raises:
        ConfigError: if it is not a number (a number outside of the bounds is refused by :class:`TelemetrySampler`).
    """
    text = os.environ.get(INTERVAL_VARIABLE, "").strip()
    if not text:
        return DEFAULT_INTERVAL_S
    try:
        return float(text)
    except ValueError:
        remedy = f"Give {SHORTEST_INTERVAL_S:g} to {LONGEST_INTERVAL_S:g} seconds, or leave it out."
        raise ConfigError(f"{text!r} is not a number.", field=INTERVAL_VARIABLE, remedy=remedy) from None

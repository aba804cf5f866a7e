"""What became of an attack: one tally a class, the table, and whether everything held."""

from __future__ import annotations

import collections
import dataclasses
import threading
from typing import Any, Literal

Verdict = Literal["refused", "served", "failed", "lost"]
EXAMPLES_KEPT = 40
TRACEBACK = "Traceback (most recent call last)"


@dataclasses.dataclass
class Tally:
    """One class of attack.

    Attributes:
        name, unit: what is tried.
        demanded: how many kinds have to be tried.
        refused: answered with an error that is the sender's to mend, in the form that was promised.
        served: answered as any other request; also right where the odd thing is allowed.
        failed: a crash, a 500, a traceback, a wrong answer; lost: no answer and no clean end.
        health_ms: the slowest answer of ``/health`` meanwhile; None where no worker is attacked.
        canaries: good requests beside the attack, answered as always; those that were not count as failed or lost.
        examples: what failed and what was lost, with the reason, as many as are kept.
    """

    name: str
    unit: str
    demanded: int
    refused: int = 0
    served: int = 0
    failed: int = 0
    lost: int = 0
    deaths: int = 0
    tracebacks: int = 0
    health_ms: float | None = None
    seconds: float = 0.0
    canaries: int = 0
    examples: list[str] = dataclasses.field(default_factory=list)
    kinds: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    _lock: Any = dataclasses.field(default_factory=threading.Lock, repr=False)

    @property
    def tried(self) -> int:
        """Everything that was sent."""
        return self.refused + self.served + self.failed + self.lost

    def add(self, verdict: Verdict, what: str, reason: str = "") -> None:
        """Count one attempt; thread-safe."""
        with self._lock:
            setattr(self, verdict, getattr(self, verdict) + 1)
            if verdict in ("failed", "lost"):
                self.kinds[reason.partition("\n")[0][:90]] += 1
                if len(self.examples) < EXAMPLES_KEPT:
                    self.examples.append(f"{verdict}: {what[:200]}: {reason[:600]}")

    def read_log(self, text: str) -> None:
        """Count the tracebacks in a process's log, by the error that each ends with and the place it was raised at."""
        place, inside = "", False
        for line in text.splitlines():
            if TRACEBACK in line:
                self.tracebacks += 1
                place, inside = "", True
            elif inside and line.lstrip().startswith("File "):
                place = line.strip()
            elif inside and line and line[0] not in " |+" and "Error" in line.partition(":")[0]:
                self.kinds[f"traceback: {line[:90]}"] += 1
                if len(self.examples) < EXAMPLES_KEPT:
                    self.examples.append(f"traceback: {line[:300]} ({place[-160:]})")
                inside = False

    def died(self, what: str, reason: str) -> None:
        """Count the end of an engine that nobody asked to end."""
        self.deaths += 1
        self.add("failed", what, reason)

    def holds(self, health_limit_ms: float) -> list[str]:
        """Why the class does not hold, in words; empty if it does."""
        faults = {
            f"{self.tried} of {self.demanded} tried": self.tried < self.demanded,
            f"{self.failed} failed": self.failed > 0,
            f"{self.lost} lost": self.lost > 0,
            f"{self.deaths} engine deaths": self.deaths > 0,
            f"{self.tracebacks} tracebacks": self.tracebacks > 0,
            f"/health took {self.health_ms or 0:.0f} ms": (self.health_ms or 0) > health_limit_ms,
        }
        return [text for text, fault in faults.items() if fault]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name[0] != "_"}
        return fields | {"tried": self.tried, "kinds": dict(self.kinds.most_common(20))}


def markdown(tallies: list[Tally], health_limit_ms: float) -> str:
    """The table, and below it what failed."""
    lines = [
        "| class | demanded | tried | refused properly | served | failed | lost | engine deaths | tracebacks "
        "| slowest /health, ms | s | |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for tally in tallies:
        faults = tally.holds(health_limit_ms)
        cells = [tally.demanded, tally.tried, tally.refused, tally.served, tally.failed, tally.lost, tally.deaths]
        cells += [tally.tracebacks, "" if tally.health_ms is None else f"{tally.health_ms:.0f}", f"{tally.seconds:.0f}"]
        verdict = "holds" if not faults else "; ".join(faults)
        lines.append(f"| {tally.name} ({tally.unit}) | {' | '.join(map(str, cells))} | {verdict} |")
    for tally in tallies:
        lines += [f"\n{tally.name}: {count} × {reason}" for reason, count in tally.kinds.most_common(10)]
    return "\n".join(lines)

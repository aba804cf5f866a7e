"""A recorded run's energy in words: what was measured and how, or why it was not."""

from __future__ import annotations

from engine.measure.energy import METRIC_NAMES
from engine.measure.results import RunResult
from pages.shared.text import plain

#: The metrics that belong together under this heading, in the order of a table.
ENERGY_METRICS = METRIC_NAMES
PER_TOKEN = "energy_per_output_token_j"


def has_energy(run: RunResult) -> bool:
    """True if the energy of its GPU was measured."""
    return run.metrics.get("energy_j") is not None


def energy_text(run: RunResult) -> str:
    """A sentence, as Markdown: energy, how it was measured, idle power, what held clocks back; or why there is none."""
    found = next((event.summary for event in run.events if event.kind == "energy"), None)
    text = found or "energy not measured: the run is from a version that did not measure it"
    return f"{plain(text[:1].upper() + text[1:])}."

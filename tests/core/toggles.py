"""The lossless live knobs and the values that tests switch between."""

from __future__ import annotations

import itertools
from typing import Any

from engine.config import EngineConfig, Tier, knobs

#: Values of every lossless live knob that is not a mere limit. A backend that cannot run here is left out, and so are
#: execution modes that prepare themselves in the background for seconds: those have tests of their own.
VALUES: dict[str, list[Any]] = {
    "batching": ["continuous", "static"],
    "max_running": [16, 2],
    "max_waiting": [1024, 64],
    "token_budget": [64, 7],
    "chunked_prefill": [True, False],
    "preemption": [True, False],
    "prefix_cache": [True, False],
    "speculation": ["off", "ngram"],
    "draft_length": [4, 7],
    "draft_control": ["fixed", "adaptive"],
    "ngram_max": [4, 6],
    "ngram_min": [2, 1],
    "attention": ["auto", "sdpa", "reference"],
    "execution": ["auto", "eager"],
    "sampling": ["auto", "torch"],
}
LIMITS = ("max_running", "max_waiting", "token_budget")
LOSSLESS: list[dict[str, Any]] = [
    {name: value} for name, values in VALUES.items() if name not in LIMITS for value in values
] + [{"speculation": "ngram", "ngram_min": 1, "draft_length": 7}]


def live_lossless_knobs() -> set[str]:
    """Names of the knobs that must be among :data:`VALUES`."""
    single = {knob.name for knob in knobs() if knob.kind == "choice" and len(knob.choices) == 1}
    return {knob.name for knob in knobs() if knob.tier == Tier.LIVE and knob.lossless} - single


def pairwise_rows() -> list[dict[str, Any]]:
    """Few configurations among which every pair of values of every two knobs occurs (greedy covering array)."""
    uncovered = {
        frozenset([(a, x), (b, y)])
        for a, b in itertools.combinations(VALUES, 2)
        for x, y in itertools.product(VALUES[a], VALUES[b])
    }
    rows: list[dict[str, Any]] = []
    while uncovered:
        row = dict(sorted(min(uncovered, key=sorted_key)))
        for name, values in VALUES.items():
            if name not in row:
                row[name] = max(values, key=lambda value: _newly_covered(row, name, value, uncovered))
        rows.append(row)
        uncovered -= {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}
    for row in rows:
        EngineConfig.from_mapping(row)  # every row must be a configuration
    return rows


def sorted_key(pair: frozenset[tuple[str, Any]]) -> str:
    """A fixed order, so that the rows are the same in every run."""
    return repr(sorted(pair, key=repr))


def _newly_covered(row: dict[str, Any], name: str, value: Any, uncovered: set[frozenset[tuple[str, Any]]]) -> int:
    return sum(frozenset([(name, value), item]) in uncovered for item in row.items())

"""From step statistics to the data frames that the live charts draw. Pure: no Streamlit, no I/O."""

from __future__ import annotations

import bisect
import operator
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from engine.outputs import EngineEvent, StepStats
from pages.shared.series import short_label


def bin_steps(steps: Iterable[StepStats], *, end_unix_s: float, window_s: float, bins: int) -> pd.DataFrame:
    """Steps gathered into equal bins of time, oldest first.

    Args:
        steps: in any order, a tuple oldest first; those outside of the window are left out.
        end_unix_s: right edge of the window (wall clock).
        window_s: width of the window, seconds.
        bins: how many bins it is cut into.

    Returns:
        One row per bin. ``t``: seconds before ``end_unix_s`` at the bin's right edge (≤ 0). Rates in tokens per second;
        ``prefill``/``decode``/``draft`` in tokens per second of each kind; step times in ms, NaN where there was no
        step; requests and blocks as of the last step (carried forward); ``prefix_hit`` and ``acceptance`` in percent,
        NaN where nothing was asked for or proposed.
    """
    width, start = window_s / bins, end_unix_s - window_s
    inside = [_values(step) for step in _since(steps, start) if start < step.time_unix_s <= end_unix_s]
    rows = np.array(sorted(inside), dtype=float).reshape(len(inside), len(_FIELDS))
    column = dict(zip(_FIELDS, rows.T, strict=True))
    slot = np.minimum(((column["time_unix_s"] - start) / width).astype(int), bins - 1)
    counts = np.bincount(slot, minlength=bins)
    sums = {name: np.bincount(slot, weights=column[name], minlength=bins) for name in (*_SUMS, "duration_ms")}
    last = {name: _carried(slot, column[name], bins) for name in _LAST}
    longest = np.full(bins, -np.inf)
    np.maximum.at(longest, slot, column["duration_ms"])
    return pd.DataFrame(
        {
            "t": -window_s + width * np.arange(1, bins + 1),
            "output_tokens_s": sums["output_tokens"] / width,
            "total_tokens_s": (sums["prefill_tokens"] + sums["output_tokens"]) / width,
            "prefill": sums["prefill_tokens"] / width,
            "decode": sums["decode_tokens"] / width,
            "draft": sums["draft_tokens"] / width,
            "step_mean_ms": _quotient(sums["duration_ms"], counts),
            "step_max_ms": np.where(counts > 0, longest, np.nan),
            "running": last["num_running"],
            "waiting": last["num_waiting"],
            "blocks_used": last["kv_blocks_used"],
            "blocks_cached": last["kv_blocks_cached"],
            "preempted": sums["preempted"],
            "prefix_hit": 100 * _quotient(sums["prefix_hit_tokens"], sums["prefix_query_tokens"]),
            "acceptance": 100 * _quotient(sums["accepted_tokens"], sums["draft_tokens"]),
        }
    )


def _since(steps: Iterable[StepStats], start_unix_s: float) -> Iterable[StepStats]:
    """Without the long tail of older ones, where the steps are in order of time as the feed keeps them."""
    if not isinstance(steps, tuple):
        return steps
    return steps[bisect.bisect_right(steps, start_unix_s, key=operator.attrgetter("time_unix_s")) :]


def event_marks(events: Sequence[EngineEvent], *, end_unix_s: float, window_s: float) -> pd.DataFrame:
    """Events inside the window as rows of ``t`` (seconds before the end, ≤ 0), ``label`` (short) and ``summary``."""
    start = end_unix_s - window_s
    rows = [
        {"t": event.time_unix_s - end_unix_s, "label": short_label(event), "summary": event.summary}
        for event in events
        if start < event.time_unix_s <= end_unix_s and event.kind in ("reconfigure", "load", "error")
    ]
    return pd.DataFrame(rows, columns=["t", "label", "summary"])


_SUMS = (
    "output_tokens",
    "prefill_tokens",
    "decode_tokens",
    "draft_tokens",
    "accepted_tokens",
    "preempted",
    "prefix_hit_tokens",
    "prefix_query_tokens",
)
_LAST = ("num_running", "num_waiting", "kv_blocks_used", "kv_blocks_cached")
_FIELDS = ("time_unix_s", "duration_ms", *_SUMS, *_LAST)
_values = operator.attrgetter(*_FIELDS)


def _carried(slot: np.ndarray, values: np.ndarray, bins: int) -> np.ndarray:
    """The last value of each bin; a bin without a step has that of the bin before, 0 before the first."""
    places = np.full(bins, -1)
    places[slot] = np.arange(len(values))  # rows are in order of time: the last one of a bin wins
    places = np.maximum.accumulate(places)
    return np.where(places >= 0, values[np.maximum(places, 0)] if len(values) else 0.0, 0.0)


def _quotient(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Elementwise quotient, NaN where the whole is 0."""
    quotient: np.ndarray = np.divide(part, whole, out=np.full(len(part), np.nan), where=whole > 0)
    return quotient

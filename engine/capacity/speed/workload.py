"""What users ask for: lengths, arrivals, objectives."""

from __future__ import annotations

import dataclasses
import math

from engine.capacity.text import shown
from engine.errors import ConfigError

MAX_RATE = 1e6
MAX_TOKENS = 2**31


@dataclasses.dataclass(frozen=True, slots=True)
class PlannedWorkload:
    """Requests as they arrive.

    Attributes:
        input_tokens, output_tokens: means.
        input_cv, output_cv: coefficients of variation of the lengths (standard deviation / mean); 0: all equal.
        burstiness: squared coefficient of variation of the gaps between arrivals; 1: Poisson, above: in bursts.
        prefix_hit_rate: share of the prompt tokens that the prefix cache holds already, 0 … 1.
        draft_length: tokens drafted a round of speculation; 0: none.
        acceptance: probability that a drafted token is accepted.
        draft_cost: time of drafting one token over that of a plain target step; None: as the draft model's own step
            model says, 0 (n-gram look-up) without a draft model.
    """

    input_tokens: float
    output_tokens: float
    input_cv: float = 0.0
    output_cv: float = 0.0
    burstiness: float = 1.0
    prefix_hit_rate: float = 0.0
    draft_length: int = 0
    acceptance: float = 0.7
    draft_cost: float | None = None

    @property
    def prefill_tokens(self) -> float:
        """Prompt tokens that must be computed; the last one always is."""
        return max(1.0, self.input_tokens * (1.0 - self.prefix_hit_rate))

    @property
    def cached_tokens(self) -> float:
        """Prompt tokens that are found in the cache."""
        return self.input_tokens - self.prefill_tokens

    @property
    def mean_context(self) -> float:
        """Tokens in the cache of a request that decodes, averaged over its decoding."""
        return self.input_tokens + self.output_tokens / 2.0


@dataclasses.dataclass(frozen=True, slots=True)
class Objectives:
    """Service-level objectives, 95th percentiles, seconds; None: any."""

    ttft_s: float | None = None
    tpot_s: float | None = None


_BOUNDS: dict[str, tuple[float, float, str]] = {
    "input_tokens": (1, MAX_TOKENS, "Give at least 1."),
    "output_tokens": (1, MAX_TOKENS, "Give at least 1."),
    "input_cv": (0, 10, "Give 0 (all equal) to 10."),
    "output_cv": (0, 10, "Give 0 (all equal) to 10."),
    "burstiness": (0, 1000, "Give 1 for Poisson arrivals, more for bursts, up to 1,000."),
    "prefix_hit_rate": (0, 1, "Give a share from 0 to 1."),
    "draft_length": (0, 64, "Give 0 (no speculation) to 64."),
    "acceptance": (0, 1, "Give a probability from 0 to 1."),
    "draft_cost": (0, 100, "Give a share of a target step, e.g. 0.1."),
}


def check_workload(workload: PlannedWorkload) -> PlannedWorkload:
    """The same workload, every number within bounds.

    >>> check_workload(PlannedWorkload(1000, 200)).mean_context
    1100.0

    Raises:
        ConfigError: naming the field at fault.
    """
    for field, (low, high, remedy) in _BOUNDS.items():
        value = getattr(workload, field)
        if field == "draft_length" and not (isinstance(value, int) and not isinstance(value, bool)):
            raise ConfigError(f"{shown(value)} is not a whole number.", field=field, remedy=remedy)
        if value is not None or field != "draft_cost":
            check_number(field, value, low, high, remedy)
    return workload


def check_objectives(objectives: Objectives) -> Objectives:
    """The same objectives, each None or positive.

    Raises:
        ConfigError: naming the field at fault.
    """
    for name, field in (("ttft_s", "slo_ttft_ms"), ("tpot_s", "slo_tpot_ms")):
        value = getattr(objectives, name)
        if value is not None:
            check_number(field, value, 1e-9, 1e9, "Give a number of milliseconds above 0, or leave it out.")
    return objectives


def check_number(field: str, value: object, low: float, high: float, remedy: str) -> float:
    """A finite number from ``low`` to ``high``.

    Raises:
        ConfigError: if it is not.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high:  # type: ignore[arg-type,operator]
        raise ConfigError(f"{shown(value)} is not possible.", field=field, remedy=remedy)
    return float(value)  # type: ignore[arg-type]

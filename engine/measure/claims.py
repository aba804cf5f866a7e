"""What the literature claims for an optimization, shown next to what was measured here.

The figures are those of the usual "optimization summary"; none of them is a promise of this engine. A claim belongs
to a change of knobs: ``claims_for({"weights": ("model", "int4")})`` finds it, and finds it turned round when the change
goes the other way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from engine.measure.comparison import MetricComparison


@dataclasses.dataclass(frozen=True, slots=True)
class Claim:
    """One claimed effect.

    Attributes:
        name: stable key; title: for people.
        knob: whose change it is about; None for "everything together".
        old, new: values of the knob; an empty tuple stands for any value not in the other one.
        text: the claim in words, as commonly published.
        metric: the metric that tests it.
        low, high: claimed ratio B/A of that metric.
        caveat: when it can be expected to hold.
    """

    name: str
    title: str
    knob: str | None
    old: tuple[str, ...]
    new: tuple[str, ...]
    text: str
    metric: str
    low: float
    high: float
    caveat: str

    def turned_round(self) -> Claim:
        """The same claim for the change in the other direction."""
        return dataclasses.replace(
            self,
            old=self.new,
            new=self.old,
            text=f"{self.text} (here undone)",
            low=1 / self.high,
            high=1 / self.low,
        )


def _claim(
    name: str,
    title: str,
    change: tuple[str | None, str | tuple[str, ...], str | tuple[str, ...]],
    text: str,
    effect: tuple[str, float, float],
    caveat: str,
) -> Claim:
    knob, old, new = change
    as_tuple = [(side,) if isinstance(side, str) else side for side in (old, new)]
    return Claim(name, title, knob, as_tuple[0], as_tuple[1], text, *effect, caveat)


CLAIMS: tuple[Claim, ...] = (
    _claim(
        "int8-speed",
        "INT8 weights: speed",
        ("weights", "model", "int8"),
        "1.5× faster",
        ("output_tokens_s", 1.5, 1.5),
        "While decoding is bound by memory bandwidth, that is at small batches.",
    ),
    _claim(
        "int8-memory",
        "INT8 weights: memory",
        ("weights", "model", "int8"),
        "2× less memory for weights",
        ("weights_bytes", 0.5, 0.5),
        "Against 16-bit weights; embeddings and norms stay unquantized.",
    ),
    _claim(
        "int4-speed",
        "INT4 weights: speed",
        ("weights", "model", "int4"),
        "2.5× faster",
        ("output_tokens_s", 2.5, 2.5),
        "While decoding is bound by memory bandwidth, that is at small batches.",
    ),
    _claim(
        "int4-memory",
        "INT4 weights: memory",
        ("weights", "model", "int4"),
        "4× less memory for weights",
        ("weights_bytes", 0.25, 0.25),
        "Against 16-bit weights; scales, embeddings and norms come on top.",
    ),
    _claim(
        "continuous-batching",
        "Continuous batching",
        ("batching", "static", "continuous"),
        "2–5× throughput",
        ("output_tokens_s", 2.0, 5.0),
        "The ideal gain is the longest output over the mean output: equal lengths gain nothing.",
    ),
    _claim(
        "speculation",
        "Speculative decoding",
        ("speculation", "off", ()),
        "2–3× faster",
        ("output_tokens_s", 2.0, 3.0),
        "S = τ/(k·c + v + o): it needs a high acceptance rate and a small batch, and can be a slow-down.",
    ),
    _claim(
        "flash-attention",
        "Flash attention: time",
        ("attention", "reference", ()),
        "2–4× less time in attention",
        ("step_ms_mean", 0.25, 0.5),
        "Claimed of the attention operator, measured here on the whole step, which does much else.",
    ),
    _claim(
        "flash-attention-memory",
        "Flash attention: memory",
        ("attention", "reference", ()),
        "5–20× less memory in attention",
        ("resident_bytes_peak", 0.05, 0.2),
        "Claimed of the score matrix of a long prefill, measured here on the whole process.",
    ),
)
"""Claims about a single knob. "60–80 % less waste" of a paged KV cache is not among them: blocks are always paged."""

TOGETHER = _claim(
    "together",
    "All optimizations together",
    (None, (), ()),
    "5–10× over naive",
    ("output_tokens_s", 5.0, 10.0),
    "Gains do not multiply: each one removes part of the time that the others would have saved.",
)


@dataclasses.dataclass(frozen=True, slots=True)
class ClaimVerdict:
    """What a measurement says about a claim.

    Attributes:
        status: "confirmed" (the interval meets the claimed range), "below" (an effect, smaller than claimed), "above"
            (larger), "none" (no effect shown), "opposite" (an effect in the other direction), "unmeasured".
        text: one sentence.
    """

    status: Literal["confirmed", "below", "above", "none", "opposite", "unmeasured"]
    text: str


def claims_for(change: Mapping[str, tuple[Any, Any]]) -> list[Claim]:
    """Claims about a change of knobs, ``{knob: (value in A, value in B)}``, in the direction from A to B.

    Two or more claimed optimizations switched on (or off) at once bring the claim about all together.
    """
    forward, backward = [], []
    for claim in CLAIMS:
        if claim.knob is None or claim.knob not in change:
            continue
        old, new = (str(value) for value in change[claim.knob])
        if old == new:
            continue
        if _covers(claim.old, old, claim.new) and _covers(claim.new, new, claim.old):
            forward.append(claim)
        elif _covers(claim.new, old, claim.old) and _covers(claim.old, new, claim.new):
            backward.append(claim.turned_round())
    found = forward + backward
    if len({claim.knob for claim in forward}) >= 2 and not backward:
        found.append(TOGETHER)
    elif len({claim.knob for claim in backward}) >= 2 and not forward:
        found.append(TOGETHER.turned_round())
    return found


def _covers(side: tuple[str, ...], value: str, other: tuple[str, ...]) -> bool:
    return value in side if side else value not in other


def judge_claim(claim: Claim, measured: MetricComparison) -> ClaimVerdict:
    """Hold a claim against the comparison of its metric.

    Raises:
        ValueError: if the comparison is of another metric.
    """
    if measured.metric != claim.metric:
        raise ValueError(f"the claim is about {claim.metric}, not {measured.metric}")
    low, high, ratio = measured.ci_low, measured.ci_high, measured.ratio
    if ratio is None or low is None or high is None:
        return ClaimVerdict("unmeasured", "Not measured here with an uncertainty: run more repeats.")
    span = f"measured {ratio:.2f}× (95 % CI {low:.2f}–{high:.2f}), claimed {_range(claim)}"
    if low <= claim.high * (1 + _ROUNDING) and high >= claim.low * (1 - _ROUNDING):
        if low <= 1.0 <= high:
            return ClaimVerdict("none", f"Too uncertain to tell: {span}.")
        return ClaimVerdict("confirmed", f"Agrees with the claim: {span}.")
    if low <= 1.0 <= high:
        return ClaimVerdict("none", f"No effect shown here: {span}.")
    growing = claim.low > 1.0
    if (ratio > 1.0) != growing:
        return ClaimVerdict("opposite", f"The opposite here: {span}.")
    weaker = ratio < claim.low if growing else ratio > claim.high
    if weaker:
        return ClaimVerdict("below", f"Less than claimed: {span}.")
    return ClaimVerdict("above", f"More than claimed: {span}.")


# "4×" is a rounded number: 3.9 times is no refutation.
_ROUNDING = 0.05


def _range(claim: Claim) -> str:
    return f"{claim.low:.2g}×" if claim.low == claim.high else f"{claim.low:.2g}–{claim.high:.2g}×"

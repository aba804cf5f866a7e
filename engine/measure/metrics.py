"""What a run's numbers mean: one definition for each metric, and the summary of a run's requests.

Pure functions over :class:`engine.measure.results.RequestRecord`. Names carry their unit. Percentiles interpolate
linearly between the order statistics (numpy's default, type 7 of Hyndman and Fan 1996).

Which requests count
    * latencies (TTFT, ITL, TPOT, E2E) and goodput: completed requests (``finish_reason`` "stop" or "length");
    * throughput in tokens: everything that was delivered, of aborted and failed requests too;
    * requests that failed, were aborted or never sent have counters of their own: nothing is dropped in silence.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from engine.errors import WorkloadError
from engine.measure.results import RequestRecord

PERCENTILES = (50, 90, 95, 99)
UNSENT = "unsent"
"""``finish_reason`` of a request of the workload that was never submitted because the run ended first."""


@dataclasses.dataclass(frozen=True, slots=True)
class MetricInfo:
    """How to show and judge one metric.

    Attributes:
        label: for people, without the unit.
        unit: "ms", "tokens/s", … or "" if dimensionless.
        higher_is_better: direction of improvement; None for a count that is neither good nor bad by itself.
        definition: one sentence, with the formula.
        once: measured once for all runs of an arm, so that its repeats say nothing about its uncertainty.
    """

    label: str
    unit: str
    higher_is_better: bool | None
    definition: str
    once: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Slo:
    """Service-level objectives of one request; a bound of None is not asked for. Milliseconds.

    Attributes:
        ttft_ms: most time to the first token.
        tpot_ms: most mean time per output token after the first; met by a request of a single token.
        e2e_ms: most time to the last token.
    """

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            bound = getattr(self, field.name)
            if bound is None:
                continue
            if isinstance(bound, bool) or not isinstance(bound, (int, float)) or not 0 < bound < math.inf:
                raise WorkloadError(
                    f"{bound!r} is not a bound on a time.",
                    field=f"slo.{field.name}",
                    remedy="Give a number of milliseconds above 0, or leave it out.",
                )

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Slo:
        """The objectives from ``{"ttft_ms": 500, …}``.

        Raises:
            WorkloadError: on an unknown name or a bound that is not a positive number.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                remedy = f"Known objectives: {', '.join(known)}."
                raise WorkloadError(f"there is no objective named {name!r}.", field=f"slo.{name}", remedy=remedy)
        return cls(**values)

    def is_met_by(self, request: RequestRecord) -> bool:
        """True if the request completed within every bound."""
        measured = ((self.ttft_ms, request.ttft_ms), (self.tpot_ms, request.tpot_ms), (self.e2e_ms, request.e2e_ms))
        return is_completed(request) and all(
            bound is None or value is None or value <= bound for bound, value in measured
        )


def is_completed(request: RequestRecord) -> bool:
    """True if the request ended by itself."""
    return request.finish_reason in ("stop", "length")


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The ``percent``-th percentile by linear interpolation; None of nothing.

    >>> percentile([10.0, 20.0, 30.0, 40.0], 50)
    25.0
    """
    if not values:
        return None
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def summarize(
    requests: Sequence[RequestRecord],
    duration_s: float,
    slo: Slo | Mapping[str, Any] | None = None,
) -> dict[str, float | None]:
    """Every request metric of :data:`METRICS`; None where nothing was measured (never 0 for "unknown").

    Args:
        requests: all requests of the run, whatever became of them.
        duration_s: wall time of the run, first arrival to last end. Rates are None if it is 0.
        slo: objectives that goodput counts by; without any, goodput is None.
    """
    objectives = Slo.from_mapping(slo) if isinstance(slo, Mapping) else slo
    metrics: dict[str, float | None] = {}
    completed = [request for request in requests if is_completed(request)]
    metrics.update(_statistics("ttft_ms", _present(request.ttft_ms for request in completed)))
    metrics.update(_statistics("itl_ms", [gap for request in completed for gap in request.itl_ms]))
    metrics.update(_statistics("tpot_ms", _present(request.tpot_ms for request in completed)))
    metrics.update(_statistics("e2e_ms", _present(request.e2e_ms for request in completed)))
    metrics.update(_rates(requests, completed, duration_s, objectives))
    metrics.update(_ratios(requests))
    metrics.update(_counts(requests, completed))
    metrics["duration_s"] = duration_s
    return metrics


def _present(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _statistics(name: str, values: Sequence[float]) -> dict[str, float | None]:
    result: dict[str, float | None] = {f"{name}_mean": math.fsum(values) / len(values) if values else None}
    result.update({f"{name}_p{percent}": percentile(values, percent) for percent in PERCENTILES})
    return result


def _rates(
    requests: Sequence[RequestRecord],
    completed: Sequence[RequestRecord],
    duration_s: float,
    slo: Slo | None,
) -> dict[str, float | None]:
    output = sum(request.output_tokens for request in requests)
    # a prompt counts once it has been processed, which the first output token proves
    prompt = sum(request.prompt_tokens for request in requests if request.output_tokens > 0)
    good = None if slo is None else sum(slo.is_met_by(request) for request in requests)

    def per_second(count: float | None) -> float | None:
        return None if count is None or duration_s <= 0 else count / duration_s

    return {
        "output_tokens_s": per_second(output),
        "total_tokens_s": per_second(prompt + output),
        "requests_s": per_second(len(completed)),
        "goodput_requests_s": per_second(good),
        "slo_attainment": None if good is None else _quotient(good, len(requests)),
    }


def _ratios(requests: Sequence[RequestRecord]) -> dict[str, float | None]:
    drafted = sum(request.draft_tokens for request in requests)
    accepted = sum(request.accepted_tokens for request in requests)
    gaps = [gap for request in requests for gap in request.itl_ms]
    # Tokens of one pass share a moment: every gap above 0 begins another pass of the target model.
    passes = sum(gap > 0 for gap in gaps)
    started = [request for request in requests if request.output_tokens > 0]
    return {
        "acceptance_rate": _quotient(accepted, drafted),
        "mean_accepted_length": _quotient(len(gaps), passes) if drafted else None,
        "prefix_hit_rate": _quotient(
            sum(request.cached_tokens for request in started), sum(request.prompt_tokens for request in started)
        ),
    }


def _quotient(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None


def _counts(requests: Sequence[RequestRecord], completed: Sequence[RequestRecord]) -> dict[str, float | None]:
    reasons = [request.finish_reason for request in requests]
    aborted, unsent = reasons.count("abort"), reasons.count(UNSENT)
    return {
        "requests": float(len(requests)),
        "requests_completed": float(len(completed)),
        "requests_failed": float(len(requests) - len(completed) - aborted - unsent),
        "requests_aborted": float(aborted),
        "requests_unsent": float(unsent),
        "prompt_tokens": float(sum(request.prompt_tokens for request in requests if request.output_tokens > 0)),
        "output_tokens": float(sum(request.output_tokens for request in requests)),
        "preemptions": float(sum(request.preemptions for request in requests)),
    }


_LATENCIES = {
    "ttft": ("TTFT", "first output token − arrival, queueing included, of completed requests"),
    "itl": (
        "ITL",
        "gaps between successive output tokens, pooled over completed requests; tokens that one verification "
        "accepted together have gaps of 0",
    ),
    "tpot": ("TPOT", "(last − first output token) / (output tokens − 1), one value per completed request"),
    "e2e": ("E2E latency", "end − arrival of completed requests"),
}


def _latency_metrics() -> dict[str, MetricInfo]:
    result = {}
    for name, (label, definition) in _LATENCIES.items():
        for statistic in ("mean", *(f"p{percent}" for percent in PERCENTILES)):
            text = "Mean" if statistic == "mean" else f"{statistic[1:]}th percentile"
            info = MetricInfo(f"{label} {statistic}", "ms", False, f"{text} of: {definition}.")
            result[f"{name}_ms_{statistic}"] = info
    return result


METRICS: dict[str, MetricInfo] = {
    "output_tokens_s": MetricInfo(
        "Output throughput", "tokens/s", True, "Output tokens of all requests / wall time of the run."
    ),
    "total_tokens_s": MetricInfo(
        "Total throughput",
        "tokens/s",
        True,
        "(Prompt + output tokens) / wall time of the run; prompts that got a first token.",
    ),
    "requests_s": MetricInfo("Request throughput", "requests/s", True, "Completed requests / wall time of the run."),
    "goodput_requests_s": MetricInfo(
        "Goodput", "requests/s", True, "Completed requests that meet every SLO / wall time of the run."
    ),
    "slo_attainment": MetricInfo("SLO attainment", "", True, "Requests that meet every SLO / all requests."),
    **_latency_metrics(),
    "acceptance_rate": MetricInfo("Draft acceptance", "", True, "Accepted draft tokens / proposed draft tokens."),
    "mean_accepted_length": MetricInfo(
        "Mean accepted length",
        "tokens/pass",
        True,
        "Output tokens per pass of the target model after a request's first token, the bonus token included; passes "
        "without a draft count as one token. 1 means that speculation saved nothing.",
    ),
    "prefix_hit_rate": MetricInfo(
        "Prefix hit rate", "", True, "Prompt tokens whose KV came from the prefix cache / prompt tokens."
    ),
    "preemptions": MetricInfo("Preemptions", "", False, "How often a request was put back and recomputed."),
    "requests": MetricInfo("Requests", "", None, "Requests of the workload, whatever became of them."),
    "requests_completed": MetricInfo("Completed requests", "", True, "Requests that ended by themselves."),
    "requests_failed": MetricInfo("Failed requests", "", False, "Requests that were rejected or ended in an error."),
    "requests_aborted": MetricInfo("Aborted requests", "", False, "Requests that were cancelled after submission."),
    "requests_unsent": MetricInfo("Unsent requests", "", False, "Requests not submitted because the run ended first."),
    "prompt_tokens": MetricInfo("Prompt tokens", "tokens", None, "Prompt tokens of requests that got a first token."),
    "output_tokens": MetricInfo("Output tokens", "tokens", None, "Output tokens of all requests."),
    "duration_s": MetricInfo("Duration", "s", False, "Wall time from the first arrival to the last end."),
    # From the engine's samples during the run, not from its requests: see engine.measure.driver.
    "step_ms_mean": MetricInfo("Step time mean", "ms", False, "Mean wall time of an engine step during the run."),
    "running_mean": MetricInfo(
        "Mean batch", "requests", None, "Requests running after a step, mean over the steps of the run."
    ),
    "kv_blocks_used_peak": MetricInfo(
        "KV blocks in use, peak", "blocks", False, "Most blocks that running requests held after a step."
    ),
    "weights_bytes": MetricInfo("Weights", "bytes", False, "Resident bytes of the parameters in the current format."),
    "resident_bytes_peak": MetricInfo(
        "Memory, peak", "bytes", False, "Most resident memory of the process (device memory on a GPU) in the samples."
    ),
    # Of the engine's GPU during the run; None without a power reading: see engine.measure.energy. The run's "energy"
    # event states how they were made, or why they were not.
    "energy_j": MetricInfo("Energy", "J", False, "Energy of the GPU's board from the first arrival to the last end."),
    "energy_per_output_token_j": MetricInfo(
        "Energy per output token", "J/token", False, "Energy / output tokens of all requests, idle power included."
    ),
    "net_energy_per_output_token_j": MetricInfo(
        "Energy per output token, net",
        "J/token",
        False,
        "(Energy − idle power · time) / output tokens of all requests: what is drawn beyond a GPU that waits.",
    ),
    "idle_power_w": MetricInfo(
        "Idle power", "W", None, "Mean power before the run while the engine had no request, its model loaded."
    ),
    "power_w_mean": MetricInfo("Power, mean", "W", None, "Energy / time of the run."),
    "power_w_peak": MetricInfo("Power, peak", "W", None, "Most power in a sample of the run."),
    "gpu_utilization_percent_mean": MetricInfo(
        "GPU utilisation, mean", "%", None, "Share of time in which a kernel ran, mean over the samples of the run."
    ),
    "gpu_memory_bytes_peak": MetricInfo(
        "GPU memory, peak", "bytes", False, "Most device memory in use by all processes in a sample of the run."
    ),
    "throttled_percent": MetricInfo(
        "Throttled", "%", False, "Samples of the run in which something held the GPU's clocks back."
    ),
    # Of lossy settings, once for each arm of a comparison: see engine.measure.quality. The run's events state text,
    # window and stride.
    "perplexity": MetricInfo(
        "Perplexity", "", False, "exp(mean negative log-likelihood per token) on the bundled text.", once=True
    ),
    "perplexity_se": MetricInfo(
        "Perplexity, standard error", "", None, "Perplexity · standard error of the mean log-likelihood.", once=True
    ),
    "kl_mean_nats": MetricInfo(
        "KL divergence mean", "nats", False, "Mean over positions of D(unquantized ‖ this model).", once=True
    ),
    "kl_p99_nats": MetricInfo(
        "KL divergence p99", "nats", False, "99th percentile over positions of D(unquantized ‖ this model).", once=True
    ),
    "same_top_percent": MetricInfo(
        "Same top token",
        "%",
        True,
        "Positions at which this model and the unquantized one find the same token most likely.",
        once=True,
    ),
}
"""Every metric of a run, in the order in which pages show them."""

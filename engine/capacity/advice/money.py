"""Cost and power of a deployment."""

from __future__ import annotations

import dataclasses

#: Share of the design power that a GPU draws while it serves: decoding waits for memory most of the time.
SERVING_POWER_SHARE = 0.7


@dataclasses.dataclass(frozen=True, slots=True)
class Cost:
    """US dollars, watts and kilowatt-hours of the whole deployment; None where price, power or throughput is unknown.

    Attributes:
        price_per_gpu_hour: what one GPU costs an hour.
        per_hour: of all GPUs; per_month: of 730 hours.
        per_million_output_tokens: hourly cost over output throughput; per_million_tokens: over all tokens, prompts too.
        power_w: of all GPUs; kwh_per_million_output_tokens: energy.
    """

    price_per_gpu_hour: float | None
    per_hour: float | None
    per_month: float | None
    per_million_output_tokens: float | None
    per_million_tokens: float | None
    power_w: float | None
    kwh_per_million_output_tokens: float | None


def cost_of(
    gpus: int, price: float | None, tdp_w: float | None, output_tokens_s: float | None, total_tokens_s: float | None
) -> Cost:
    """The cost of ``gpus`` GPUs that produce tokens at these rates.

    >>> cost = cost_of(2, 3.0, 700.0, 5000.0, 25000.0)
    >>> cost.per_hour, round(cost.per_million_output_tokens, 3), round(cost.per_million_tokens, 3), round(cost.power_w)
    (6.0, 0.333, 0.067, 980)
    """
    hourly = None if price is None else gpus * price
    power = None if tdp_w is None else gpus * tdp_w * SERVING_POWER_SHARE
    return Cost(
        price_per_gpu_hour=price,
        per_hour=hourly,
        per_month=None if hourly is None else 730.0 * hourly,
        per_million_output_tokens=_per_million(hourly, output_tokens_s),
        per_million_tokens=_per_million(hourly, total_tokens_s),
        power_w=power,
        kwh_per_million_output_tokens=_per_million(None if power is None else power / 1e3, output_tokens_s),
    )


def _per_million(per_hour: float | None, tokens_s: float | None) -> float | None:
    if per_hour is None or not tokens_s:
        return None
    return per_hour / (tokens_s * 3600.0) * 1e6

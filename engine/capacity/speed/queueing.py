"""Waiting times: formulas of queueing theory, and percentiles of distributions of which mean and variance are known."""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True, slots=True)
class Moments:
    """Mean and variance of a duration (seconds, seconds²) that is never below ``least``."""

    mean: float
    variance: float
    least: float = 0.0

    def percentile(self, share: float) -> float:
        """The value that ``share`` of all durations stay below, of a gamma distribution shifted by ``least``.

        >>> round(Moments(2.0, 4.0).percentile(0.95), 2)  # exponential with mean 2: -2 · ln 0.05
        5.99
        """
        above = self.mean - self.least
        if above <= 0 or self.variance <= 1e-12 * self.mean**2:
            return self.mean
        if not math.isfinite(self.mean) or not math.isfinite(self.variance):
            return math.inf
        from scipy.special import gammaincinv

        shape = above**2 / self.variance
        return self.least + float(gammaincinv(shape, share)) * self.variance / above

    def plus(self, other: Moments) -> Moments:
        """The sum of two independent durations."""
        return Moments(self.mean + other.mean, self.variance + other.variance, self.least + other.least)


def mg1_wait(rate: float, mean: float, second_moment: float, burstiness: float = 1.0) -> float:
    """Mean wait for a single server, seconds: Pollaczek–Khinchine, λ · E[s²] / (2 · (1 - ρ)); for arrivals that are not
    Poisson, Kingman's ρ / (1 - ρ) · (ca² + cs²) / 2 · E[s].

    Args:
        rate: arrivals a second; mean, second_moment: of the service time, s and s².
        burstiness: ca², squared coefficient of variation of the gaps.

    >>> mg1_wait(0.5, 1.0, 2.0), mg1_wait(0.5, 1.0, 1.0)  # M/M/1: ρ/(1 - ρ) · E[s]; M/D/1: half of that
    (1.0, 0.5)
    """
    load = rate * mean
    if load >= 1.0:
        return math.inf
    if mean == 0.0:
        return 0.0
    service_cv2 = max(second_moment / mean**2 - 1.0, 0.0)
    return load / (1.0 - load) * (burstiness + service_cv2) / 2.0 * mean


def erlang_c(servers: int, load: float) -> float:
    """Probability that an arrival must wait for one of ``servers`` servers; load: arrival rate · service time.

    >>> round(erlang_c(1, 0.5), 3), round(erlang_c(10, 8.0), 3)  # M/M/1: ρ; tables: 0.409
    (0.5, 0.409)
    """
    if load >= servers:
        return 1.0
    blocking = 1.0
    for count in range(1, servers + 1):
        blocking = load * blocking / (count + load * blocking)
    busy = load / servers
    return blocking / (1.0 - busy * (1.0 - blocking))


def slot_wait(servers: int, load: float, mean: float, service_cv2: float, burstiness: float) -> Moments:
    """Wait for a slot of a batch: M/G/c by Allen–Cunneen, exponential where there is a wait.

    Args:
        servers: slots; load: mean number of busy ones.
        mean: time that a request holds its slot, seconds; service_cv2: its squared coefficient of variation.

    >>> slot_wait(1, 0.5, 1.0, 1.0, 1.0).mean  # M/M/1
    1.0
    """
    if load >= servers:
        return Moments(math.inf, math.inf)
    if load < 0.5 * servers and servers > 30:  # far from full: nobody waits
        return Moments(0.0, 0.0)
    waits = erlang_c(servers, load)
    given = mean / (servers - load) * (burstiness + service_cv2) / 2.0
    average = waits * given
    return Moments(average, 2.0 * waits * given**2 - average**2)

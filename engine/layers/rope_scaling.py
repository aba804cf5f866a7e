"""How rotary frequencies are stretched so that a model reads further than it was trained to: one class a method.

Every method starts from the *periods* ``theta^(2i / dim)`` of a head's rotated pairs, i = 0 … dim/2 - 1, and answers
with inverse frequencies; YaRN and LongRoPE also scale cos and sin, which scales the attention scores by its square.

Dynamic NTK is not here: it leaves positions below ``max_position_embeddings`` as they are, and no request of this
engine goes beyond. (Beyond, every new token would rotate again the keys that are cached already.)
"""

from __future__ import annotations

import abc
import dataclasses
import math

import torch


class RopeScaling(abc.ABC):
    """One method with its parameters."""

    @abc.abstractmethod
    def inverse_frequencies(self, periods: torch.Tensor, theta: float) -> torch.Tensor:
        """float32 [dim / 2] from the unscaled ``periods``, float32 [dim / 2]."""

    @property
    def attention_factor(self) -> float:
        """Factor on cos and sin."""
        return 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class LinearScaling(RopeScaling):
    """Position interpolation (Chen et al. 2023): every angle is divided by ``factor``."""

    factor: float

    def inverse_frequencies(self, periods: torch.Tensor, theta: float) -> torch.Tensor:
        return 1.0 / periods / self.factor


@dataclasses.dataclass(frozen=True, slots=True)
class Llama3Scaling(RopeScaling):
    """Llama 3.1's scaling by frequency: long wavelengths are stretched, short ones kept, a ramp between.

    Attributes:
        factor: how much the longest wavelengths are stretched.
        low_freq_factor, high_freq_factor: the ramp lies between original_max_position / these wavelengths.
        original_max_position: context length of the pre-training, in tokens.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int

    def inverse_frequencies(self, periods: torch.Tensor, theta: float) -> torch.Tensor:
        inv_freq = 1.0 / periods
        wavelength = 2 * math.pi / inv_freq
        rotations = self.original_max_position / wavelength
        ramp = (rotations - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        ramp = ramp.clamp(0, 1)
        return (1 - ramp) * inv_freq / self.factor + ramp * inv_freq


@dataclasses.dataclass(frozen=True, slots=True)
class YarnScaling(RopeScaling):
    """YaRN (Peng et al. 2023, section 3): interpolate what turns seldom, keep what turns often, a ramp between.

    Attributes:
        factor: how much the context is extended.
        original_max_position: context length of the pre-training, in tokens.
        attention_factor: on cos and sin; the paper's 0.1·ln(factor) + 1 unless the model says otherwise.
        beta_fast, beta_slow: pairs that turn more often than beta_fast times within the original context are kept,
            those that turn less than beta_slow times are interpolated.
        truncate: round the ends of the ramp outwards to whole pairs.
    """

    factor: float
    original_max_position: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def inverse_frequencies(self, periods: torch.Tensor, theta: float) -> torch.Tensor:
        kept = 1 - self._ramp(2 * periods.numel(), theta).to(periods.device)
        return 1.0 / (self.factor * periods) * (1 - kept) + 1.0 / periods * kept

    def _ramp(self, dim: int, theta: float) -> torch.Tensor:
        """0 where a pair is kept, 1 where it is interpolated: float32 [dim / 2]."""
        low, high = (self._pair_that_turns(beta, dim, theta) for beta in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        width = high - low or 0.001
        return ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)

    def _pair_that_turns(self, times: float, dim: int, theta: float) -> float:
        """Index of the pair that turns ``times`` times within the original context (eq. 15 solved for the index)."""
        return dim * math.log(self.original_max_position / (times * 2 * math.pi)) / (2 * math.log(theta))


@dataclasses.dataclass(frozen=True, slots=True)
class LongRopeScaling(RopeScaling):
    """LongRoPE (Ding et al. 2024): a factor of its own for every pair, found by search.

    A model has one set for sequences within its original context and one for longer ones; a sequence that crosses the
    boundary would have to be computed again. The engine serves the original context, with the set for it.

    Attributes:
        factors: of the pairs, [dim / 2].
        attention_factor: on cos and sin.
    """

    factors: tuple[float, ...]
    attention_factor: float

    def inverse_frequencies(self, periods: torch.Tensor, theta: float) -> torch.Tensor:
        return 1.0 / (torch.tensor(self.factors, dtype=torch.float32, device=periods.device) * periods)

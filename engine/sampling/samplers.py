"""The samplers by name: one row of the table for each, and which of them runs here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from engine.errors import ConfigError
from engine.outputs import TokenLogprob
from engine.sampling.params import SamplingRow
from engine.sampling.torch_sampler import sample
from kernels.dispatch import choose

Sampler = Callable[[torch.Tensor, Sequence[SamplingRow]], tuple[list[int], list[TokenLogprob | None]]]
"""(logits [R, vocab], R rows) → the chosen token ids, and each row's log-probabilities where they were asked for."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Entry:
    """A row of the table.

    Attributes:
        load: gives the sampler; imports what only it needs.
        warm_up: has its kernels compiled for logits [1, vocab] like these.
    """

    load: Callable[[], Sampler]
    warm_up: Callable[[torch.Tensor], None]


def get_sampler(name: str, device: torch.device) -> tuple[Sampler, str]:
    """The sampler of that name, and the path that it really takes, for the record.

    Args:
        name: value of the knob ``sampling``: auto, torch or triton.
        device: where the logits are.

    Raises:
        ConfigError: if it cannot run here; nothing else is put in its place.
    """
    choice = choose("sample", name, device=device, dtype=torch.float32)
    if choice.path is None:
        raise ConfigError(f"{name!r} cannot run here: {choice.reason}", field="sampling", remedy=choice.remedy or None)
    return _entry(choice.path).load(), choice.path


def warm_up_sampler(logits: torch.Tensor, path: str) -> None:
    """Have the sampler's kernels compiled, where it has any, for logits [1, vocab] like these.

    Args:
        path: as :func:`get_sampler` gave it.
    """
    _entry(path).warm_up(logits)


def _load_triton() -> Sampler:
    from engine.sampling.triton_sampler import sample_on_device  # Triton should load only where it is asked for

    return sample_on_device


def _warm_up_triton(logits: torch.Tensor) -> None:
    from engine.sampling.triton_sampler import warm_up

    warm_up(logits)


_SAMPLERS = {
    "torch": _Entry(lambda: sample, lambda _: None),
    "triton": _Entry(_load_triton, _warm_up_triton),
}
"""By the first word of the path that :func:`kernels.dispatch.choose` gives."""


def _entry(path: str) -> _Entry:
    return _SAMPLERS[path.partition(" ")[0]]

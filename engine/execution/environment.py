"""What a mode of execution works on, and what it says where it cannot."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from engine.attention.operator import AttendContext
from engine.cache.kv_cache import KVCache
from engine.execution.base import Step
from engine.models.decoder import Decoder
from engine.models.fallback import TransformersDecoder
from engine.quantization.native import NativeFormat

AnyDecoder = Decoder | TransformersDecoder
AddEvent = Callable[[str, str, dict[str, Any]], None]


@dataclasses.dataclass(frozen=True, slots=True)
class Kernels:
    """What computes around a mode, as knobs ask for it or as it is now.

    Attributes:
        attention: the backend's name.
        linear: of the linear layers: ``"native"``, ``"triton"``, ``"torch"`` or, if there are none, ``"none"``.
        weights: their format, e.g. ``"model"`` or ``"int8"``.
    """

    attention: str
    linear: str
    weights: str


@dataclasses.dataclass(frozen=True, slots=True)
class Unsupported:
    """Why a mode cannot run.

    Attributes:
        reason: a sentence without its subject, e.g. ``"it needs attention=triton, not sdpa."``
        remedy: what to do instead.
    """

    reason: str
    remedy: str


NEEDS_OWN_DECODER = Unsupported(
    "this model runs through a fallback (transformers), not through our own decoder.", "Choose auto or eager."
)


@dataclasses.dataclass(frozen=True, slots=True)
class ExecutionEnvironment:
    """What the modes of one engine work on; made again with its cache.

    Attributes:
        decoder: of the model; its weights may be swapped between two steps.
        cache: of the engine. On a GPU its last block is scratch: the pool must not know it.
        device: where both live.
        context: how the layers reach the cache, with their scales and windows.
        max_tokens: the largest step.
        max_num_seqs: the largest decode batch.
        max_model_len: the longest context.
        add_event: writes into the engine's event log.
        warm_up_sampler: has the kernels compiled that choose a token from logits [1, vocab].
    """

    decoder: AnyDecoder
    cache: KVCache
    device: torch.device
    context: AttendContext
    max_tokens: int
    max_num_seqs: int
    max_model_len: int
    add_event: AddEvent
    warm_up_sampler: Callable[[torch.Tensor], None]

    @property
    def own_decoder(self) -> Decoder | None:
        """The decoder if it is ours, so that its layers can be looked at; None if transformers computes them."""
        return self.decoder if isinstance(self.decoder, Decoder) else None

    @property
    def compiles_at_launch(self) -> bool:
        """Triton compiles here, each kernel when it is first launched."""
        return self.device.type == "cuda"

    def enter(self, step: Step) -> None:
        """Have the layers attend as this step asks from now on."""
        self.context.enter(step.backend, self.cache, step.batch)

    def present_kernels(self, attention: str) -> Kernels:
        """The kernels that run with this attention backend and the weights as they lie now."""
        formats = [linear.format for _, linear, _ in self.decoder.linears()]
        native = all(isinstance(format, NativeFormat) for format in formats)
        weights = "+".join(dict.fromkeys(format.name for format in formats))
        return Kernels(attention, "native" if native else "torch", weights)

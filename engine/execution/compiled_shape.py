"""Compiled layers at work: each is one call of a compiled program, which takes its weights as inputs.

Measured against one program for the whole decoder: that one is up to a tenth quicker a step, but takes four times as
long to compile and copies thirty layers of equal code (docs/benchmarks.md, "Compiled against eager").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from engine.attention.operator import AttendContext
from engine.execution.base import PreparedShape, Step, TokenRange
from engine.execution.blueprint import DecoderBlueprint, argument_tensors
from engine.execution.packages import PackagedShape
from engine.models.decoder import Decoder


class LayerProgram:
    """A loaded AOTInductor package. Not re-entrant: every engine loads its own.

    Torch's own loader is called without ``torch._inductor``, whose import takes seconds in which the interpreter lock
    is held and requests would wait.
    """

    def __init__(self, package: str, device: torch.device) -> None:
        index = device.index if device.type == "cuda" and device.index is not None else -1
        self._loader = torch._C._aoti.AOTIModelPackageLoader(package, "model", True, 1, index)

    def __call__(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        result: torch.Tensor = self._loader.boxed_run(inputs)[0]
        return result


class CompiledShape(PreparedShape):
    """Runs every layer through its program; embedding, angles and final norm stay eager.

    Args:
        decoder: whose layers these are.
        blueprint: of the layers as they are now; its weights are the ones computed with.
        programs: one for each kind of layer.
        context: of the engine.
        tokens: the numbers of tokens that the programs serve.
    """

    name = "compiled"

    def __init__(
        self,
        decoder: Decoder,
        blueprint: DecoderBlueprint,
        programs: Sequence[LayerProgram],
        context: AttendContext,
        tokens: TokenRange,
    ) -> None:
        self.tokens = tokens
        self._decoder, self._attend = decoder, context.attend
        self._layers = {
            layer: (programs[kind], [context.where(index), *weights])
            for index, (layer, kind, weights) in enumerate(
                zip(decoder.layers, blueprint.layers, blueprint.weights, strict=True)
            )
        }

    def forward(self, step: Step) -> torch.Tensor:
        """As :meth:`Execution.forward`."""
        hidden: torch.Tensor = self._decoder(step.token_ids, step.positions, self._attend, run_layer=self._run_layer)
        return hidden

    def _run_layer(self, layer: nn.Module, *arguments: Any) -> torch.Tensor:
        program, constants = self._layers[layer]
        return program([*argument_tensors(arguments), *constants])


def load_shape(
    packaged: PackagedShape,
    wanted: TokenRange,
    decoder: Decoder,
    blueprint: DecoderBlueprint,
    context: AttendContext,
    device: torch.device,
) -> CompiledShape:
    """What a shape on disk has of the wanted token counts, bound to the decoder's present weights.

    Raises:
        RuntimeError: if a package cannot be loaded.
    """
    programs = [LayerProgram(str(path), device) for path in packaged.programs]
    tokens = TokenRange(wanted.low, min(wanted.high, packaged.tokens.high))
    return CompiledShape(decoder, blueprint, programs, context, tokens)

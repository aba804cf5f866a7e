"""Which part of a model one GPU holds under tensor, expert and pipeline parallelism (TP, EP, PP)."""

from __future__ import annotations

import dataclasses

from engine.capacity.model.spec import ModelSpec


@dataclasses.dataclass(frozen=True, slots=True)
class Stage:
    """Layers ``start … stop - 1`` of a pipeline, and whether the stage holds the embedding (first) or head (last)."""

    start: int
    stop: int
    first: bool
    last: bool

    @property
    def num_layers(self) -> int:
        """How many layers the stage holds."""
        return self.stop - self.start


@dataclasses.dataclass(frozen=True, slots=True)
class Shard:
    """One GPU's part of a model.

    Attributes:
        tp: tensor-parallel GPUs that share every layer.
        ep: GPUs that a mixture's experts are distributed over, whole; 1: they are split like everything else.
        stage: the layers of a pipeline's stage; None: all of them.
    """

    tp: int = 1
    ep: int = 1
    stage: Stage | None = None

    def stage_of(self, spec: ModelSpec) -> Stage:
        """The layers of that model that the GPU holds."""
        return self.stage or Stage(0, spec.num_layers, first=True, last=True)


#: All of a model on one GPU.
WHOLE = Shard()


def pipeline_stages(num_layers: int, pp: int) -> tuple[Stage, ...]:
    """Split layers over ``pp`` stages as vLLM does: evenly, and what remains goes one each to the stages before the
    last, from the back, because the last one also holds the head.

    >>> [stage.num_layers for stage in pipeline_stages(126, 4)]  # Llama 3.1 405B
    [31, 32, 32, 31]
    """
    sizes = [num_layers // pp] * pp
    for index in range(num_layers % pp):
        sizes[-2 - index] += 1
    stages, start = [], 0
    for index, size in enumerate(sizes):
        stages.append(Stage(start, start + size, first=index == 0, last=index == pp - 1))
        start += size
    return tuple(stages)

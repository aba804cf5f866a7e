"""Parameters of a model, counted tensor by tensor from its shape.

One list, :func:`tensors_of`, is behind everything: what a GPU holds, in which part of the model it is, how much of it a
token passes through, and (for allocators that round) how large each allocation is.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

from engine.capacity.model.sharding import WHOLE, Shard, Stage
from engine.capacity.model.spec import ModelSpec
from engine.capacity.model.tensors import Tensor

PARTS = ("embedding", "attention", "recurrent", "mlp", "experts", "router", "norms", "head")


@dataclasses.dataclass(frozen=True, slots=True)
class ParameterCount:
    """Parameters by part of the model.

    Attributes:
        embedding: token embedding; head: 0 where it is tied to the embedding.
        attention: projections, biases, sinks; recurrent: Mamba and linear-attention layers.
        mlp: dense MLPs and experts that all tokens share; experts: routed ones; router: their gates.
        norms: all norms.
        active: of all, those that one token passes through: in a mixture, its top-k experts only. Embedding and head
            count in full, as model cards count them.
    """

    embedding: int
    attention: int
    recurrent: int
    mlp: int
    experts: int
    router: int
    norms: int
    head: int
    active: int

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self.by_part().values())

    def by_part(self) -> dict[str, int]:
        """``{part: parameters}``."""
        return {part: getattr(self, part) for part in PARTS}


@functools.lru_cache(maxsize=512)
def parameter_count(spec: ModelSpec) -> ParameterCount:
    """Exact number of parameters.

    >>> from engine.capacity.model.catalog import model_spec
    >>> parameter_count(model_spec("Llama-3.1-8B")).total  # model card: 8.03B; safetensors index: 8,030,261,248
    8030261248
    >>> count = parameter_count(model_spec("gpt-oss-120b"))  # model card: 116.8B, of which 5.1B are active
    >>> count.total, round(count.active / 1e9, 1)
    (116829156672, 5.7)
    """
    counts = dict.fromkeys(PARTS, 0)
    active = 0
    for tensor in tensors_of(spec):
        counts[tensor.part] += tensor.size
        active += tensor.active_size
    return ParameterCount(**counts, active=active)


@functools.lru_cache(maxsize=4096)
def tensors_of(spec: ModelSpec, shard: Shard = WHOLE, vocab: int | None = None) -> tuple[Tensor, ...]:
    """Every weight tensor of one GPU, equal ones counted together.

    Args:
        spec: the model.
        shard: the GPU's part of it.
        vocab: rows of the vocabulary, where an engine pads it.
    """
    return tuple(_tensors(spec, shard, shard.stage_of(spec), vocab or spec.vocab_size))


def _tensors(spec: ModelSpec, shard: Shard, stage: Stage, vocab: int) -> Iterator[Tensor]:
    tp = shard.tp
    local_vocab = -(-vocab // tp)
    if stage.first:
        yield Tensor("embedding", "embedding", local_vocab, spec.hidden_size)
        for tensor in spec.extra:
            rows = -(-tensor.rows // tp) if tensor.part == "embedding" else tensor.rows
            yield dataclasses.replace(tensor, rows=rows)
    norms = 0
    for layer, count in spec.layer_counts(stage.start, stage.stop):
        for tensor in layer.tensors(spec.hidden_size, tp, shard.ep):
            yield tensor.times(count)
        norms += layer.norms * count
    yield Tensor("norms", "norm", 2 if spec.norm_bias else 1, spec.hidden_size, norms + (1 if stage.last else 0))
    # A tied head is the embedding itself, unless another stage holds that: then this one needs a copy.
    if stage.last and not (spec.tie_word_embeddings and stage.first):
        yield Tensor("head", "head", local_vocab, spec.hidden_size)
    if stage.last and spec.head_bias:
        yield Tensor("head", "bias", 1, local_vocab)

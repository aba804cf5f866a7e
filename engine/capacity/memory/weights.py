"""Bytes of a model's weights on one GPU, in any format."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from engine.capacity.formats import GGUF_TYPES, UNQUANTIZED, ComputeDtype, WeightPrecision
from engine.capacity.model.mixers import Attention
from engine.capacity.model.parameters import tensors_of
from engine.capacity.model.sharding import WHOLE, Shard, Stage
from engine.capacity.model.spec import ModelSpec
from engine.capacity.model.tensors import Tensor

_GGUF_VECTOR_BYTES = 4


@dataclasses.dataclass(frozen=True, slots=True)
class SizedTensor:
    """``count`` equal tensors of ``bytes`` each, with what they are."""

    tensor: Tensor
    bytes: int

    @property
    def part(self) -> str:
        """Of the model."""
        return self.tensor.part

    @property
    def count(self) -> int:
        """How many there are."""
        return self.tensor.count


def weight_bytes(
    spec: ModelSpec, weights: WeightPrecision, dtype: ComputeDtype | None = None, shard: Shard = WHOLE
) -> int:
    """Bytes of all weights that one GPU holds.

    Args:
        spec: the model.
        weights: format of the matrices of attention and MLP.
        dtype: of embedding, head, norms and biases; by default ``weights`` if it is a dtype, else the checkpoint's.
        shard: the GPU's part of the model.

    >>> from engine.capacity.formats import FLOAT16
    >>> from engine.capacity.model.catalog import model_spec
    >>> weight_bytes(model_spec("Llama-2-7b"), FLOAT16.as_weights)  # 6,738,415,616 parameters of 2 bytes
    13476831232
    """
    return sum(stored.bytes * stored.count for stored in sized_tensors(spec, weights, dtype, shard))


def sized_tensors(
    spec: ModelSpec,
    weights: WeightPrecision,
    dtype: ComputeDtype | None = None,
    shard: Shard = WHOLE,
    vocab_multiple: int = 1,
) -> tuple[SizedTensor, ...]:
    """The tensors that one GPU holds, with query/key/value and gate/up fused as serving engines store them.

    Args:
        vocab_multiple: vocabulary rows are padded to a multiple of it (vLLM: 64).

    The other arguments are those of :func:`weight_bytes`.
    """
    as_stored = spec.quantization is not None and weights == spec.quantization
    plain = (weights.dtype or dtype or spec.checkpoint_dtype).bytes
    tensors = tensors_of(spec, shard, -(-spec.vocab_size // vocab_multiple) * vocab_multiple)
    if weights.block is not None:
        return tuple(_gguf_tensors(spec, weights, plain, shard, tensors))
    experts_only = weights.experts_only and spec.is_mixture
    sized = []
    for tensor in tensors:
        form = weights if tensor.linear and (tensor.part == "experts" or not experts_only) else UNQUANTIZED
        if as_stored:
            form = spec.head_format or form if tensor.role == "head" else tensor.own or form
        if form == UNQUANTIZED:
            size = tensor.rows * tensor.columns * plain
        else:
            size = form.matrix_bytes(tensor.rows, tensor.columns, plain, tensor.slices)
        sized.append(SizedTensor(tensor, size))
    return tuple(sized)


def _gguf_tensors(
    spec: ModelSpec, weights: WeightPrecision, plain: int, shard: Shard, tensors: tuple[Tensor, ...]
) -> Iterator[SizedTensor]:
    """As llama.cpp quantizes: embedding and head too, vectors in float32, sensitive matrices in a finer type.

    >>> from engine.capacity.formats import weight_precision
    >>> from engine.capacity.model.catalog import model_spec
    >>> q4_k_m = weight_precision("q4_k_m")
    >>> weight_bytes(model_spec("Llama-3.1-8B"), q4_k_m)  # published file: 4.92 GB, 8 MB of it vocabulary
    4912898048
    """
    coarse, fine = weights.mixture or (weights, weights)
    mixed = weights.mixture is not None
    head = weights if weights.name == "q8_0" else GGUF_TYPES["q6_k"]
    stage = shard.stage_of(spec)
    share = _finer_layers(stage, spec.num_layers) if mixed else 0
    for tensor in tensors:
        if tensor.role == "head" or (tensor.role == "embedding" and mixed and spec.tie_word_embeddings):
            yield SizedTensor(tensor, head.matrix_bytes(tensor.rows, tensor.columns, plain))
        elif not (tensor.linear or tensor.role == "embedding"):
            yield SizedTensor(tensor, tensor.rows * tensor.columns * _GGUF_VECTOR_BYTES)
        else:
            finer = _finer_rows(spec, tensor, shard.tp)
            size = coarse.matrix_bytes(tensor.rows, tensor.columns, plain)
            more = fine.matrix_bytes(finer, tensor.columns, plain) - coarse.matrix_bytes(finer, tensor.columns, plain)
            yield SizedTensor(tensor, size + (more * share // stage.num_layers if stage.num_layers else 0))


def _finer_layers(stage: Stage, layers: int) -> int:
    """Layers in which llama.cpp gives value and down projections more bits: the first and last eighth, and of the
    others every third."""
    eighth = layers // 8
    return sum(
        index < eighth or index >= 7 * layers // 8 or (index - eighth) % 3 == 2
        for index in range(stage.start, stage.stop)
    )


def _finer_rows(spec: ModelSpec, tensor: Tensor, tp: int) -> int:
    """Rows of a matrix that the finer type is for: of the fused query/key/value, the values."""
    if tensor.role in ("mlp_down", "expert_down", "shared_down"):
        return tensor.rows
    if tensor.role == "qkv" and isinstance(spec.attention, Attention):
        return -(-spec.attention.num_kv_heads // tp) * spec.attention.head_dim
    return 0


def lora_bytes(spec: ModelSpec, rank: int, adapters: int, dtype: ComputeDtype, shard: Shard = WHOLE) -> int:
    """Bytes on one GPU that ``adapters`` low-rank adapters (arXiv:2106.09685) of ``rank`` take, on every linear layer
    of attention and MLP but routed experts: rank · (inputs + outputs) each.

    >>> from engine.capacity.formats import BFLOAT16
    >>> from engine.capacity.model.catalog import model_spec  # rank 16 on every projection: 41.9 million parameters
    >>> lora_bytes(model_spec("Llama-3.1-8B"), 16, 1, BFLOAT16) // 2
    41943040
    """
    elements = sum(
        rank * (tensor.slices * tensor.columns + tensor.rows) * tensor.count
        for tensor in tensors_of(spec, shard)
        if tensor.linear and tensor.part != "experts"
    )
    return adapters * elements * dtype.bytes

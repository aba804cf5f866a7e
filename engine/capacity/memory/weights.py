"""Parameters and weight bytes of a model, counted tensor by tensor from its shape.

One list, :func:`tensors_of`, is behind everything: what a GPU holds, in which part of the model it is, how much of it a
token passes through, and (for allocators that round) how large each allocation is.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

from engine.capacity.memory.formats import (
    DTYPE_BYTES,
    GGUF_MIXTURES,
    UNQUANTIZED,
    WeightFormat,
    dtype_name,
    weight_format,
)
from engine.capacity.memory.parallel import Stage, whole_model
from engine.capacity.model.layers import Attention, Tensor
from engine.capacity.model.spec import ModelSpec

PARTS = ("embedding", "attention", "recurrent", "mlp", "experts", "router", "norms", "head")
_GGUF_VECTOR_BYTES = 4


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


@dataclasses.dataclass(frozen=True, slots=True)
class StoredTensor:
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
    spec: ModelSpec,
    format: str | WeightFormat,
    *,
    dtype: str | None = None,
    tp: int = 1,
    ep: int = 1,
    stage: Stage | None = None,
) -> int:
    """Bytes of all weights that one GPU holds.

    Args:
        spec: the model.
        format: of the matrices of attention and MLP, see :func:`engine.capacity.memory.formats.weight_format`.
        dtype: of embedding, head, norms and biases; by default ``format`` if it is a dtype, else the checkpoint's.
        tp: tensor-parallel GPUs that share the model.
        ep: GPUs that its experts are distributed over.
        stage: the GPU's part of a pipeline; by default the whole model.

    >>> from engine.capacity.model.catalog import model_spec
    >>> weight_bytes(model_spec("Llama-2-7b"), "fp16")  # 6,738,415,616 parameters of 2 bytes
    13476831232
    """
    stored = stored_tensors(spec, format, dtype=dtype, tp=tp, ep=ep, stage=stage)
    return sum(tensor.bytes * tensor.count for tensor in stored)


def stored_tensors(
    spec: ModelSpec,
    format: str | WeightFormat,
    *,
    dtype: str | None = None,
    tp: int = 1,
    ep: int = 1,
    stage: Stage | None = None,
    vocab_multiple: int = 1,
) -> tuple[StoredTensor, ...]:
    """The tensors that one GPU holds, with query/key/value and gate/up fused as serving engines store them.

    Args:
        vocab_multiple: vocabulary rows are padded to a multiple of it (vLLM: 64).

    The other arguments are those of :func:`weight_bytes`.

    Raises:
        ConfigError: if a format or dtype is unknown.
    """
    chosen = spec.weight_format(format) if isinstance(format, str) else format
    as_stored = spec.quantization is not None and chosen == spec.quantization
    plain = DTYPE_BYTES[chosen.dtype or dtype_name(dtype or spec.torch_dtype)]
    vocab = -(-spec.vocab_size // vocab_multiple) * vocab_multiple
    held = stage or whole_model(spec)
    if chosen.block is not None:
        return tuple(_gguf_tensors(spec, chosen, plain, tp, ep, held, vocab))
    experts_only = chosen.experts_only and spec.is_mixture
    stored = []
    for tensor in tensors_of(spec, tp=tp, ep=ep, stage=held, vocab=vocab):
        form = chosen if tensor.linear and (tensor.part == "experts" or not experts_only) else UNQUANTIZED
        if as_stored:
            form = spec.head_format or form if tensor.role == "head" else tensor.own or form
        if form == UNQUANTIZED:
            size = tensor.rows * tensor.columns * plain
        else:
            size = form.matrix_bytes(tensor.rows, tensor.columns, plain, tensor.slices)
        stored.append(StoredTensor(tensor, size))
    return tuple(stored)


def tensors_of(
    spec: ModelSpec, *, tp: int = 1, ep: int = 1, stage: Stage | None = None, vocab: int | None = None
) -> tuple[Tensor, ...]:
    """Every weight tensor of one GPU, equal ones counted together. Arguments as above; ``vocab`` rows if padded."""
    return _tensors_of(spec, tp, ep, stage or whole_model(spec), vocab or spec.vocab_size)


@functools.lru_cache(maxsize=4096)
def _tensors_of(spec: ModelSpec, tp: int, ep: int, stage: Stage, vocab: int) -> tuple[Tensor, ...]:
    return tuple(_tensors(spec, tp, ep, stage, vocab))


def _tensors(spec: ModelSpec, tp: int, ep: int, stage: Stage, vocab: int) -> Iterator[Tensor]:
    local_vocab = -(-vocab // tp)
    if stage.first:
        yield Tensor("embedding", "embedding", local_vocab, spec.hidden_size)
        for tensor in spec.extra:
            rows = -(-tensor.rows // tp) if tensor.part == "embedding" else tensor.rows
            yield dataclasses.replace(tensor, rows=rows)
    norms = 0
    for layer, count in spec.layer_counts(stage.start, stage.stop):
        for tensor in layer.tensors(spec.hidden_size, tp, ep):
            yield tensor.times(count)
        norms += layer.norms * count
    yield Tensor("norms", "norm", 2 if spec.norm_bias else 1, spec.hidden_size, norms + (1 if stage.last else 0))
    # A tied head is the embedding itself, unless another stage holds that: then this one needs a copy.
    if stage.last and not (spec.tie_word_embeddings and stage.first):
        yield Tensor("head", "head", local_vocab, spec.hidden_size)
    if stage.last and spec.head_bias:
        yield Tensor("head", "bias", 1, local_vocab)


def _gguf_tensors(
    spec: ModelSpec, format: WeightFormat, plain: int, tp: int, ep: int, stage: Stage, vocab: int
) -> Iterator[StoredTensor]:
    """As llama.cpp quantizes: embedding and head too, vectors in float32, sensitive matrices in a finer type.

    >>> from engine.capacity.model.catalog import model_spec
    >>> weight_bytes(model_spec("Llama-3.1-8B"), "q4_k_m")  # published file: 4.92 GB, 8 MB of it vocabulary
    4912898048
    """
    fine = weight_format(GGUF_MIXTURES.get(format.name, ("", format.name))[1])
    head = format if format.name == "q8_0" else weight_format("q6_k")
    mixed = format.name in GGUF_MIXTURES
    coarse = weight_format(GGUF_MIXTURES[format.name][0]) if mixed else format
    share = _finer_layers(stage, spec.num_layers) if mixed else 0
    for tensor in tensors_of(spec, tp=tp, ep=ep, stage=stage, vocab=vocab):
        if tensor.role == "head" or (tensor.role == "embedding" and mixed and spec.tie_word_embeddings):
            yield StoredTensor(tensor, head.matrix_bytes(tensor.rows, tensor.columns, plain))
        elif not (tensor.linear or tensor.role == "embedding"):
            yield StoredTensor(tensor, tensor.rows * tensor.columns * _GGUF_VECTOR_BYTES)
        else:
            finer = _finer_rows(spec, tensor, tp)
            size = coarse.matrix_bytes(tensor.rows, tensor.columns, plain)
            more = fine.matrix_bytes(finer, tensor.columns, plain) - coarse.matrix_bytes(finer, tensor.columns, plain)
            yield StoredTensor(tensor, size + (more * share // stage.num_layers if stage.num_layers else 0))


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


def lora_bytes(
    spec: ModelSpec, rank: int, adapters: int, dtype: str, *, tp: int = 1, stage: Stage | None = None
) -> int:
    """Bytes on one GPU that ``adapters`` low-rank adapters (arXiv:2106.09685) of ``rank`` take, on every linear layer
    of attention and MLP but routed experts: rank · (inputs + outputs) each.

    >>> from engine.capacity.model.catalog import model_spec  # rank 16 on every projection: 41.9 million parameters
    >>> lora_bytes(model_spec("Llama-3.1-8B"), 16, 1, "bf16") // 2
    41943040
    """
    size = DTYPE_BYTES[dtype_name(dtype)]
    elements = sum(
        rank * (tensor.slices * tensor.columns + tensor.rows) * tensor.count
        for tensor in tensors_of(spec, tp=tp, stage=stage)
        if tensor.linear and tensor.part != "experts"
    )
    return adapters * elements * size

"""Parameters and weight bytes of a model, counted tensor by tensor from its shape.

One list, :func:`stored_tensors`, is behind everything: what a GPU holds, in which part of the model it is, and (for
allocators that round) how large each allocation is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from engine.capacity.formats import DTYPE_BYTES, WeightFormat, dtype_name, weight_format
from engine.capacity.parallel import Stage, kv_heads_per_gpu, whole_model
from engine.capacity.spec import ModelSpec

PARTS = ("embedding", "attention", "mlp", "norms", "head")


@dataclasses.dataclass(frozen=True, slots=True)
class ParameterCount:
    """Parameters by part of the model; ``head`` is 0 where it is tied to the embedding."""

    embedding: int
    attention: int
    mlp: int
    norms: int
    head: int

    @property
    def total(self) -> int:
        """All parameters."""
        return self.embedding + self.attention + self.mlp + self.norms + self.head

    @property
    def active(self) -> int:
        """Parameters that one token passes through: all of them in a dense model."""
        return self.total

    def by_part(self) -> dict[str, int]:
        """``{part: parameters}``."""
        return {part: getattr(self, part) for part in PARTS}


def parameter_count(spec: ModelSpec) -> ParameterCount:
    """Exact number of parameters.

    >>> from engine.capacity.catalog import model_spec
    >>> parameter_count(model_spec("Llama-3.1-8B")).total  # model card: 8.03B; safetensors index: 8,030,261,248
    8030261248
    """
    counts = dict.fromkeys(PARTS, 0)
    for tensor in _tensors(spec, 1, whole_model(spec), spec.vocab_size):
        counts[tensor.part] += tensor.rows * tensor.columns * tensor.count
    return ParameterCount(**counts)


@dataclasses.dataclass(frozen=True, slots=True)
class StoredTensor:
    """``count`` equal tensors of ``bytes`` each, in a part of the model."""

    part: str
    bytes: int
    count: int


def weight_bytes(
    spec: ModelSpec,
    format: str | WeightFormat,
    *,
    dtype: str | None = None,
    tp: int = 1,
    stage: Stage | None = None,
) -> int:
    """Bytes of all weights that one GPU holds.

    Args:
        spec: the model.
        format: of the matrices of attention and MLP, see :func:`engine.capacity.formats.weight_format`.
        dtype: of embedding, head, norms and biases; by default ``format`` if it is a dtype, else the checkpoint's.
        tp: tensor-parallel GPUs that share the model.
        stage: the GPU's part of a pipeline; by default the whole model.

    >>> from engine.capacity.catalog import model_spec
    >>> weight_bytes(model_spec("Llama-2-7b"), "fp16")  # 6,738,415,616 parameters of 2 bytes
    13476831232
    """
    tensors = stored_tensors(spec, format, dtype=dtype, tp=tp, stage=stage)
    return sum(tensor.bytes * tensor.count for tensor in tensors)


def stored_tensors(
    spec: ModelSpec,
    format: str | WeightFormat,
    *,
    dtype: str | None = None,
    tp: int = 1,
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
    chosen = weight_format(format) if isinstance(format, str) else format
    plain = DTYPE_BYTES[chosen.dtype or dtype_name(dtype or spec.torch_dtype)]
    vocab = -(-spec.vocab_size // vocab_multiple) * vocab_multiple
    stored = []
    for tensor in _tensors(spec, tp, stage or whole_model(spec), vocab):
        size = (
            chosen.matrix_bytes(tensor.rows, tensor.columns, plain)
            if tensor.quantizable
            else tensor.rows * tensor.columns * plain
        )
        stored.append(StoredTensor(tensor.part, size, tensor.count))
    return tuple(stored)


@dataclasses.dataclass(frozen=True, slots=True)
class _Tensor:
    part: str
    rows: int
    columns: int
    count: int
    quantizable: bool = False


def _tensors(spec: ModelSpec, tp: int, stage: Stage, vocab: int) -> Iterator[_Tensor]:
    """Every tensor of one GPU, equal ones counted together."""
    local_vocab = -(-vocab // tp)
    if stage.first:
        yield _Tensor("embedding", local_vocab, spec.hidden_size, 1)
    yield from _attention(spec, tp, stage.num_layers)
    yield from _mlp(spec, tp, stage.num_layers)
    yield _Tensor("norms", 1, spec.hidden_size, spec.norms_per_layer * stage.num_layers + (1 if stage.last else 0))
    if spec.qk_norm:
        yield _Tensor("norms", 1, spec.head_dim, 2 * stage.num_layers)
    # A tied head is the embedding itself, unless another stage holds that: then this one needs a copy.
    if stage.last and not (spec.tie_word_embeddings and stage.first):
        yield _Tensor("head", local_vocab, spec.hidden_size, 1)


def _attention(spec: ModelSpec, tp: int, layers: int) -> Iterator[_Tensor]:
    query = -(-spec.num_heads // tp) * spec.head_dim
    qkv = query + 2 * kv_heads_per_gpu(spec.num_kv_heads, tp) * spec.head_dim
    yield _Tensor("attention", qkv, spec.hidden_size, layers, quantizable=True)
    yield _Tensor("attention", spec.hidden_size, query, layers, quantizable=True)
    if spec.attention_bias:
        yield _Tensor("attention", 1, qkv, layers)
    if spec.attention_output_bias:
        yield _Tensor("attention", 1, spec.hidden_size, layers)


def _mlp(spec: ModelSpec, tp: int, layers: int) -> Iterator[_Tensor]:
    # Stages of a pipeline share a mixture's layers in proportion.
    mixtures = spec.num_mixture_layers * layers // spec.num_layers
    if mixtures:
        width, experts = -(-spec.expert_size // tp), mixtures * spec.num_experts
        yield _Tensor("mlp", spec.num_experts, spec.hidden_size, mixtures)
        yield _Tensor("mlp", 2 * width, spec.hidden_size, experts, quantizable=True)
        yield _Tensor("mlp", spec.hidden_size, width, experts, quantizable=True)
    layers -= mixtures
    width = -(-spec.intermediate_size // tp)
    yield _Tensor("mlp", 2 * width, spec.hidden_size, layers, quantizable=True)
    yield _Tensor("mlp", spec.hidden_size, width, layers, quantizable=True)
    if spec.mlp_bias:
        yield _Tensor("mlp", 1, 2 * width, layers)
        yield _Tensor("mlp", 1, spec.hidden_size, layers)

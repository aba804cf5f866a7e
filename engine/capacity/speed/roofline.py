"""The time of one engine step, operator by operator: the longer of arithmetic and memory traffic.

time = max(FLOPs / (peak · efficiency), bytes / (bandwidth · efficiency)) (Williams, Waterman, Patterson 2009,
doi:10.1145/1498765.1498785).
All figures are of one GPU of a tensor-parallel group; a pipeline's stages are passed one after the other.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator

from engine.capacity.formats import FLOAT32, ComputeDtype, WeightPrecision
from engine.capacity.hardware import Gpu
from engine.capacity.memory.request import CompleteRequest
from engine.capacity.memory.weights import SizedTensor, sized_tensors
from engine.capacity.model.layers import MixtureOfExperts
from engine.capacity.model.mixers import Attention, LatentAttention
from engine.capacity.model.spec import ModelSpec
from engine.capacity.model.tensors import share

#: Overhead of a step seen in serving engines, seconds: a layer, a request, a step.
LAYER_OVERHEAD_S, REQUEST_OVERHEAD_S, STEP_OVERHEAD_S = 32e-6, 4e-6, 126e-6

GROUPS = {
    "qkv": "attention projections",
    "query": "attention projections",
    "query_down": "attention projections",
    "query_up": "attention projections",
    "kv_down": "attention projections",
    "kv_up": "attention projections",
    "attention_output": "attention projections",
    "recurrent_input": "recurrent layers",
    "recurrent_output": "recurrent layers",
    "gates": "recurrent layers",
    "mlp_up": "MLP",
    "mlp_down": "MLP",
    "shared_up": "MLP",
    "shared_down": "MLP",
    "expert_up": "experts",
    "expert_down": "experts",
    "latent_down": "experts",
    "latent_up": "experts",
    "output_down": "attention projections",
    "compress_values": "attention projections",
    "compress_gates": "attention projections",
    "index_query": "attention projections",
    "index_key": "attention projections",
    "index_weights": "attention projections",
    "head_gate": "attention projections",
    "attention_linear": "attention projections",
    "mlp_linear": "MLP",
    "per_layer_gate": "MLP",
    "per_layer_projection": "MLP",
    "per_layer_model_projection": "MLP",
    "router": "experts",
    "head": "head",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """What one step works on. Averages need not be whole numbers.

    Attributes:
        decodes: sequences that get their next token, or have ``tokens_each`` - 1 drafts verified.
        context: tokens that each of them has in the cache.
        prefill: prompt tokens; past: tokens before them that are in the cache already.
        tokens_each: tokens of a decoding sequence in this step.
    """

    decodes: float = 0.0
    context: float = 0.0
    prefill: float = 0.0
    past: float = 0.0
    tokens_each: float = 1.0

    @property
    def tokens(self) -> float:
        """All tokens of the step."""
        return self.decodes * self.tokens_each + self.prefill

    @property
    def logits(self) -> float:
        """Positions whose next token is computed."""
        return self.decodes * self.tokens_each + (1.0 if self.prefill else 0.0)


@dataclasses.dataclass(frozen=True, slots=True)
class Operator:
    """One kind of operator in all layers: FLOPs, bytes moved, seconds, and which of the two limits it.

    ``bound`` is "compute", "memory", "link" or "overhead".
    """

    name: str
    flops: float
    bytes: float
    seconds: float
    bound: str

    @property
    def intensity(self) -> float:
        """FLOPs a byte."""
        return self.flops / self.bytes if self.bytes else 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class _Matrix:
    """A weight matrix of all layers: per token FLOPs and activation bytes, bytes of the weights."""

    name: str
    flops: float
    moved: float
    weights: float
    per_logit: bool
    experts: float
    top_k: float


@dataclasses.dataclass(frozen=True, slots=True)
class _Cache:
    """Attention of ``layers`` equal layers: bytes a cached token, FLOPs a (query, key) pair decoding and prefilling."""

    layers: int
    window: float
    token_bytes: float
    decode_flops: float
    prefill_flops: float


class StepModel:
    """Times of the steps of one deployment. Pure: the same batch takes the same time.

    Args:
        request: the deployment.

    Attributes:
        peak_flops, bandwidth: what large operations reach: FLOP/s and bytes/s, efficiencies included.
    """

    def __init__(self, request: CompleteRequest) -> None:
        gpu = request.gpu
        assert gpu.bandwidth_gb_s, "see has_speeds"
        assert gpu.bf16_tflops, "see has_speeds"
        self.request = request
        self.bandwidth = gpu.bandwidth_gb_s * 1e9 * gpu.bandwidth_efficiency
        self.peak_flops = matrix_tflops(gpu, request.weights, request.dtype) * 1e12 * gpu.flops_efficiency
        self.attention_flops = matrix_tflops(gpu, request.dtype.as_weights, request.dtype) * 1e12 * gpu.flops_efficiency
        self._size = request.dtype.bytes
        self._matrices = tuple(_matrices(request))
        self._caches = tuple(_caches(request))
        self._states = _states(request)
        self._norm_bytes = 4.0 * request.spec.num_layers * request.spec.hidden_size * self._size
        self._sums = _sums_per_token(request)

    def seconds(self, batch: Batch) -> float:
        """Duration of the step.

        >>> from engine.capacity import PlanRequest, find_gpu, model_spec
        >>> from engine.capacity.memory.request import complete
        >>> full = complete(PlanRequest(model_spec("Llama-3.1-8B"), find_gpu("H100 SXM 80GB"), context=8192))
        >>> round(1e3 * StepModel(full).seconds(Batch(decodes=1, context=1024)), 1)  # 15 GB of weights at 2.85 TB/s
        6.5
        """
        total = self._overhead(batch) + self._communication(batch)
        for _, flops, moved, peak in self._work(batch):
            compute, memory = flops / peak, moved / self.bandwidth
            total += compute if compute > memory else memory
        return total

    def operators(self, batch: Batch) -> tuple[Operator, ...]:
        """The step by kind of operator, longest first; seconds add up to :meth:`seconds`."""
        merged: dict[str, list[float]] = {}
        for name, flops, moved, peak in self._work(batch):
            compute, memory = flops / peak, moved / self.bandwidth
            entry = merged.setdefault(name, [0.0, 0.0, 0.0, 0.0])
            entry[0] += flops
            entry[1] += moved
            entry[2] += max(compute, memory)
            entry[3] += compute if compute > memory else -memory
        rows = [
            Operator(name, flops, moved, seconds, "compute" if sign > 0 else "memory")
            for name, (flops, moved, seconds, sign) in merged.items()
        ]
        link = self._communication(batch)
        if link:
            rows.append(Operator("communication", 0.0, batch.tokens * self._sums * self._size, link, "link"))
        rows.append(Operator("overhead", 0.0, 0.0, self._overhead(batch), "overhead"))
        return tuple(sorted(rows, key=lambda row: -row.seconds))

    def _work(self, batch: Batch) -> Iterator[tuple[str, float, float, float]]:
        """(name, FLOPs, bytes, peak FLOP/s) of every operator."""
        tokens, logits = batch.tokens, batch.logits
        for matrix in self._matrices:
            count = logits if matrix.per_logit else tokens
            read = 1.0
            if matrix.experts:
                read = touched_experts(matrix.experts, matrix.top_k, tokens) / matrix.experts
            yield matrix.name, matrix.flops * count, matrix.weights * read + matrix.moved * count, self.peak_flops
        for cache in self._caches:
            yield ("attention", *self._attention(cache, batch), self.attention_flops)
        if self._states:
            touched = batch.decodes + (1.0 if batch.prefill else 0.0)
            yield (
                "recurrent layers",
                6.0 * self._states / 4 * tokens,
                2.0 * self._states * touched,
                self.attention_flops,
            )
        yield "norms and residuals", 0.0, self._norm_bytes * tokens, self.peak_flops

    def _attention(self, cache: _Cache, batch: Batch) -> tuple[float, float]:
        seen = min(batch.context, cache.window)
        flops = cache.decode_flops * batch.decodes * batch.tokens_each * seen
        moved = cache.token_bytes * batch.decodes * (seen + batch.tokens_each)
        if batch.prefill:
            keys = min(batch.past + (batch.prefill + 1.0) / 2.0, cache.window)
            flops += cache.prefill_flops * batch.prefill * keys
            moved += cache.token_bytes * (min(batch.past, cache.window) + 2.0 * batch.prefill)
        return cache.layers * flops, cache.layers * moved

    def _communication(self, batch: Batch) -> float:
        request, gpu = self.request, self.request.gpu
        link = (gpu.link_gb_s or _SLOW_LINK_GB_S) * 1e9
        hop = gpu.hop_us * 1e-6
        each = batch.tokens * request.spec.hidden_size * self._size
        total = 0.0
        if request.tp > 1:
            total += self._sums * all_reduce_seconds(each, request.tp, link, hop)
            logits = batch.logits * request.spec.vocab_size * self._size
            total += logits * (request.tp - 1) / request.tp / link + hop
        return total + (request.pp - 1) * (each / link + hop)

    def _overhead(self, batch: Batch) -> float:
        requests = batch.decodes + (1.0 if batch.prefill else 0.0)
        return STEP_OVERHEAD_S + LAYER_OVERHEAD_S * self.request.spec.num_layers + REQUEST_OVERHEAD_S * requests


_SLOW_LINK_GB_S = 13.0


def has_speeds(gpu: Gpu) -> bool:
    """True if the GPU's speeds are known, without which no time can be told."""
    return bool(gpu.bandwidth_gb_s and gpu.bf16_tflops)


def matrix_tflops(gpu: Gpu, weights: WeightPrecision, dtype: ComputeDtype) -> float:
    """Dense peak at which matrices of that weight format are multiplied, 10^12 FLOP/s.

    FP8 weights use FP8 arithmetic where the GPU has it, ``w8a8`` and ``w4a8`` INT8 arithmetic; other integer and 4-bit
    formats are widened to the compute dtype; float32 runs at half the 16-bit rate (TF32).

    >>> from engine.capacity.formats import BFLOAT16, weight_precision
    >>> from engine.capacity.hardware import find_gpu
    >>> h100, a100 = find_gpu("H100 SXM 80GB"), find_gpu("A100 SXM 80GB")
    >>> [matrix_tflops(h100, weight_precision(name), BFLOAT16) for name in ("bfloat16", "fp8", "int4-g128")]
    [989.0, 1979.0, 989.0]
    >>> [matrix_tflops(a100, weight_precision(name), BFLOAT16) for name in ("int8", "w8a8")]
    [312.0, 624.0]
    """
    base = gpu.bf16_tflops or 0.0
    if dtype == FLOAT32:
        base /= 2
    own = {"fp8": gpu.fp8_tflops, "int8": gpu.int8_tops, None: None}[weights.products]
    return own or base


def touched_experts(experts: float, top_k: float, tokens: float) -> float:
    """Experts of a layer that at least one of ``tokens`` tokens has chosen, on average, if all are equally likely:
    E · (1 - (1 - k/E)^tokens); never more than min(E, tokens · k).

    >>> round(touched_experts(8, 2, 1), 2), round(touched_experts(8, 2, 4), 2)  # Mixtral
    (2.0, 5.47)
    """
    if tokens <= 0:
        return 0.0
    return experts * (1.0 - math.pow(1.0 - min(top_k / experts, 1.0), tokens))


def all_reduce_seconds(size: float, gpus: int, link_bytes_s: float, hop_s: float) -> float:
    """Ring all-reduce: 2 · bytes · (n - 1)/n / link + 2 · (n - 1) hops.

    >>> round(1e6 * all_reduce_seconds(2**20, 8, 450e9, 1e-6), 1)  # 1 MiB over NVLink of H100, µs
    18.1
    """
    return 2.0 * size * (gpus - 1) / gpus / link_bytes_s + 2.0 * (gpus - 1) * hop_s


def _matrices(request: CompleteRequest) -> Iterator[_Matrix]:
    spec = request.spec
    multiple = request.profile.vocab_multiple
    stored = sized_tensors(spec, request.weights, request.dtype, request.shard(), multiple)
    for item in stored:
        tensor = item.tensor
        if tensor.role == "embedding" and spec.tie_word_embeddings:
            yield _matrix(item, "head", spec, request)
        elif tensor.role in GROUPS:
            yield _matrix(item, tensor.role, spec, request)


def _matrix(item: SizedTensor, role: str, spec: ModelSpec, request: CompleteRequest) -> _Matrix:
    tensor, size = item.tensor, request.dtype.bytes
    count, experts, top_k = float(tensor.count), 0.0, 0.0
    if tensor.part == "experts":
        mixture = next(kind.mlp for kind in spec.kinds if isinstance(kind.mlp, MixtureOfExperts))
        local = share(mixture.num_experts, request.ep)
        experts, top_k = float(local), mixture.top_k * local / mixture.num_experts
        count = tensor.count / local * top_k  # layers · expert visits of a token on this GPU
    return _Matrix(
        name=GROUPS[role],
        flops=2.0 * tensor.rows * tensor.columns * count,
        moved=(tensor.rows + tensor.columns) * size * count,
        weights=float(item.bytes) * tensor.count,
        per_logit=role == "head",
        experts=experts,
        top_k=top_k,
    )


def _caches(request: CompleteRequest) -> Iterator[_Cache]:
    spec, tp = request.spec, request.tp
    for layer, count in spec.layer_counts(0, spec.num_layers):
        mixer = layer.mixer
        vectors, width = mixer.cached_heads(tp)
        token_bytes = float(vectors * request.kv_dtype.bytes_per_head(width)) if vectors else 0.0
        # Of a sparse layer only what its index picks is read.
        window = float(min(layer.window or 2**40, layer.reads or 2**40))
        if isinstance(mixer, Attention):
            pair = 4.0 * share(mixer.num_heads, tp) * mixer.head_dim
            yield _Cache(count, window, token_bytes, pair, pair)
        elif isinstance(mixer, LatentAttention):
            heads = share(mixer.num_heads, tp)
            absorbed = 2.0 * heads * (2 * mixer.kv_rank + mixer.rope_dim)
            full = 2.0 * heads * (mixer.nope_dim + mixer.rope_dim + mixer.value_dim)
            yield _Cache(count, window, token_bytes, absorbed, full)


def _states(request: CompleteRequest) -> float:
    """Bytes of recurrent state of one sequence on this GPU, float32."""
    spec = request.spec
    return float(
        sum(
            4 * count * layer.mixer.state_elements(request.tp)[0]
            for layer, count in spec.layer_counts(0, spec.num_layers)
        )
    )


def _sums_per_token(request: CompleteRequest) -> int:
    """All-reduces of the hidden width in a step: one after each mixer and each MLP."""
    spec = request.spec
    return sum(
        count * (int(layer.mixer.state_elements(1)[0] > 0 or layer.attends) + int(layer.mlp.active_width > 0))
        for layer, count in spec.layer_counts(0, spec.num_layers)
    )


@functools.lru_cache(maxsize=1024)
def step_model(request: CompleteRequest) -> StepModel:
    """The step model of a deployment, made once."""
    return StepModel(request)

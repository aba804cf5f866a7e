"""What a plan says besides numbers: what an operator should look at, and what the numbers rest on."""

from __future__ import annotations

from collections.abc import Iterator

from engine.capacity.formats import BFLOAT16, FLOAT16
from engine.capacity.memory.profiles import peak_activation_bytes
from engine.capacity.memory.request import CompleteRequest
from engine.capacity.model.mixers import CompressedAttention
from engine.capacity.text import gib

#: Above this utilization CUDA graphs and the driver get into difficulties.
_HIGH_UTILIZATION = 0.97
#: A step's MLP may exceed the fitted activation peak by this factor before it is worth a warning.
_FIT_TOLERANCE = 1.5


def warnings_of(request: CompleteRequest, max_concurrency: int) -> tuple[str, ...]:
    """What an operator should look at before trusting or deploying the plan.

    Args:
        max_concurrency: sequences of the planned context that memory holds.
    """
    return (
        *_of_inputs(request),
        *_of_precisions(request),
        *_of_the_cache(request),
        *_of_the_engine(request, max_concurrency),
    )


def _of_inputs(request: CompleteRequest) -> Iterator[str]:
    gpu = request.gpu
    if gpu.usable_source.startswith("estimate"):
        yield (
            f"The usable memory of {gpu.name} is an estimate ({gpu.usable_source.removeprefix('estimate: ')}): "
            f"{gpu.usable_gib:,.2f} GiB. Give the measured value if you have the machine."
        )
    yield from request.spec.notes
    if request.draft is not None:
        yield from (f"{request.draft.name}: {note}" for note in request.draft.notes)


def _of_precisions(request: CompleteRequest) -> Iterator[str]:
    gpu, spec, weights = request.gpu, request.spec, request.weights
    if spec.kv_dtype not in (None, request.kv_dtype.name):
        yield (
            f"The checkpoint asks for a KV cache in {str(spec.kv_dtype).upper()}, planned is {request.kv_dtype.name}: "
            f"give kv_dtype={spec.kv_dtype} for the smaller one."
        )
    if weights.products == "fp8" and gpu.bf16_tflops and not gpu.fp8_tflops:
        yield f"{gpu.name} has no FP8 arithmetic: FP8 weights save memory there, not time."
    if weights.products == "int8" and gpu.int8_tops and gpu.bf16_tflops and gpu.int8_tops < gpu.bf16_tflops:
        yield (
            f"{gpu.name} multiplies INT8 at {gpu.int8_tops:,.0f} TOPS, slower than BF16 at {gpu.bf16_tflops:,.0f} "
            "TFLOPS: 8-bit activations cost time there. Choose FP8."
        )
    if FLOAT16 in (request.dtype, weights.dtype) and spec.checkpoint_dtype == BFLOAT16:
        yield "The checkpoint is bfloat16: in float16 large activations can overflow."


def _of_the_cache(request: CompleteRequest) -> Iterator[str]:
    spec = request.spec
    if spec.is_latent and request.tp > 1:
        yield (
            f"Each of the {request.tp} tensor-parallel GPUs keeps the whole latent KV cache: it is not divided. "
            "Data-parallel attention keeps it once."
        )
    elif request.tp > spec.num_kv_heads > 0:
        yield (
            f"{request.tp} GPUs share {spec.num_kv_heads} key/value heads: each head is kept on several GPUs, so the "
            "KV cache does not shrink any further."
        )
    if spec.is_recurrent and request.profile.torch_cuda:
        yield "Recurrent layers: vLLM enlarges its blocks until they hold a state, so it reports fewer, larger blocks."
    if request.profile.expands_latent and spec.is_latent and not isinstance(spec.attention, CompressedAttention):
        yield "transformers caches full keys and values of latent attention, not the latent."


def _of_the_engine(request: CompleteRequest, max_concurrency: int) -> Iterator[str]:
    profile = request.profile
    if max_concurrency > request.max_num_seqs and not profile.caps_cache:
        yield (
            f"Memory holds {max_concurrency:,} sequences, but the engine is set to {request.max_num_seqs:,} at most: "
            "raise max_num_seqs to use them all."
        )
    if profile.torch_cuda and request.utilization > _HIGH_UTILIZATION:
        yield f"Above a utilization of {_HIGH_UTILIZATION:g} CUDA graphs and the driver have little left."
    if profile.logits_fit is not None:
        yield from _outside_the_fit(request)


def _outside_the_fit(request: CompleteRequest) -> Iterator[str]:
    # The fit was made where the sampler's logits dominate; with few sequences the MLP of a large step may need more.
    spec, tokens = request.spec, request.token_budget or 0
    width = -(-spec.intermediate_size // request.tp)
    forward = tokens * 3 * (width + spec.hidden_size) * request.dtype.bytes
    fitted = peak_activation_bytes(request.profile, spec, request.largest_step, request.dtype, request.shard())
    if forward > _FIT_TOLERANCE * fitted:
        yield (
            f"Activations of {gib(fitted)} are fitted on the logits of {request.max_num_seqs:,} sequences; the MLP of "
            f"a {tokens:,}-token step may need up to {gib(forward)}. Keep the difference free, or lower its token "
            "budget."
        )


def assumptions_of(request: CompleteRequest) -> tuple[str, ...]:
    """What the numbers rest on."""
    gpu, profile = request.gpu, request.profile
    lines = [
        f"{gpu.name}: {gpu.usable_gib:,.2f} GiB usable ({gpu.usable_source}).",
        f"{profile.label} at a utilization of {request.utilization:g}, {request.max_num_seqs:,} sequences at most, "
        f"blocks of {request.block_size} tokens.",
        *profile.assumptions,
    ]
    if request.spec.kv_dtype == request.kv_dtype.name:
        lines.append(f"KV cache in {request.kv_dtype.name.upper()}: the checkpoint asks for it.")
    if request.pp > 1:
        lines.append("Figures are of the pipeline stage that limits.")
    return tuple(lines)

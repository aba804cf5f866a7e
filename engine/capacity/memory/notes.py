"""What a plan says in words: what an operator should look at, and what the numbers rest on."""

from __future__ import annotations

from engine.capacity.memory.formats import DTYPE_BYTES, INT8_PRODUCTS
from engine.capacity.memory.profiles import peak_activation_bytes
from engine.capacity.memory.request import CompleteRequest
from engine.capacity.model.layers import CompressedAttention
from engine.capacity.words import gib

#: Above this utilization CUDA graphs and the driver get into difficulties.
_HIGH_UTILIZATION = 0.97
#: A step's MLP may exceed the fitted activation peak by this factor before it is worth a warning.
_FIT_TOLERANCE = 1.5


def warnings_of(request: CompleteRequest, max_concurrency: int) -> tuple[str, ...]:
    """What an operator should look at before trusting or deploying the plan.

    Args:
        max_concurrency: sequences of the planned context that memory holds.
    """
    warnings = []
    gpu, spec = request.gpu, request.spec
    if gpu.usable_source.startswith("estimate"):
        warnings.append(
            f"The usable memory of {gpu.name} is an estimate ({gpu.usable_source.removeprefix('estimate: ')}): "
            f"{gpu.usable_gib:,.2f} GiB. Give the measured value if you have the machine."
        )
    warnings += spec.notes
    if request.draft is not None:
        warnings += [f"{request.draft.name}: {note}" for note in request.draft.notes]
    if spec.kv_dtype not in (None, request.kv_dtype):
        warnings.append(
            f"The checkpoint asks for a KV cache in {str(spec.kv_dtype).upper()}, planned is {request.kv_dtype}: give "
            f"kv_dtype={spec.kv_dtype} for the smaller one."
        )
    if request.weights.startswith("fp8") and gpu.bf16_tflops and not gpu.fp8_tflops:
        warnings.append(f"{gpu.name} has no FP8 arithmetic: FP8 weights save memory there, not time.")
    if request.weights in INT8_PRODUCTS and gpu.int8_tops and gpu.bf16_tflops and gpu.int8_tops < gpu.bf16_tflops:
        warnings.append(
            f"{gpu.name} multiplies INT8 at {gpu.int8_tops:,.0f} TOPS, slower than BF16 at {gpu.bf16_tflops:,.0f} "
            "TFLOPS: 8-bit activations cost time there. Choose FP8."
        )
    if "float16" in (request.dtype, request.weights) and spec.torch_dtype == "bfloat16":
        warnings.append("The checkpoint is bfloat16: in float16 large activations can overflow.")
    if spec.is_latent and request.tp > 1:
        warnings.append(
            f"Each of the {request.tp} tensor-parallel GPUs keeps the whole latent KV cache: it is not divided. "
            "Data-parallel attention keeps it once."
        )
    elif request.tp > spec.num_kv_heads > 0:
        warnings.append(
            f"{request.tp} GPUs share {spec.num_kv_heads} key/value heads: each head is kept on several GPUs, so the "
            "KV cache does not shrink any further."
        )
    if spec.is_recurrent and request.profile.torch_cuda:
        warnings.append(
            "Recurrent layers: vLLM enlarges its blocks until they hold a state, so it reports fewer, larger blocks."
        )
    expands = request.profile.expands_latent and not isinstance(spec.attention, CompressedAttention)
    if spec.is_latent and expands:
        warnings.append("transformers caches full keys and values of latent attention, not the latent.")
    if max_concurrency > request.max_num_seqs and not request.profile.caps_cache:
        warnings.append(
            f"Memory holds {max_concurrency:,} sequences, but the engine is set to {request.max_num_seqs:,} at most: "
            "raise max_num_seqs to use them all."
        )
    if request.profile.torch_cuda and request.utilization > _HIGH_UTILIZATION:
        warnings.append(f"Above a utilization of {_HIGH_UTILIZATION:g} CUDA graphs and the driver have little left.")
    if request.profile.logits_fit is not None:
        warnings.extend(_outside_the_fit(request))
    return tuple(warnings)


def _outside_the_fit(request: CompleteRequest) -> list[str]:
    # The fit was made where the sampler's logits dominate; with few sequences the MLP of a large step may need more.
    spec, tokens = request.spec, request.token_budget or 0
    width = -(-spec.intermediate_size // request.tp)
    forward = tokens * 3 * (width + spec.hidden_size) * DTYPE_BYTES[request.dtype]
    fitted = peak_activation_bytes(
        request.profile,
        spec,
        context=request.context,
        max_num_seqs=request.max_num_seqs,
        token_budget=None,
        dtype=request.dtype,
        tp=request.tp,
    )
    if forward <= _FIT_TOLERANCE * fitted:
        return []
    return [
        f"Activations of {gib(fitted)} are fitted on the logits of {request.max_num_seqs:,} sequences; the MLP of a "
        f"{tokens:,}-token step may need up to {gib(forward)}. Keep the difference free, or lower its token budget."
    ]


def assumptions_of(request: CompleteRequest) -> tuple[str, ...]:
    """What the numbers rest on."""
    gpu, profile = request.gpu, request.profile
    lines = [
        f"{gpu.name}: {gpu.usable_gib:,.2f} GiB usable ({gpu.usable_source}).",
        f"{profile.label} at a utilization of {request.utilization:g}, {request.max_num_seqs:,} sequences at most, "
        f"blocks of {request.block_size} tokens.",
        *profile.assumptions,
    ]
    if request.spec.kv_dtype == request.kv_dtype:
        lines.append(f"KV cache in {request.kv_dtype.upper()}: the checkpoint asks for it.")
    if request.pp > 1:
        lines.append("Figures are of the pipeline stage that limits.")
    return tuple(lines)

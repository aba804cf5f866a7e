"""The command that starts a planned deployment: vLLM, SGLang, and this engine."""

from __future__ import annotations

import dataclasses
import shlex

from engine.capacity.memory.request import CompleteRequest
from engine.capacity.speed.workload import PlannedWorkload


@dataclasses.dataclass(frozen=True, slots=True)
class Launch:
    """A command line for one replica, and what it cannot express."""

    engine: str
    command: str
    remarks: tuple[str, ...] = ()


def launch_commands(request: CompleteRequest, workload: PlannedWorkload | None = None) -> tuple[Launch, ...]:
    """Commands for one replica of the plan; ``request.dp`` of them make the deployment.

    >>> from engine.capacity import PlanRequest, find_gpu, model_spec
    >>> from engine.capacity.memory.request import complete
    >>> full = complete(PlanRequest(model_spec("Llama-3.1-8B"), find_gpu("H100 SXM 80GB"), context=8192))
    >>> launch_commands(full)[0].command
    'vllm serve Llama-3.1-8B --dtype bfloat16 --max-model-len 8192 --max-num-seqs 256 --gpu-memory-utilization 0.9'
    """
    return (_vllm(request, workload), _sglang(request, workload), _headroom(request, workload))


_CHECKPOINTS = "Give the repository of a checkpoint quantized to {weights}: it is not made at load."


def _vllm(request: CompleteRequest, workload: PlannedWorkload | None) -> Launch:
    parts = ["vllm", "serve", request.spec.name, "--dtype", request.dtype.name, "--max-model-len", str(request.context)]
    parts += ["--max-num-seqs", str(request.max_num_seqs), "--gpu-memory-utilization", f"{request.utilization:g}"]
    for flag, value in (("--tensor-parallel-size", request.tp), ("--pipeline-parallel-size", request.pp)):
        parts += [flag, str(value)] if value > 1 else []
    parts += ["--enable-expert-parallel"] if request.ep > 1 else []
    parts += ["--kv-cache-dtype", "fp8"] if request.kv_dtype.name == "fp8" else []
    parts += ["--enable-lora", "--max-loras", str(request.lora_adapters)] if request.lora_adapters else []
    parts += ["--max-lora-rank", str(request.lora_rank)] if request.lora_adapters else []
    remarks = []
    if request.weights.name == "fp8" and not request.spec.checkpoint_format:
        parts += ["--quantization", "fp8"]
    elif _needs_checkpoint(request):
        remarks.append(_CHECKPOINTS.format(weights=request.weights.name))
    if request.kv_dtype.name in ("int8", "int4"):
        remarks.append(f"vLLM has no {request.kv_dtype.name.upper()} KV cache: FP8 is its smallest.")
    if workload is not None and workload.draft_length:
        model = f'"model": "{request.draft.name}", ' if request.draft else '"method": "ngram", '
        parts += ["--speculative-config", f'{{{model}"num_speculative_tokens": {workload.draft_length}}}']
    return Launch("vLLM", shlex.join(parts), tuple(remarks))


def _sglang(request: CompleteRequest, workload: PlannedWorkload | None) -> Launch:
    parts = ["python", "-m", "sglang.launch_server", "--model-path", request.spec.name, "--dtype", request.dtype.name]
    parts += ["--context-length", str(request.context), "--max-running-requests", str(request.max_num_seqs)]
    parts += ["--mem-fraction-static", f"{request.utilization:g}"]
    for flag, value in (("--tp", request.tp), ("--pp-size", request.pp), ("--ep-size", request.ep)):
        parts += [flag, str(value)] if value > 1 else []
    parts += ["--kv-cache-dtype", "fp8_e4m3"] if request.kv_dtype.name == "fp8" else []
    remarks = ["Its memory fraction covers weights and KV cache only: lower it if activations do not fit next to them."]
    if request.weights.name == "fp8" and not request.spec.checkpoint_format:
        parts += ["--quantization", "fp8"]
    elif _needs_checkpoint(request):
        remarks.append(_CHECKPOINTS.format(weights=request.weights.name))
    if workload is not None and workload.draft_length:
        method = "STANDALONE" if request.draft else "NGRAM"
        parts += ["--speculative-algorithm", method, "--speculative-num-draft-tokens", str(workload.draft_length + 1)]
        parts += ["--speculative-draft-model-path", request.draft.name] if request.draft else []
    return Launch("SGLang", shlex.join(parts), tuple(remarks))


def _headroom(request: CompleteRequest, workload: PlannedWorkload | None) -> Launch:
    settings = [f"max_model_len={request.context}", f"max_num_seqs={request.max_num_seqs}"]
    settings.append(f"memory_limit_gib={request.gpu.usable_gib * request.utilization:.2f}")
    remarks = []
    if request.weights.name in ("int8", "w4a8", "w8a8", "fp8"):
        settings.append(f"weights={request.weights.name}")
    elif request.weights.name.startswith("int4-g"):
        settings += ["weights=int4", f"group_size={request.weights.name.removeprefix('int4-g')}"]
    elif _needs_checkpoint(request):
        remarks.append(f"This engine has no {request.weights.name} weights.")
    if request.kv_dtype.name in ("fp8", "int8", "int4"):
        settings.append(f"kv_dtype={request.kv_dtype.name}")
    if request.tp * request.pp > 1:
        remarks.append("This engine runs on one GPU: it cannot start this plan.")
    if workload is not None and workload.draft_length and request.draft is None:
        settings += ["speculation=ngram", f"draft_length={workload.draft_length}"]
    parts = ["headroom", "serve", "--model", request.spec.name, "--dtype", request.dtype.name]
    for setting in settings:
        parts += ["--set", setting]
    return Launch("Headroom", shlex.join(parts), tuple(remarks))


def _needs_checkpoint(request: CompleteRequest) -> bool:
    return request.weights.name not in (request.dtype.name, request.spec.checkpoint_format)

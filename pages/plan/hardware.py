"""On what it runs: the GPU, how the model is spread over several, and the precisions of weights and KV cache."""

from __future__ import annotations

from typing import Any

import streamlit as st

from engine.capacity import Gpu, ModelSpec, gpus, possible_tp
from pages.plan.fields import DEFAULTS, choice, clamp, key, nearest, number, state, widget
from pages.plan.machine import PREFIX, machine_gpus

EXPERTS = {"split": "split like the rest", "whole": "whole, spread over the GPUs"}
WEIGHTS = {
    "bf16": "BF16",
    "fp8": "FP8",
    "int8": "INT8",
    "w8a8": "INT8 W8A8",
    "int4-g128": "INT4 g128",
    "int4-g64": "INT4 g64",
    "int4-g32": "INT4 g32",
    "mxfp4": "MXFP4",
    "nvfp4": "NVFP4",
    "q8_0": "GGUF Q8_0",
    "q4_k_m": "GGUF Q4_K_M",
}
KV_DTYPES = {"fp8": "FP8", "int8": "INT8", "int4": "INT4"}
_DTYPES = {"bfloat16": "BF16", "float16": "FP16", "float32": "FP32"}
_MOST_GPUS = 16


def precisions(spec: ModelSpec) -> None:
    """Draw the number formats of weights and KV cache; the inputs hold them."""
    dtype = _DTYPES[spec.torch_dtype]
    own = {"auto": f"{dtype} (as is)"}
    weights = {"auto": f"{(spec.checkpoint_format or dtype).upper()} (as is)"}
    left, right = st.columns(2)
    with left:
        choice(
            "Weight precision",
            "weights",
            weights | WEIGHTS,
            "Matrices of attention and MLP; embedding, head and norms keep the checkpoint's own format. FP8 and INT8 "
            "take one byte a weight; INT4 half a byte, and a scale and zero point for each group of 128, 64 or 32. "
            "W8A8: activations have 8 bits too, so that products run at the GPU's INT8 rate.",
        )
    with right:
        choice(
            "KV cache precision",
            "kv",
            own | KV_DTYPES,
            "Number format of stored keys and values. FP8 halves the cache, INT4 takes about a quarter; both change "
            "the output slightly.",
        )


def hardware(spec: ModelSpec) -> tuple[Gpu, dict[str, Any]]:
    """Draw the GPU and how the model is spread; the GPU, and ``tp``, ``pp``, ``dp``, ``ep`` of the request."""
    devices = {gpu.name: gpu for gpu in gpus()} | machine_gpus()
    labels = list(devices)
    left, right = st.columns([2, 1])
    with left:
        chosen = st.selectbox(
            "GPU",
            labels,
            index=labels.index(DEFAULTS["gpu"]),
            help="Memory is what a process can really allocate, in GiB (2^30 bytes): less than the nameplate.",
            on_change=_engine_follows_gpu,
            **widget("gpu"),
        )
    sizes = possible_tp(spec, _MOST_GPUS)
    with right:
        clamp("tp", sizes)
        tp = st.selectbox(
            "GPUs",
            sizes,
            index=nearest(sizes, DEFAULTS["tp"]),
            help="How many of them hold one copy of the model, tensor parallel: each GPU holds a part of every layer. "
            "Listed are the numbers that split this model's heads evenly.",
            **widget("tp"),
        )
    left, right = st.columns(2)
    with left:
        dp = number("Copies of the model", "dp", 1, 1024, "Data parallel: each copy takes a share of the requests.")
    with right:
        longest = min(spec.num_layers, _MOST_GPUS)
        stages = st.session_state.get(key("pp"))
        if isinstance(stages, int) and stages > longest:  # from a model of more layers
            st.session_state[key("pp")] = longest
        pp = number("Pipeline stages", "pp", 1, longest, "Pipeline parallel: each stage of GPUs holds some layers.")
    gpu, tp = devices[str(chosen)], int(tp or 1)
    st.caption(f"{gpu.usable_gib:,.2f} GiB usable each ({gpu.usable_source})")
    return gpu, {"tp": tp, "pp": pp, "dp": dp, "ep": _experts(spec, tp)}


def _experts(spec: ModelSpec, tp: int) -> int:
    """GPUs that a mixture's experts are spread over, whole; 1 where they are split, or there is no choice."""
    if not spec.is_mixture or tp == 1:
        return 1
    help_text = "Split: each GPU holds a part of every expert. Whole (expert parallel): each holds some of the experts."
    return tp if choice("Experts", "experts", EXPERTS, help_text) == "whole" else 1


def _engine_follows_gpu() -> None:
    # vLLM's figures are of CUDA machines; on this machine's CPU it is our engine that runs.
    if str(state("gpu")).startswith(f"{PREFIX}: CPU"):
        st.session_state[key("engine")] = "headroom"

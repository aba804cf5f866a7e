"""The inputs of the Plan page. Every one is kept in the URL, so that a plan can be shared as a link."""

from __future__ import annotations

import json
from typing import Any

import streamlit as st

from engine.capacity import (
    PROFILES,
    Gpu,
    ModelSpec,
    PlanRequest,
    find_profile,
    gpus,
    model_names,
    model_spec,
    parameter_count,
    possible_tp,
)
from engine.errors import ConfigError, HeadroomError
from pages.widgets.messages import show_error
from pages.widgets.plan_machine import PREFIX, machine_gpus

UPLOAD = "Another model: upload its config.json"
WEIGHTS = {"fp8": "FP8", "int8": "INT8", "int4-g128": "INT4 g128", "int4-g64": "INT4 g64", "int4-g32": "INT4 g32"}
KV_DTYPES = {"fp8": "FP8", "int8": "INT8", "int4": "INT4"}
_DTYPES = {"bfloat16": "BF16", "float16": "FP16", "float32": "FP32"}
DEFAULTS: dict[str, Any] = {
    "model": "Llama-3.1-70B",
    "gpu": "H100 SXM 80GB",
    "tp": 4,
    "weights": "auto",
    "kv": "auto",
    "context": 8192,
    "concurrency": 32,
    "engine": "vllm-0.19",
    "utilization": 0.9,
}
_MOST_GPUS = 16
_MOST_REQUESTS = 100_000
_LARGEST_UPLOAD_MB = 1


def key(name: str) -> str:
    """Session-state key, and URL parameter, of an input."""
    return f"plan-{name}"


def plan_inputs() -> PlanRequest | None:
    """Draw the inputs.

    Returns:
        What they ask for; None (with the error shown) where the model cannot be read.
    """
    with st.container(border=True):
        st.markdown("**Model**")
        spec = _model()
        if spec is None:
            return None
        _weights_and_kv(spec)
    with st.container(border=True):
        st.markdown("**Hardware**")
        gpu, tp = _hardware(spec)
    with st.container(border=True):
        st.markdown("**Goal**")
        context, concurrency = _goal(spec)
    with st.container(border=True):
        st.markdown("**Engine**")
        options = _engine(concurrency)
    return PlanRequest(
        spec,
        gpu,
        tp=tp,
        weights=_state("weights"),
        kv_dtype=_state("kv"),
        context=context,
        concurrency=concurrency,
        **options,
    )


def apply_changes(changes: dict[str, Any]) -> None:
    """Put the fields of a remedy into the inputs (a button's callback, before the page is drawn again)."""
    names = {"kv_dtype": "kv", "max_num_seqs": "max-seqs"}
    for field, value in changes.items():
        st.session_state[key(names.get(field, field))] = value.name if isinstance(value, Gpu) else value


def read_config(data: bytes, name: str) -> ModelSpec:
    """The model that an uploaded ``config.json`` describes.

    Raises:
        ConfigError: naming what is wrong and the remedy.
    """
    try:
        config = json.loads(data)
    except (ValueError, RecursionError) as problem:
        raise ConfigError(
            f"{name} is not JSON ({str(problem)[:80]}).",
            field="config.json",
            remedy="Download the file again from the model's repository, and upload it unchanged.",
        ) from None
    return ModelSpec.from_hf_config(config, name.removesuffix(".json"))


def _state(name: str) -> Any:
    return st.session_state[key(name)]


def _widget(name: str) -> dict[str, Any]:
    """Arguments that every input shares."""
    return {"key": key(name), "bind": "query-params", "persist_state": "session"}


def _choice(label: str, name: str, options: dict[str, str], help_text: str) -> str:
    names = list(options)
    return str(
        st.selectbox(
            label,
            names,
            index=names.index(DEFAULTS[name]),
            format_func=lambda option: options[option],
            help=help_text,
            **_widget(name),
        )
    )


def _model() -> ModelSpec | None:
    names = sorted(model_names(), key=str.lower)
    chosen = st.selectbox(
        "Model",
        [*names, UPLOAD],
        index=names.index(DEFAULTS["model"]),
        help="Real configurations of published models. Type to search. Instruct and chat versions have the same sizes.",
        **_widget("model"),
    )
    try:
        spec = _uploaded() if chosen == UPLOAD else model_spec(str(chosen))
    except HeadroomError as problem:
        show_error(problem)
        return None
    if spec is not None:
        st.caption(_describe(spec))
    return spec


def _uploaded() -> ModelSpec | None:
    file = st.file_uploader(
        "config.json (Hugging Face)",
        type="json",
        max_upload_size=_LARGEST_UPLOAD_MB,
        help="The file beside the weights in the model's repository. It is read here and goes nowhere else.",
        key=key("config"),
    )
    if file is None:
        st.caption("Families known so far: Llama, Mistral, Qwen2, Qwen2.5 and Qwen3 (dense).")
        return None
    return read_config(file.getvalue(), file.name)


def _describe(spec: ModelSpec) -> str:
    shared = "" if spec.group_queries == 1 else f" sharing {spec.num_kv_heads:,} key/value heads"
    window = "" if spec.sliding_window is None else f", sliding window of {spec.sliding_window:,} tokens"
    return (
        f"{size_text(parameter_count(spec).total)} parameters, {spec.num_layers:,} layers, {spec.num_heads:,} heads"
        f"{shared}, context up to {spec.max_position:,} tokens{window}"
    )


def size_text(parameters: int) -> str:
    """A number of parameters in words: ``"70.55 billion"``."""
    return f"{parameters / 1e9:,.2f} billion" if parameters >= 1e9 else f"{parameters / 1e6:,.1f} million"


def _weights_and_kv(spec: ModelSpec) -> None:
    own = {"auto": f"{_DTYPES[spec.torch_dtype]} (as is)"}
    left, right = st.columns(2)
    with left:
        _choice(
            "Weight precision",
            "weights",
            own | WEIGHTS,
            "Matrices of attention and MLP; embedding, head and norms keep the checkpoint's own format. FP8 and INT8 "
            "take one byte a weight; INT4 half a byte, and a scale and zero point for each group of 128, 64 or 32.",
        )
    with right:
        _choice(
            "KV cache precision",
            "kv",
            own | KV_DTYPES,
            "Number format of stored keys and values. FP8 halves the cache, INT4 takes about a quarter; both change "
            "the output slightly.",
        )


def _hardware(spec: ModelSpec) -> tuple[Gpu, int]:
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
            **_widget("gpu"),
        )
    sizes = possible_tp(spec, _MOST_GPUS)
    with right:
        _clamp("tp", sizes)
        tp = st.selectbox(
            "GPUs",
            sizes,
            index=_nearest(sizes, DEFAULTS["tp"]),
            help="How many of them, tensor parallel: each GPU holds a part of every layer. Listed are the numbers that "
            "split this model's heads evenly.",
            **_widget("tp"),
        )
    gpu = devices[str(chosen)]
    st.caption(f"{gpu.usable_gib:,.2f} GiB usable each ({gpu.usable_source})")
    return gpu, int(tp or 1)


def _nearest(sizes: tuple[int, ...], wanted: int) -> int:
    """Index of the largest size that is not above ``wanted``."""
    return max(index for index, size in enumerate(sizes) if size <= wanted)


def _clamp(name: str, sizes: tuple[int, ...]) -> None:
    # The list depends on the model: a number that was chosen for another one may not be in it.
    value = st.session_state.get(key(name))
    if isinstance(value, int) and value not in sizes:
        st.session_state[key(name)] = sizes[_nearest(sizes, value)]


def _engine_follows_gpu() -> None:
    # vLLM's figures are of CUDA machines; on this machine's CPU it is our engine that runs.
    if str(_state("gpu")).startswith(f"{PREFIX}: CPU"):
        st.session_state[key("engine")] = "headroom"


def _goal(spec: ModelSpec) -> tuple[int, int]:
    longest = spec.max_position
    value = st.session_state.get(key("context"))
    if isinstance(value, int) and value > longest:
        st.session_state[key("context")] = longest
    left, right = st.columns(2)
    with left:
        context = st.number_input(
            "Context (tokens)",
            min_value=1,
            max_value=longest,
            value=min(DEFAULTS["context"], longest),
            step=1024 if longest > 4096 else 128,
            help=f"Of one request: prompt and answer together. This model goes up to {longest:,} tokens.",
            **_widget("context"),
        )
    with right:
        concurrency = st.number_input(
            "Concurrent requests",
            min_value=1,
            max_value=_MOST_REQUESTS,
            value=DEFAULTS["concurrency"],
            step=1,
            help="How many requests of that length are to be held at the same time.",
            **_widget("concurrency"),
        )
    return int(context or 1), int(concurrency or 1)


def _engine(concurrency: int) -> dict[str, Any]:
    profile = find_profile(
        _choice(
            "Serving engine",
            "engine",
            {profile.name: profile.label for profile in PROFILES},
            "How the engine spends memory beside weights and KV cache; fitted on what it reported on real GPUs.",
        )
    )
    utilization = st.slider(
        "Memory utilization (share of each GPU)",
        min_value=0.5,
        max_value=1.0,
        value=DEFAULTS["utilization"],
        step=0.01,
        help="The engine uses at most this share; the rest stays free for the driver, CUDA graphs and other processes.",
        **_widget("utilization"),
    )
    if profile.batch_is_concurrency:
        return {"profile": profile.name, "utilization": utilization}
    most = st.number_input(
        "Largest batch (requests)",
        min_value=1,
        max_value=_MOST_REQUESTS,
        value=None,
        step=1,
        placeholder=f"auto: {max(profile.max_num_seqs, concurrency):,}",
        help="max_num_seqs: the engine reserves memory for logits of that many requests, whether they come or not.",
        **_widget("max-seqs"),
    )
    return {
        "profile": profile.name,
        "utilization": utilization,
        "max_num_seqs": None if most is None else int(most),
    }

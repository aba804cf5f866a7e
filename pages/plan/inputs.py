"""The inputs of the Plan page. Every one is kept in the URL, so that a plan can be shared as a link."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import streamlit as st

from engine.capacity import (
    PROFILES,
    Gpu,
    ModelSpec,
    Objectives,
    PlannedWorkload,
    PlanRequest,
    find_profile,
    gpus,
    model_names,
    model_spec,
    parameter_count,
    possible_tp,
)
from engine.capacity.model.families import FAMILIES
from engine.errors import ConfigError, HeadroomError
from pages.plan.machine import PREFIX, machine_gpus
from pages.plan.shape import entered_shape
from pages.shared.messages import show_error

NGRAM = "n-gram look-up"
EXPERTS = {"split": "split like the rest", "whole": "whole, spread over the GPUs"}
UPLOAD = "Another model: upload its config.json"
SHAPE = "Another model: enter its shape"
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
LOADS = {"users": "users at once", "rate": "requests a second"}
DEFAULTS: dict[str, Any] = {
    "model": "Llama-3.1-70B",
    "gpu": "H100 SXM 80GB",
    "tp": 4,
    "dp": 1,
    "pp": 1,
    "weights": "auto",
    "kv": "auto",
    "context": 8192,
    "concurrency": 32,
    "load": "users",
    "rate": 1.0,
    "ttft": 1000.0,
    "tpot": 50.0,
    "engine": "vllm-0.19",
    "utilization": 0.9,
    "lengths": "varied",
    "burst": 1.0,
    "hit": 0,
    "draft": 0,
    "drafter": NGRAM,
    "acceptance": 70,
    "experts": "split",
    "lora": 0,
}
_USUAL_PROMPT, _USUAL_ANSWER = 2000, 300
#: Coefficients of variation of (prompts, answers).
VARIATIONS = {"equal": (0.0, 0.0), "varied": (0.5, 0.5), "wild": (1.0, 1.0)}
_MOST_GPUS = 16
_MOST_REQUESTS = 100_000
_LARGEST_UPLOAD_MB = 1


def key(name: str) -> str:
    """Session-state key, and URL parameter, of an input."""
    return f"plan-{name}"


@dataclasses.dataclass(frozen=True, slots=True)
class PlanInputs:
    """What the inputs ask for; ``rate`` is None where the goal is a number of users."""

    request: PlanRequest
    workload: PlannedWorkload
    objectives: Objectives
    rate: float | None
    price: float | None


def plan_inputs() -> PlanInputs | None:
    """Draw the inputs.

    Returns:
        What they ask for; None (with the error shown) where the model cannot be read.
    """
    with st.container(border=True):
        st.markdown("**I want to serve**")
        spec = _model()
        if spec is None:
            return None
    with st.container(border=True):
        st.markdown("**to**")
        goal = _goal(spec)
    with st.container(border=True):
        st.markdown("**on**")
        gpu, parallel = _hardware(spec)
        _weights_and_kv(spec)
    with st.container(border=True):
        st.markdown("**with**")
        options = _engine(goal["concurrency"])
    with st.expander("Traffic, speculation, adapters, price", icon=":material/tune:"):
        work, extra, price = _details(spec, goal["prompt"], goal["answer"], gpu)
    request = PlanRequest(
        spec,
        gpu,
        weights=_state("weights"),
        kv_dtype=_state("kv"),
        context=goal["context"],
        concurrency=goal["concurrency"],
        **parallel,
        **options,
        **extra,
    )
    return PlanInputs(request, work, goal["objectives"], goal["rate"], price)


def apply_changes(changes: dict[str, Any]) -> None:
    """Put the fields of a remedy into the inputs (a button's callback, before the page is drawn again)."""
    names = {"kv_dtype": "kv", "max_num_seqs": "max-seqs", "profile": "engine"}
    for field, value in changes.items():
        st.session_state[key(names.get(field, field))] = value.name if isinstance(value, Gpu) else value


def read_config(data: bytes, name: str, quantization: bytes | None = None) -> ModelSpec:
    """The model that an uploaded ``config.json`` describes, with the ``hf_quant_config.json`` beside it, if any.

    Raises:
        ConfigError: naming what is wrong and the remedy.
    """
    beside = None if quantization is None else _json(quantization, "hf_quant_config.json", "hf_quant_config.json")
    return ModelSpec.from_hf_config(_json(data, name, "config.json"), name.removesuffix(".json"), beside)


def _json(data: bytes, name: str, field: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{name} is not JSON ({str(error)[:80]}).",
            field=field,
            remedy="Download the file again from the model's repository, and upload it unchanged.",
        ) from None


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
        [*names, UPLOAD, SHAPE],
        index=names.index(DEFAULTS["model"]),
        help="Real configurations of published models. Type to search. Instruct and chat versions have the same sizes.",
        **_widget("model"),
    )
    try:
        own = {UPLOAD: _uploaded, SHAPE: entered_shape}.get(str(chosen))
        spec = model_spec(str(chosen)) if own is None else own()
    except HeadroomError as error:
        show_error(error)
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
        st.caption(
            f"Families known: {', '.join(sorted({family.model_type for family in FAMILIES}))}. Of any other, enter the "
            "shape."
        )
        return None
    beside = st.file_uploader(
        "hf_quant_config.json (if the repository has one)",
        type="json",
        max_upload_size=_LARGEST_UPLOAD_MB,
        help="NVIDIA ModelOpt writes how a checkpoint is quantized into this file.",
        key=key("quantization"),
    )
    return read_config(file.getvalue(), file.name, None if beside is None else beside.getvalue())


def _describe(spec: ModelSpec) -> str:
    shared = "" if spec.group_queries == 1 else f" sharing {spec.num_kv_heads:,} key/value heads"
    if spec.is_latent:
        shared = f" sharing one latent of {spec.head_dim:,}"
    count = parameter_count(spec)
    active = f", {size_text(count.active)} active" if spec.is_mixture else ""
    window = "" if spec.sliding_window is None else f", sliding window of {spec.sliding_window:,} tokens"
    return (
        f"{size_text(count.total)} parameters{active}, {spec.num_layers:,} layers, {spec.num_heads:,} heads"
        f"{shared}, context up to {spec.max_position:,} tokens{window}"
    )


def size_text(parameters: int) -> str:
    """A number of parameters in words: ``"70.55 billion"``."""
    return f"{parameters / 1e9:,.2f} billion" if parameters >= 1e9 else f"{parameters / 1e6:,.1f} million"


def _weights_and_kv(spec: ModelSpec) -> None:
    dtype = _DTYPES[spec.torch_dtype]
    own = {"auto": f"{dtype} (as is)"}
    weights = {"auto": f"{(spec.checkpoint_format or dtype).upper()} (as is)"}
    left, right = st.columns(2)
    with left:
        _choice(
            "Weight precision",
            "weights",
            weights | WEIGHTS,
            "Matrices of attention and MLP; embedding, head and norms keep the checkpoint's own format. FP8 and INT8 "
            "take one byte a weight; INT4 half a byte, and a scale and zero point for each group of 128, 64 or 32. "
            "W8A8: activations have 8 bits too, so that products run at the GPU's INT8 rate.",
        )
    with right:
        _choice(
            "KV cache precision",
            "kv",
            own | KV_DTYPES,
            "Number format of stored keys and values. FP8 halves the cache, INT4 takes about a quarter; both change "
            "the output slightly.",
        )


def _hardware(spec: ModelSpec) -> tuple[Gpu, dict[str, Any]]:
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
            help="How many of them hold one copy of the model, tensor parallel: each GPU holds a part of every layer. "
            "Listed are the numbers that split this model's heads evenly.",
            **_widget("tp"),
        )
    left, right = st.columns(2)
    with left:
        dp = _number("Copies of the model", "dp", 1, 1024, "Data parallel: each copy takes a share of the requests.")
    with right:
        longest = min(spec.num_layers, _MOST_GPUS)
        stages = st.session_state.get(key("pp"))
        if isinstance(stages, int) and stages > longest:  # from a model of more layers
            st.session_state[key("pp")] = longest
        pp = _number("Pipeline stages", "pp", 1, longest, "Pipeline parallel: each stage of GPUs holds some layers.")
    gpu, tp = devices[str(chosen)], int(tp or 1)
    st.caption(f"{gpu.usable_gib:,.2f} GiB usable each ({gpu.usable_source})")
    return gpu, {"tp": tp, "pp": pp, "dp": dp, "ep": _experts(spec, tp)}


def _experts(spec: ModelSpec, tp: int) -> int:
    """GPUs that a mixture's experts are spread over, whole; 1 where they are split, or there is no choice."""
    if not spec.is_mixture or tp == 1:
        return 1
    help_text = "Split: each GPU holds a part of every expert. Whole (expert parallel): each holds some of the experts."
    return tp if _choice("Experts", "experts", EXPERTS, help_text) == "whole" else 1


def _number(label: str, name: str, least: int, most: int, help_text: str, step: int = 1) -> int:
    """A whole number with its default."""
    value = st.number_input(
        label, min_value=least, max_value=most, value=DEFAULTS[name], step=step, help=help_text, **_widget(name)
    )
    return int(least if value is None else value)


def _optional(label: str, name: str, most: int, automatic: int, help_text: str) -> int:
    """A whole number that has an automatic value until one is given."""
    value = st.number_input(
        label,
        min_value=1,
        max_value=most,
        value=None,
        step=50,
        placeholder=f"auto {automatic}",
        help=help_text,
        **_widget(name),
    )
    return automatic if value is None else int(value)


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


def _goal(spec: ModelSpec) -> dict[str, Any]:
    load = st.segmented_control(
        "The load is a number of",
        list(LOADS),
        default=DEFAULTS["load"],
        format_func=lambda option: LOADS[option],
        help="Users at once: each has one request in flight and sends the next when it is answered. Requests a second: "
        "they arrive at random, however many are still in flight.",
        required=True,
        **_widget("load"),
    )
    left, right = st.columns(2)
    concurrency, rate = 1, None
    with left:
        if load == "rate":
            value = st.number_input(
                "Requests a second",
                min_value=0.01,
                max_value=100_000.0,
                value=DEFAULTS["rate"],
                step=0.5,
                help="Arrivals a second, on average, at the busiest time.",
                **_widget("rate"),
            )
            rate = float(value or 0.01)
        else:
            concurrency = _number(
                "Concurrent requests",
                "concurrency",
                1,
                _MOST_REQUESTS,
                "How many requests of the planned context are to be held at the same time.",
            )
    with right:
        context = _context(spec)
    left, right = st.columns(2)
    answer_auto = min(_USUAL_ANSWER, max(1, context // 4))
    with right:
        answer = _optional("Answer (tokens)", "answer", 2**31, answer_auto, "Output tokens of a request, on average.")
    with left:
        prompt_auto = max(1, min(_USUAL_PROMPT, context - answer))
        prompt = _optional("Prompt (tokens)", "prompt", 2**31, prompt_auto, "Input tokens of a request, on average.")
    return {
        "concurrency": concurrency,
        "rate": rate,
        "context": context,
        "prompt": prompt,
        "answer": answer,
        "objectives": _objectives(),
    }


def _context(spec: ModelSpec) -> int:
    longest = spec.max_position
    value = st.session_state.get(key("context"))
    if isinstance(value, int) and value > longest:
        st.session_state[key("context")] = longest
    context = st.number_input(
        "Context (tokens)",
        min_value=1,
        max_value=longest,
        value=min(DEFAULTS["context"], longest),
        step=1024 if longest > 4096 else 128,
        help="Longest that one request may be, prompt and answer together: memory is planned for it. This model goes "
        f"up to {longest:,} tokens.",
        **_widget("context"),
    )
    return int(context or 1)


def _objectives() -> Objectives:
    left, right = st.columns(2)
    with left:
        ttft = _milliseconds("First token (ms, p95)", "ttft", "Time to first token, 95th percentile. Empty: any.")
    with right:
        tpot = _milliseconds("Each token (ms, p95)", "tpot", "Time per output token, 95th percentile. Empty: any.")
    return Objectives(ttft, tpot)


def _milliseconds(label: str, name: str, help_text: str) -> float | None:
    value = st.number_input(
        label,
        min_value=0.1,
        max_value=1e7,
        value=DEFAULTS[name],
        step=10.0,
        help=help_text,
        format="%g",
        **_widget(name),
    )
    return None if value is None else float(value) / 1e3


def _details(
    spec: ModelSpec, prompt: int, answer: int, gpu: Gpu
) -> tuple[PlannedWorkload, dict[str, Any], float | None]:
    variation = _choice(
        "Lengths of requests",
        "lengths",
        {"equal": "all equal", "varied": "varied (cv 0.5)", "wild": "very different (cv 1)"},
        "How far prompts and answers differ: cv is the standard deviation over the mean. Equal lengths queue least.",
    )
    burst = st.number_input(
        "Burstiness of arrivals (1 = Poisson)",
        min_value=0.1,
        max_value=100.0,
        value=DEFAULTS["burst"],
        step=0.5,
        help="Squared coefficient of variation of the gaps between arrivals. 4 is a bursty day.",
        **_widget("burst"),
    )
    hit = _number("Prefix cache hits (% of prompt tokens)", "hit", 0, 99, "Prompt tokens that need no computing.", 5)
    drafter = _drafter(spec)
    left, right = st.columns(2)
    with left:
        draft = _number("Draft length (tokens)", "draft", 0, 16, "Tokens drafted a round of speculation; 0: off.")
    with right:
        accepted = _number("Accepted drafts (%)", "acceptance", 0, 100, "Probability that a drafted token is right.", 5)
    left, right = st.columns(2)
    with left:
        lora = _number("LoRA adapters (rank 16)", "lora", 0, 1000, "Adapters that are loaded at the same time.")
    with right:
        price = st.number_input(
            "Price ($/h a GPU)",
            min_value=0.0,
            max_value=10_000.0,
            value=None,
            step=0.1,
            placeholder="unknown" if gpu.price_usd_hour is None else f"catalog: {gpu.price_usd_hour:,.2f}",
            help="What you pay for one GPU, US dollars an hour. The catalog's figures are round ones to begin with.",
            **_widget("price"),
        )
    cvs = VARIATIONS[variation]
    work = PlannedWorkload(prompt, answer, *cvs, float(burst or 1.0), hit / 100, draft, accepted / 100, None)
    extra = {"lora_adapters": lora, "draft": drafter if draft else None}
    return work, extra, None if price is None else float(price)


def _drafter(spec: ModelSpec) -> ModelSpec | None:
    """The model that drafts; None for n-gram look-up."""
    count = parameter_count(spec).total
    smaller = [
        name
        for name in sorted(model_names(), key=str.lower)
        if model_spec(name).vocab_size == spec.vocab_size and parameter_count(model_spec(name)).total < count / 2
    ]
    if st.session_state.get(key("drafter"), NGRAM) not in (NGRAM, *smaller):  # chosen for another model
        st.session_state[key("drafter")] = NGRAM
    chosen = _choice(
        "Drafts come from",
        "drafter",
        {name: name for name in (NGRAM, *smaller)},
        "What proposes tokens for speculation: a search in the text itself, which costs nothing, or a smaller model of "
        "the same vocabulary, which lives on the same GPUs. It counts where the draft length is above 0.",
    )
    return None if chosen == NGRAM else model_spec(chosen)


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
        placeholder=f"auto {max(profile.max_num_seqs, concurrency)}",
        help="max_num_seqs: the engine reserves memory for logits of that many requests, whether they come or not.",
        **_widget("max-seqs"),
    )
    return {
        "profile": profile.name,
        "utilization": utilization,
        "max_num_seqs": None if most is None else int(most),
    }

"""``headroom plan``: from a model and a goal to a deployment. See :mod:`engine.capacity`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from engine.cli import console
from engine.cli.options import with_options
from engine.cli.plan_options import PlanOptions
from engine.errors import ConfigError

if TYPE_CHECKING:
    from engine.capacity import ModelSpec
    from engine.capacity.advice.deployment import Deployment
    from engine.capacity.memory.request import PlanRequest
    from engine.capacity.speed.workload import PlannedWorkload

_SECONDS = 1e-3
_USUAL_OUTPUT = 256
#: NVIDIA ModelOpt writes how a checkpoint is quantized into a file of its own.
_QUANTIZATION_FILE = "hf_quant_config.json"
_LARGEST_FILE = 16 * 2**20


@with_options(PlanOptions)
def plan(options: PlanOptions) -> None:
    """Plan a deployment: memory, what fits, latency, cost. Figures of memory are of one GPU."""
    from engine.capacity.advice.deployment import deploy
    from engine.capacity.speed.workload import Objectives

    _check_format(options.output_format)
    if options.concurrency is not None and options.rate is not None:
        raise ConfigError("a rate and a concurrency are given.", field="rate", remedy="Give only one of them.")
    request = _request(options)
    objectives = Objectives(_s(options.slo_ttft_ms), _s(options.slo_tpot_ms))
    answer = deploy(request, _workload(options, request), objectives, options.rate, options.price)
    _print(answer, options.name, "json" if options.as_json else options.output_format)


def _request(options: PlanOptions) -> PlanRequest:
    """The deployment that is asked about; without a context, one of a request's length."""
    from engine.capacity.memory.request import request_from_names

    context = options.context
    if context is None and options.input_tokens is not None:
        context = options.input_tokens + (options.output_tokens or _USUAL_OUTPUT)
    return request_from_names(
        options.model or "",
        options.gpu,
        gpu_memory_gib=options.gpu_memory_gib,
        spec=_spec(options.model, options.shape),
        draft=_draft(options.draft),
        tp=options.tp,
        pp=options.pp,
        ep=options.ep,
        dp=options.dp,
        dtype=options.dtype,
        weights=options.weights,
        kv_dtype=options.kv_dtype,
        context=context,
        concurrency=1 if options.concurrency is None else options.concurrency,
        max_num_seqs=options.max_num_seqs,
        token_budget=options.token_budget,
        utilization=options.gpu_memory_utilization,
        block_size=options.block_size,
        profile=options.profile,
        lora_adapters=options.lora_adapters,
        lora_rank=options.lora_rank,
    )


def _workload(options: PlanOptions, request: PlanRequest) -> PlannedWorkload:
    from engine.capacity.speed.workload import PlannedWorkload

    prompt, output = _lengths(request, options.input_tokens, options.output_tokens)
    return PlannedWorkload(
        prompt,
        output,
        options.input_cv,
        options.output_cv,
        options.burstiness,
        options.prefix_hit_rate,
        options.draft_length,
        options.acceptance,
        None,
    )


def _s(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds * _SECONDS


def _check_format(name: str) -> None:
    if name not in ("table", "json", "markdown", "yaml"):
        raise ConfigError(
            f"{name[:40]!r} is not a format.", field="format", remedy="Choose table, json, markdown or yaml."
        )


def _lengths(request: PlanRequest, input_tokens: int | None, output_tokens: int | None) -> tuple[int, int]:
    from engine.capacity.advice.deployment import lengths
    from engine.capacity.memory.request import complete

    return lengths(complete(request).context, input_tokens, output_tokens)


def _draft(draft: str | None) -> ModelSpec | None:
    from engine.capacity import model_spec

    return None if draft is None else _model_spec_from_file(draft) or model_spec(draft)


def _spec(model: str | None, shape: str | None) -> ModelSpec | None:
    """The spec of a shape or a file; None where ``model`` is a name of the catalog."""
    from engine.capacity.model.shape import spec_of_shape

    if shape is not None:
        return spec_of_shape(_read_shape(shape), model or "model entered by hand")
    if model is None:
        raise ConfigError("neither a model nor a shape is given.", field="model", remedy="Give --model or --shape.")
    return _model_spec_from_file(model)


def _read_shape(text: str) -> Any:
    """A shape as JSON, as ``name=value`` pairs, or from a file."""
    remedy = "Give layers=32,hidden=4096,… or a JSON object, or the path of a file with one."
    if not text.lstrip().startswith("{") and "=" not in text:
        return _read_json(Path(text).expanduser(), "shape", remedy)
    try:
        if text.lstrip().startswith("{"):
            return json.loads(text)
        pairs = (part.partition("=") for part in text.split(",") if part.strip())
        return {name.strip().replace("-", "_"): _shape_value(value.strip()) for name, _, value in pairs}
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"it is not readable ({str(error)[:200]}).", field="shape", remedy=remedy) from None


def _shape_value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text  # of the name and the number format, or wrong and then named with its field


def _model_spec_from_file(model: str) -> ModelSpec | None:
    """The spec where ``model`` is a configuration file or a folder with one; None where it is a name."""
    from engine.capacity import ModelSpec

    path = Path(model).expanduser()
    if path.is_dir():
        path /= "config.json"
    elif path.suffix.lower() != ".json":
        return None
    config = _read_json(path, "model", "Give the path of a model's config.json, or the name of a model in the catalog.")
    companion = path.with_name(_QUANTIZATION_FILE)
    remedy = "Download it again from the model's repository, or move it away to plan without it."
    quantization = _read_json(companion, _QUANTIZATION_FILE, remedy) if companion.is_file() else None
    return ModelSpec.from_hf_config(config, quantization=quantization)


def _read_json(path: Path, field: str, remedy: str) -> Any:
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(f"{path} is not a file.", field=field, remedy=remedy)
        if path.stat().st_size > _LARGEST_FILE:
            raise ConfigError(f"{path} is larger than {_LARGEST_FILE:,} bytes.", field=field, remedy=remedy)
        return json.loads(path.read_bytes())
    except OSError as error:
        message = f"{path} cannot be read ({error.strerror or error})."
        raise ConfigError(message, field=field, remedy=remedy) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON ({str(error)[:200]}).", field=field, remedy=remedy) from None


def _print(answer: Deployment, name: str, output_format: str) -> None:
    from engine.capacity.advice.document import as_markdown, as_yaml, plan_document
    from engine.capacity.advice.remedies import what_would_fit

    remedies = what_would_fit(answer.plan.request.as_request())
    document = plan_document(answer, name) | {"what_would_fit": [remedy.to_dict() for remedy in remedies]}
    with console.standard_output() as out:
        if output_format == "json":
            console.write_json(out, document)
        elif output_format == "markdown":
            out.write(as_markdown(document))
        elif output_format == "yaml":
            out.write(as_yaml(document))
        else:
            _show(out, document, answer)


def _show(out: TextIO, document: dict[str, Any], answer: Deployment) -> None:
    request, memory = document["request"], document["memory"]
    if answer.plan.fits and not document["fits"]:
        fits = "fits into memory, but the load is more than can be served"
    elif document["fits"]:
        fits = "fits"
    else:
        fits = f"does not fit: {memory['shortfall_gib']:,.2f} GiB missing on each GPU"
    title = f"{request['model']} on {document['gpus']} × {request['gpu']}, {request['profile']}: {fits}"
    console.write_table(out, title, [*_memory_rows(document), *_load_rows(document, answer)])
    lines = [f"would fit: {remedy['title']} ({remedy['cost']})" for remedy in document["what_would_fit"]]
    lines += [f"breaks first: {document['limits']['first_limit']}"]
    lines += [f"warning: {warning}" for warning in document["warnings"]]
    lines += [f"assumed: {assumption}" for assumption in document["assumptions"]]
    lines += [f"start with: {document['launch']['vLLM']}"] if request["profile"].startswith("vllm") else []
    print("\n".join(["", *lines]), file=out)


def _memory_rows(document: dict[str, Any]) -> list[tuple[str, str, str]]:
    request, memory, limits = document["request"], document["memory"], document["limits"]
    sizes = ("capacity", "limit", "weights", "activation", "non_torch", "kv")
    rows = [(name.replace("_", " "), f"{memory[f'{name}_gib']:,.3f}", "GiB") for name in sizes]
    total, active = document["parameters"]["total"], document["parameters"]["active"]
    return [
        *rows,
        ("KV per token", f"{memory['kv_bytes_per_token']:,}", "bytes"),
        ("KV cache", f"{memory['kv_tokens']:,}", f"tokens in {memory['kv_blocks']:,} blocks"),
        ("parameters", f"{total:,}", "" if active == total else f"of which a token uses {active:,}"),
        ("goal", f"{request['concurrency']:,} × {request['context']:,}", "sequences × tokens"),
        ("most sequences of that context", f"{limits['max_concurrency']:,}", ""),
        ("longest context at that number", f"{limits['max_context']:,}", "tokens"),
    ]


def _load_rows(document: dict[str, Any], answer: Deployment) -> list[tuple[str, str, str]]:
    latency, cost, limits = document["latency"], document["cost"], document["limits"]
    load = f"{answer.rate:,.2f} requests/s" if answer.rate else f"{answer.plan.request.concurrency:,} users"
    rows = [
        ("load", load, f"{answer.workload.input_tokens:,.0f} + {answer.workload.output_tokens:,.0f} tokens each"),
        ("TTFT mean, p95", f"{_number(latency['ttft_ms'])}, {_number(latency['ttft_p95_ms'])}", "ms"),
        ("TPOT mean, p95", f"{_number(latency['tpot_ms'])}, {_number(latency['tpot_p95_ms'])}", "ms"),
        ("decode step", _number(latency["decode_step_ms"]), "ms"),
        ("output", _number(latency["output_tokens_s"]), "tokens/s"),
        ("largest rate within objectives", _number(limits["max_rate_within_slo"]), "requests/s"),
        ("cost", _number(cost["per_hour"]), "$ an hour"),
        ("", _number(cost["per_million_output_tokens"]), "$ a million output tokens"),
        ("energy", _number(cost["kwh_per_million_output_tokens"]), "kWh a million output tokens"),
    ]
    return rows if latency["tpot_ms"] is not None else rows[:1]


def _number(value: float | None) -> str:
    return "–" if value is None else console.number(value)

"""The options of ``headroom plan``."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from engine.cli.options import AsJson


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """What ``headroom plan`` is given, an option a field. Lengths in tokens, times in milliseconds."""

    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Name in the catalog, or path of a config.json.")
    ] = None
    shape: Annotated[
        str | None,
        typer.Option(
            help="A shape entered by hand, instead of --model: layers=32,hidden=4096,heads=32,kv_heads=8,"
            "intermediate=14336,vocab=128256 … or JSON, or a file of it."
        ),
    ] = None
    gpu: Annotated[str | None, typer.Option(help='Name in the catalog, e.g. "H100 SXM 80GB".')] = None
    gpu_memory_gib: Annotated[
        float | None, typer.Option(help="Usable memory of each GPU, in place of the catalog's. GiB.")
    ] = None
    tp: Annotated[int, typer.Option(help="Tensor-parallel GPUs.")] = 1
    pp: Annotated[int, typer.Option(help="Pipeline-parallel GPUs.")] = 1
    ep: Annotated[int, typer.Option(help="GPUs that whole experts are distributed over: 1 or --tp.")] = 1
    dp: Annotated[int, typer.Option(help="Copies of the whole, each with a share of the requests.")] = 1
    dtype: Annotated[str | None, typer.Option(help="Compute dtype. Default: the checkpoint's.")] = None
    weights: Annotated[
        str | None, typer.Option(help="bf16, fp8, int8, w8a8, int4-g128, q4_k_m … Default: the checkpoint's own.")
    ] = None
    kv_dtype: Annotated[str, typer.Option(help="bf16, fp8, int8, int4; auto: --dtype.")] = "auto"
    context: Annotated[
        int | None,
        typer.Option(help="Tokens of a sequence. Default: --input-tokens + --output-tokens, else the model's own."),
    ] = None
    max_num_seqs: Annotated[int | None, typer.Option(help="Largest batch. Default: the profile's.")] = None
    token_budget: Annotated[int | None, typer.Option(help="Tokens of a step. Default: the profile's.")] = None
    block_size: Annotated[int | None, typer.Option(help="Tokens of a KV block. Default: the profile's.")] = None
    gpu_memory_utilization: Annotated[float | None, typer.Option(help="0 … 1. Default: the profile's.")] = None
    profile: Annotated[str, typer.Option(help="Serving engine: vllm-0.19, headroom, transformers …")] = "vllm-0.19"
    concurrency: Annotated[int | None, typer.Option(help="The goal: users at once. Default: 1.")] = None
    rate: Annotated[float | None, typer.Option(help="The goal, instead: requests a second.")] = None
    input_tokens: Annotated[int | None, typer.Option(min=1, help="Prompt tokens of a request.")] = None
    output_tokens: Annotated[int | None, typer.Option(min=1, help="Output tokens of a request.")] = None
    input_cv: Annotated[float, typer.Option(help="Their variation: standard deviation / mean.")] = 0.0
    output_cv: Annotated[float, typer.Option(help="Likewise, of output tokens.")] = 0.0
    burstiness: Annotated[float, typer.Option(help="Of arrivals: 1 is Poisson, more comes in bursts.")] = 1.0
    slo_ttft_ms: Annotated[float | None, typer.Option(help="Objective: time to first token, 95th percentile.")] = None
    slo_tpot_ms: Annotated[float | None, typer.Option(help="Objective: time per output token, likewise.")] = None
    prefix_hit_rate: Annotated[float, typer.Option(help="Share of a prompt that the prefix cache holds.")] = 0.0
    lora_adapters: Annotated[int, typer.Option(help="LoRA adapters loaded at once.")] = 0
    lora_rank: Annotated[int, typer.Option(help="Their rank.")] = 16
    draft: Annotated[str | None, typer.Option(help="Draft model for speculation: name or config.json.")] = None
    draft_length: Annotated[int, typer.Option(help="Tokens drafted a round; without --draft by n-gram look-up.")] = 0
    acceptance: Annotated[float, typer.Option(help="Probability that a drafted token is accepted.")] = 0.7
    price: Annotated[float | None, typer.Option(help="US dollars an hour for a GPU. Default: the catalog's.")] = None
    name: Annotated[str, typer.Option(help="Name of the plan, for documents.")] = ""
    output_format: Annotated[str, typer.Option("--format", help="table, json, markdown or yaml.")] = "table"
    as_json: AsJson = False

"""Bytes by the names of formats, as tables of published numbers have them."""

from __future__ import annotations

from engine import capacity
from engine.capacity import CacheLayout, ModelSpec, Shard, Stage, compute_dtype
from engine.capacity.memory.kv_formula import KVComparison
from engine.capacity.memory.weights import lora_bytes as lora_bytes_of


def weight_bytes(
    spec: ModelSpec, weights: str, *, dtype: str | None = None, tp: int = 1, ep: int = 1, stage: Stage | None = None
) -> int:
    """Of one GPU's shard."""
    plain = None if dtype is None else compute_dtype(dtype)
    return capacity.weight_bytes(spec, spec.weight_precision(weights), plain, Shard(tp, ep, stage))


def lora_bytes(spec: ModelSpec, rank: int, adapters: int, dtype: str, *, tp: int = 1) -> int:
    """Of the adapters on one GPU."""
    return lora_bytes_of(spec, rank, adapters, compute_dtype(dtype), Shard(tp))


def activation_bytes(spec: ModelSpec, token_budget: int, max_num_seqs: int, dtype: str, *, tp: int = 1) -> int:
    """Of this engine's largest step."""
    return capacity.activation_bytes(spec, token_budget, max_num_seqs, compute_dtype(dtype), tp)


def kv_bytes_per_token(spec: ModelSpec, kv_dtype: str = "auto", tp: int = 1) -> int:
    """Of one GPU."""
    return capacity.kv_bytes_per_token(spec, spec.kv_precision(kv_dtype), Shard(tp))


def kv_bytes_per_block(spec: ModelSpec, block_size: int, kv_dtype: str = "auto") -> int:
    """Of all layers."""
    return capacity.kv_bytes_per_block(spec, CacheLayout(spec.kv_precision(kv_dtype), block_size))


def kv_bytes_per_sequence(
    spec: ModelSpec, context: int, block_size: int, kv_dtype: str = "auto", tp: int = 1, *, frees_windows: bool = True
) -> int:
    """Of one sequence on one GPU."""
    layout = CacheLayout(spec.kv_precision(kv_dtype), block_size, frees_windows)
    return capacity.kv_bytes_per_sequence(spec, layout, context, Shard(tp))


def compare_kv_formulas(
    spec: ModelSpec, context: int, block_size: int, kv_dtype: str = "auto", tp: int = 1
) -> KVComparison:
    """Of one sequence on one GPU."""
    return capacity.compare_kv_formulas(spec, CacheLayout(spec.kv_precision(kv_dtype), block_size), context, tp)

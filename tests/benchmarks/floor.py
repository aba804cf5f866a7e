"""The floor of each workload on this machine: bytes over measured bandwidth, FLOPs over measured peak.

    python -m tests.benchmarks.floor [--device cpu] [--threads 2]

What is measured: copy and read bandwidth of a buffer far above the caches, the best rate of a float32 and a bfloat16
matrix product at M = 512 … 2048, and the rate at which torch's packed INT4 product goes through its weights at one row.
The floor of a workload is the roofline of an ideal schedule: all prompts first, then every request decodes in one
batch until it is done; a part takes max(FLOPs / peak, bytes / bandwidth). No overhead, no sampling, no copies.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.peers.protocol import Request

BUFFER_BYTES = 256 * 2**20
GEMM_ROWS = (512, 1024, 2048)
GEMM_N, GEMM_K = 2048, 2048
INT4_GROUP = 32


@dataclasses.dataclass(frozen=True, slots=True)
class Machine:
    """Measured rates.

    Attributes:
        copy_bytes_s: bytes read plus bytes written of a copy, per second.
        read_bytes_s: bytes of a sum over a buffer, per second.
        gemm_flops_s: ``{dtype: {M: FLOP/s}}`` of [M, 2048] × [2048, 2048].
        int4_bytes_s: packed bytes (scales and zeros included) of the INT4 product at one row, per second; None where
            torch has none for this device.
        threads: that were used (CPU).
    """

    device: str
    copy_bytes_s: float
    read_bytes_s: float
    gemm_flops_s: dict[str, dict[str, float]]
    int4_bytes_s: float | None
    threads: int

    @property
    def bandwidth(self) -> float:
        """The higher of the two bandwidths: a floor must not be above what the memory can do."""
        return max(self.copy_bytes_s, self.read_bytes_s)

    def peak(self, dtype: str) -> float:
        """Best FLOP/s of a dtype; quantized weights may compute in either, so the better one is their floor.

        Of W4A8 four times that of float32: a vector holds four bytes where it holds a float.
        """
        best = {name: max(rates.values()) for name, rates in self.gemm_flops_s.items()}
        if dtype == "w4a8":
            return max(4 * best["float32"], *best.values())
        return best.get(dtype, max(best.values()))


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """What a decoder computes, from its configuration.

    Attributes:
        layer_parameters: in the products of all layers (each token goes through all of them).
        head_parameters: of the output head (each sampled token).
        attention_flops: per pair of a query and a key, all layers.
        kv_elements: cached per token, all layers.
    """

    layer_parameters: int
    head_parameters: int
    attention_flops: int
    kv_elements: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Shape:
        """From a Hugging Face style ``config.json`` of the Llama kind."""
        hidden, layers, heads = (config[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
        kv_heads = config.get("num_key_value_heads") or heads
        head_dim = config.get("head_dim") or hidden // heads
        attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
        mlp = 3 * hidden * config["intermediate_size"]
        return cls(
            layer_parameters=layers * (attention + mlp),
            head_parameters=hidden * config["vocab_size"],
            attention_flops=4 * heads * head_dim * layers,
            kv_elements=2 * kv_heads * head_dim * layers,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Floor:
    """Seconds of an ideal run, and what bounds the prefill and most decode steps: "bytes" or "flops"."""

    prefill_s: float
    decode_s: float
    prefill_bound: str
    decode_bound: str

    @property
    def total_s(self) -> float:
        """Prefill and decode."""
        return self.prefill_s + self.decode_s


def floor(
    requests: Sequence[Request],
    shape: Shape,
    machine: Machine,
    weights: str,
    weights_bytes: int,
    cached_tokens: int = 0,
) -> Floor:
    """The floor of a workload.

    Args:
        weights: "float32", "bfloat16", "int8", "int4" or "w4a8".
        weights_bytes: resident bytes, all of which a decode step reads.
        cached_tokens: of each prompt, in the prefix cache before it arrives.
    """
    peak, kv_bytes = machine.peak(weights), shape.kv_elements * (4 if weights == "float32" else 2)
    flops = sum(_prefill_flops(len(request.prompt_token_ids), cached_tokens, shape) for request in requests)
    prefill, weights_s = flops / peak, weights_bytes / machine.bandwidth
    decode, by_bytes, steps = 0.0, 0, 0
    for step in range(1, max(request.output_tokens for request in requests)):
        contexts = [len(item.prompt_token_ids) + step for item in requests if item.output_tokens > step]
        compute = sum(
            2 * (shape.layer_parameters + shape.head_parameters) + shape.attention_flops * c for c in contexts
        )
        compute_s = compute / peak
        bytes_s = (weights_bytes + kv_bytes * sum(contexts)) / machine.bandwidth
        decode += max(compute_s, bytes_s)
        by_bytes += bytes_s > compute_s
        steps += 1
    bounds = "bytes" if weights_s > prefill else "flops", "bytes" if 2 * by_bytes >= steps else "flops"
    return Floor(max(prefill, weights_s), decode, *bounds)


def _prefill_flops(length: int, cached: int, shape: Shape) -> float:
    new = length - cached
    pairs = (length * (length + 1) - cached * (cached + 1)) / 2
    return 2 * shape.layer_parameters * new + 2 * shape.head_parameters + shape.attention_flops * pairs


# -- measuring ------------------------------------------------------------------------------------------------------


def measure(device: str = "cpu", threads: int = 2) -> Machine:
    """Measure this machine; half a minute or less."""
    if device == "cpu":
        torch.set_num_threads(threads)
    source = torch.ones(BUFFER_BYTES // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copy_s = best_seconds(lambda: target.copy_(source), device)
    read_s = best_seconds(lambda: source.sum(), device)
    gemm = {
        str(dtype).removeprefix("torch."): {str(rows): _gemm(rows, dtype, device) for rows in GEMM_ROWS}
        for dtype in (torch.float32, torch.bfloat16)
    }
    return Machine(device, 2 * BUFFER_BYTES / copy_s, BUFFER_BYTES / read_s, gemm, _int4_bytes_s(device), threads)


def best_seconds(work: Callable[[], Any], device: str, budget_s: float = 2.0, most: int = 30) -> float:
    """The quickest of up to ``most`` calls within a time budget: a peak, so what disturbs it is left out."""

    def once() -> float:
        began = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    once()
    end, best = time.perf_counter() + budget_s, once()
    for _ in range(most):
        if time.perf_counter() > end:
            break
        best = min(best, once())
    return best


def _gemm(rows: int, dtype: torch.dtype, device: str) -> float:
    x = torch.randn(rows, GEMM_K, device=device).to(dtype)
    weight = torch.randn(GEMM_N, GEMM_K, device=device).to(dtype)
    return 2 * rows * GEMM_N * GEMM_K / best_seconds(lambda: torch.nn.functional.linear(x, weight), device)


def _int4_bytes_s(device: str) -> float | None:
    """One row through weights of 64 MB in total, so that they come from memory."""
    if device != "cpu":
        return None
    product, pack = torch.ops.aten._weight_int4pack_mm_for_cpu, torch.ops.aten._convert_weight_to_int4pack_for_cpu
    try:
        packed = pack(torch.randint(0, 16, (GEMM_N, GEMM_K), dtype=torch.int32), 1)
        grid = torch.ones(GEMM_K // INT4_GROUP, GEMM_N, 2, dtype=torch.bfloat16)
        weights = [(packed.clone(), grid.clone()) for _ in range(64 * 2**20 // (packed.nbytes + grid.nbytes))]
        x = torch.ones(1, GEMM_K, dtype=torch.bfloat16)

        def through_all() -> None:
            for values, scales_and_zeros in weights:
                product(x, values, INT4_GROUP, scales_and_zeros)

        return len(weights) * (packed.nbytes + grid.nbytes) / best_seconds(through_all, device)
    except (RuntimeError, NotImplementedError, AttributeError):
        return None


def read_shape(checkpoint: Path) -> Shape:
    """The shape of a checkpoint folder."""
    return Shape.from_config(json.loads((checkpoint / "config.json").read_text(encoding="utf-8")))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    print(json.dumps(dataclasses.asdict(measure(arguments.device, arguments.threads)), indent=1))


if __name__ == "__main__":
    main()

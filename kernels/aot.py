"""Compile every Triton kernel for the GPUs we ship to, without a GPU, and report what the compiler made of it.

``python -m kernels.aot`` prints a table, ``--json`` one JSON document: registers, spills, shared memory and the matrix
instruction in use. A kernel that compiles here may still be slow there: this proves that it builds, fits and uses the
matrix units, nothing more.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from kernels import kv_write, paged_attention, rms_norm, silu_mul

TARGETS = (80, 90, 100)  # A100, H100/H200, B200
SHARED_LIMIT_BYTES = {80: 166_912, 90: 232_448, 100: 232_448}  # per block, CUDA C programming guide, table 27
_MATRIX_INSTRUCTIONS = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")
_TYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclasses.dataclass(frozen=True, slots=True)
class Variant:
    """One kernel with the compile-time constants of one use.

    Attributes:
        kernel: the ``@triton.jit`` function.
        label: what it is used for.
        types: Triton type of each run-time parameter, in order.
        constants: value of each ``tl.constexpr`` parameter.
        options: num_warps and num_stages.
        needs_matrix_unit: its PTX must hold a matrix instruction.
    """

    kernel: Any
    label: str
    types: dict[str, str]
    constants: dict[str, int | bool]
    options: dict[str, int]
    needs_matrix_unit: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """What the compiler made of a variant for one target. ``spill_bytes`` is local memory per thread."""

    kernel: str
    label: str
    target: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    shared_limit_bytes: int
    matrix_instruction: str | None
    needs_matrix_unit: bool
    warps: int


def variants() -> list[Variant]:
    """What ``make test`` compiles: each kernel, 16-bit and float32, narrow and wide heads, decode and prefill."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    return [
        _attention(bf16, head_dim=128, group_size=4, decode=True, window=False),
        _attention(bf16, head_dim=128, group_size=4, decode=False, window=False),
        _attention(fp16, head_dim=64, group_size=3, decode=False, window=True),
        _attention(bf16, head_dim=256, group_size=8, decode=False, window=False),
        _attention(fp16, head_dim=80, group_size=1, decode=True, window=True),
        _attention(fp32, head_dim=64, group_size=3, decode=False, window=False),
        _kv_write(bf16, num_kv_heads=8, head_dim=128),
        _rms_norm(bf16, size=4096),
        _silu_mul(bf16, size=14336),
    ]


def compile_variant(variant: Variant, target: int) -> Report:
    """Compile for ``sm_<target>`` down to machine code.

    Raises:
        Exception: whatever Triton or ptxas object to.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {**variant.types, **dict.fromkeys(variant.constants, "constexpr")}
    names = variant.kernel.arg_names
    ordered = {name: signature[name] for name in names}
    # As in a launch: pointers from the allocator and strides of real models are multiples of 16.
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if ordered[name].startswith("*") or ("stride" in name and name not in variant.constants)
    }
    source = ASTSource(variant.kernel, ordered, constexprs=dict(variant.constants), attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=dict(variant.options))
    registers, spill_bytes = _resource_usage(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    return Report(
        kernel=variant.kernel.__name__.strip("_"),
        label=variant.label,
        target=f"sm_{target}",
        registers=registers,
        spill_bytes=spill_bytes,
        shared_bytes=compiled.metadata.shared,
        shared_limit_bytes=SHARED_LIMIT_BYTES[target],
        matrix_instruction=next((name for name in _MATRIX_INSTRUCTIONS if name in ptx), None),
        needs_matrix_unit=variant.needs_matrix_unit,
        warps=variant.options.get("num_warps", 4),
    )


def _resource_usage(cubin: bytes) -> tuple[int, int]:
    """(registers per thread, bytes of local memory per thread) as cuobjdump, bundled with Triton, reads them."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    values = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return values["REG"], values["STACK"] + values["LOCAL"]


def _attention(dtype: torch.dtype, *, head_dim: int, group_size: int, decode: bool, window: bool) -> Variant:
    config = paged_attention.paged_attention_config(64, 64 if decode else 1, group_size, head_dim, dtype)
    element = f"*{_TYPE_NAMES[dtype]}"
    types = dict.fromkeys(("output_ptr", "query_ptr", "key_cache_ptr", "value_cache_ptr"), element)
    types |= dict.fromkeys(("block_tables_ptr", "query_start_ptr", "context_lens_ptr"), "*i32")
    types |= {"scale_log2": "fp32", "window": "i32", "num_seqs": "i32", "table_stride": "i32"}
    types |= {f"{tensor}_stride_{axis}": "i32" for tensor in ("query", "output") for axis in ("token", "head")}
    types |= {f"{tensor}_stride_{axis}": "i32" for tensor in ("key", "value") for axis in ("block", "slot", "head")}
    constants: dict[str, int | bool] = {
        "HAS_WINDOW": window,
        "HEAD_DIM": head_dim,
        "GROUP_SIZE": group_size,
        "BLOCK_SIZE": 16,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_D": max(16, 1 << (head_dim - 1).bit_length()),
        "DOT_IN_FLOAT32": False,
    }
    use = f"{'decode' if decode else 'prefill'} {_TYPE_NAMES[dtype]} d={head_dim} g={group_size}"
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    # float32 must not be rounded to TF32, so it does not use the matrix units: the parity path, not the fast one.
    label = use + (" window" if window else "")
    return Variant(
        paged_attention._paged_attention_kernel, label, types, constants, options, dtype is not torch.float32
    )


def _kv_write(dtype: torch.dtype, *, num_kv_heads: int, head_dim: int) -> Variant:
    element = f"*{_TYPE_NAMES[dtype]}"
    types = dict.fromkeys(("key_ptr", "value_ptr", "key_cache_ptr", "value_cache_ptr"), element)
    types |= {"slot_mapping_ptr": "*i64"}
    types |= {f"{tensor}_stride_{axis}": "i32" for tensor in ("key", "value") for axis in ("token", "head")}
    row_size = num_kv_heads * head_dim
    constants: dict[str, int | bool] = {
        "key_stride_dim": 1,
        "value_stride_dim": 1,
        "HEAD_DIM": head_dim,
        "ROW_SIZE": row_size,
        "BLOCK": 1 << (row_size - 1).bit_length(),
    }
    label = f"{_TYPE_NAMES[dtype]} {num_kv_heads} heads d={head_dim}"
    return Variant(kv_write._kv_write_kernel, label, types, constants, {"num_warps": 4}, False)


def _rms_norm(dtype: torch.dtype, *, size: int) -> Variant:
    element = f"*{_TYPE_NAMES[dtype]}"
    types = dict.fromkeys(("output_ptr", "total_ptr", "hidden_ptr", "residual_ptr", "weight_ptr"), element)
    types |= {"hidden_stride": "i32", "residual_stride": "i32", "eps": "fp32"}
    constants: dict[str, int | bool] = {"HAS_RESIDUAL": True, "SIZE": size, "BLOCK": 1 << (size - 1).bit_length()}
    label = f"{_TYPE_NAMES[dtype]} {size} wide, residual"
    return Variant(rms_norm._rms_norm_kernel, label, types, constants, {"num_warps": 8}, False)


def _silu_mul(dtype: torch.dtype, *, size: int) -> Variant:
    element = f"*{_TYPE_NAMES[dtype]}"
    types = {"output_ptr": element, "gate_up_ptr": element, "stride": "i32"}
    constants: dict[str, int | bool] = {"SIZE": size, "BLOCK": 1024}
    label = f"{_TYPE_NAMES[dtype]} {size} wide"
    return Variant(silu_mul._silu_mul_kernel, label, types, constants, {"num_warps": 4}, False)


def main() -> None:
    """Compile all variants for all targets and print what came of it."""
    parser = argparse.ArgumentParser(prog="python -m kernels.aot", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    reports = [compile_variant(variant, target) for target in TARGETS for variant in variants()]
    if arguments.json:
        print(json.dumps([dataclasses.asdict(report) for report in reports], indent=2))
        return
    columns = "{:<7} {:<24} {:<32} {:>5} {:>6} {:>7}  {}"
    print(columns.format("target", "kernel", "variant", "regs", "spill", "shared", "matrix instruction"))
    for r in reports:
        values = (r.target, r.kernel, r.label, r.registers, r.spill_bytes, r.shared_bytes, r.matrix_instruction or "–")
        print(columns.format(*values))


if __name__ == "__main__":
    main()

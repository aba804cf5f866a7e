"""Products of 8-bit activations with 8-bit weights, a scale for each token and each output: y = (xq · s) (wq · t)ᵀ + b.

The matrix units multiply the 8-bit numbers themselves; INT8 sums are exact in 32-bit integers, FP8 sums are float32.
Scales and bias are applied once, to the finished sum (Dettmers et al. 2022, section 3; Micikevicius et al. 2022).

Few rows do not fill the GPU: several programs share an output, each with a part of the columns, and the last to come
adds their sums in order, as in :mod:`kernels.weight_only_linear`.
"""

# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (the parameters of a Triton kernel are pointers and scalars of the launch: there is no Python type to write)

import dataclasses
from collections.abc import Callable, Iterator

import torch

from kernels.device import capability
from kernels.language import tl, triton
from kernels.quantize_rows import EIGHT_BITS
from kernels.tuning import select
from kernels.variant import TYPE_NAMES, Variant, pointers
from kernels.weight_only_linear import LLAMA_3_1_8B, PROGRAMS

GROUP_M = 8  # tiles of rows that go through the same columns one after another: their weights are in the cache


@dataclasses.dataclass(frozen=True, slots=True)
class ScaledLinearConfig:
    """Tile sizes and launch parameters."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


CONFIGS = {
    "16x64": ScaledLinearConfig(16, 64, 128, 4, 4),
    "32x64": ScaledLinearConfig(32, 64, 128, 4, 4),
    "64x64": ScaledLinearConfig(64, 64, 128, 4, 4),
    "64x128": ScaledLinearConfig(64, 128, 128, 4, 3),
    "128x128": ScaledLinearConfig(128, 128, 128, 8, 3),
}


def default_config(num_rows: int) -> str:
    """The rule for shapes that nobody has measured; all of it fits an L4's shared memory."""
    if num_rows <= 16:
        return "16x64"
    if num_rows <= 32:
        return "32x64"
    return "64x128" if num_rows <= 512 else "128x128"


def scaled_linear_reference(
    x: torch.Tensor,
    x_scales: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Multiply in float64, which holds every sum exactly.

    Args:
        x: [M, K], int8 or float8_e4m3fn, contiguous in its last dimension.
        x_scales: float32 [M].
        weight: [N, K] in the dtype of ``x``, contiguous.
        weight_scales: float32 [N].
        bias: [N] or None.
        dtype: of the result.

    Returns:
        [M, N].
    """
    y = x.double() @ weight.double().t() * x_scales.double()[:, None] * weight_scales.double()
    return (y if bias is None else y + bias.double()).to(dtype)


def scaled_linear_triton(
    x: torch.Tensor,
    x_scales: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    *,
    counters: torch.Tensor | None = None,
    config: str | None = None,
    num_splits: int | None = None,
) -> torch.Tensor:
    """As :func:`scaled_linear_reference`, in one launch.

    Args:
        counters: int32, zero, at least :func:`num_counters` of them, kept with the weight; None for programs that share
            nothing. Products with the same counters must not overlap on two streams.
        config: a name in :data:`CONFIGS`; None for what was measured, or the rule's.
        num_splits: programs that share an output; None for what the shapes suggest.

    Raises:
        ValueError: naming the argument whose shape or type does not fit.
    """
    num_rows, inputs = x.shape
    outputs = weight.shape[0]
    _check(x, x_scales, weight, weight_scales, bias)
    output = torch.empty((num_rows, outputs), dtype=dtype, device=x.device)
    if not num_rows:
        return output
    key = (min(triton.next_power_of_2(num_rows), 4096), outputs, inputs, TYPE_NAMES[x.dtype])
    chosen = CONFIGS[config or select("scaled_linear", key, default_config(num_rows), x.device)]
    row_tiles, column_tiles = triton.cdiv(num_rows, chosen.block_m), triton.cdiv(outputs, chosen.block_n)
    tiles, steps = row_tiles * column_tiles, triton.cdiv(inputs, chosen.block_k)
    splits = min(num_splits or max(1, min(PROGRAMS // 2 // tiles, steps // 4)), steps)
    if counters is None or tiles > counters.shape[0]:
        splits = 1
    integer = x.dtype == torch.int8
    part = torch.int32 if integer else torch.float32
    partial = torch.empty((splits if splits > 1 else 0, num_rows, outputs), dtype=part, device=x.device)
    _scaled_linear_kernel[(tiles, splits)](
        output, partial, partial if counters is None else counters, x, x_scales, weight, weight_scales,
        x_scales if bias is None else bias, num_rows, outputs, inputs, x.stride(0),
        INTEGER=integer, HAS_BIAS=bias is not None, SPLITS=splits, BLOCK_M=chosen.block_m, BLOCK_N=chosen.block_n,
        BLOCK_K=chosen.block_k, GROUP=GROUP_M, IN_FLOAT32=x.device.type == "cpu", num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
    )  # fmt: skip
    return output


def num_counters(outputs: int) -> int:
    """Counters that a weight of so many outputs needs."""
    tiles: int = triton.cdiv(outputs, 64)
    return 4 * tiles


def _check(
    x: torch.Tensor,
    x_scales: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    if x.dtype not in (torch.int8, torch.float8_e4m3fn) or weight.dtype is not x.dtype:
        raise ValueError(f"x and weight must both be int8 or float8_e4m3fn, not {x.dtype} and {weight.dtype}")
    if x.stride(1) != 1 or not weight.is_contiguous() or weight.shape[1] != x.shape[1]:
        raise ValueError(f"x must be [M, K] and weight contiguous [N, K], not {list(x.shape)} and {list(weight.shape)}")
    sizes = {"x_scales": (x_scales, x.shape[0]), "weight_scales": (weight_scales, weight.shape[0])}
    for name, (tensor, size) in sizes.items():
        if tensor.shape != (size,) or tensor.dtype != torch.float32 or not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous float32 [{size}], not {list(tensor.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}], not {list(bias.shape)}")


@triton.jit
def tile_of(program, row_tiles, column_tiles, GROUP: tl.constexpr):
    """(row tile, column tile): GROUP row tiles take turns before the next columns come."""
    in_group = GROUP * column_tiles
    first = program // in_group * GROUP
    size = tl.minimum(row_tiles - first, GROUP)
    return first + program % in_group % size, program % in_group // size


@triton.jit(do_not_specialize=["num_rows"])
def _scaled_linear_kernel(
    output_ptr,  # [num_rows, outputs], contiguous
    partial_ptr,  # int32 or float32 [SPLITS, num_rows, outputs]
    counters_ptr,
    x_ptr,
    x_scales_ptr,
    weight_ptr,
    weight_scales_ptr,
    bias_ptr,
    num_rows,
    outputs,
    inputs,
    x_stride,
    INTEGER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    IN_FLOAT32: tl.constexpr,  # the interpreter has no 8-bit products
):
    row_tile, column_tile = tile_of(tl.program_id(0), tl.cdiv(num_rows, BLOCK_M), tl.cdiv(outputs, BLOCK_N), GROUP)
    split = tl.program_id(1)
    m, n = row_tile * BLOCK_M + tl.arange(0, BLOCK_M), column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    rows = x_ptr + m.to(tl.int64)[:, None] * x_stride
    columns = weight_ptr + n.to(tl.int64)[None, :] * inputs
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.int32 if INTEGER else tl.float32)
    # Each program has steps that follow each other: its addresses run on, and the sums are added in the columns' order.
    steps = tl.cdiv(tl.cdiv(inputs, BLOCK_K), SPLITS)
    for step in range(split * steps, tl.minimum((split + 1) * steps, tl.cdiv(inputs, BLOCK_K))):
        column = step * BLOCK_K + k
        x = tl.load(rows + column[None, :], mask=(m < num_rows)[:, None] & (column < inputs)[None, :], other=0.0)
        w = tl.load(columns + column[:, None], mask=(n < outputs)[None, :] & (column < inputs)[:, None], other=0.0)
        if IN_FLOAT32:
            total += tl.dot(x.to(tl.float32), w.to(tl.float32), input_precision="ieee").to(total.dtype)
        else:
            total = tl.dot(x, w, total, out_dtype=total.dtype)
    _finish_scaled(
        output_ptr, partial_ptr, counters_ptr + tl.program_id(0), x_scales_ptr, weight_scales_ptr, bias_ptr, total,
        m, n, num_rows, outputs, split, HAS_BIAS, SPLITS,
    )  # fmt: skip


@triton.jit
def _finish_scaled(
    output_ptr,
    partial_ptr,
    counter_ptr,
    x_scales_ptr,
    weight_scales_ptr,
    bias_ptr,
    total,
    m,
    n,
    num_rows,
    outputs,
    split,
    HAS_BIAS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Scale and store a tile; where programs share it, its part, and all parts in order if this one is the last."""
    mask = (m < num_rows)[:, None] & (n < outputs)[None, :]
    last = True
    if SPLITS > 1:
        part = (split * num_rows + m).to(tl.int64)[:, None] * outputs + n[None, :]
        tl.store(partial_ptr + part, total, mask=mask)
        tl.debug_barrier()  # all of this program's sums are on their way before it counts as come
        last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == SPLITS - 1
        if last:
            total = tl.zeros_like(total)
            for other in range(SPLITS):  # from the second-level cache: the first is not coherent
                part = (other * num_rows + m).to(tl.int64)[:, None] * outputs + n[None, :]
                total += tl.load(partial_ptr + part, mask=mask, other=0, cache_modifier=".cg")
            tl.store(counter_ptr, 0)
    if last:
        x_scales = tl.load(x_scales_ptr + m, mask=m < num_rows, other=0.0)
        weight_scales = tl.load(weight_scales_ptr + n, mask=n < outputs, other=0.0)
        y = total.to(tl.float32) * x_scales[:, None] * weight_scales[None, :]
        if HAS_BIAS:
            y += tl.load(bias_ptr + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
        where = m.to(tl.int64)[:, None] * outputs + n[None, :]
        tl.store(output_ptr + where, y.to(output_ptr.dtype.element_ty), mask=mask)


def tuning_problems(device: torch.device) -> Iterator[tuple[tuple[int | str, ...], dict[str, Callable[[], object]]]]:
    """Each shape of Llama-3.1-8B with each type at several rows: its key, and a launch in every configuration."""
    kinds = ("int8", "fp8") if capability(device) >= (8, 9) else ("int8",)
    for outputs, inputs in LLAMA_3_1_8B.values():
        for kind in kinds:
            dtype = EIGHT_BITS[kind].dtype
            weight, scales = torch.ones(outputs, inputs, device=device).to(dtype), torch.ones(outputs, device=device)
            counters = torch.zeros(num_counters(outputs), dtype=torch.int32, device=device)
            for num_rows in (1, 16, 32, 64, 128, 256, 1024, 4096):
                x, rows = torch.ones(num_rows, inputs, device=device).to(dtype), torch.ones(num_rows, device=device)
                key = (num_rows, outputs, inputs, TYPE_NAMES[dtype])
                yield key, {name: _launcher(x, rows, weight, scales, counters, name) for name in CONFIGS}


def _launcher(
    x: torch.Tensor,
    rows: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    counters: torch.Tensor,
    name: str,
) -> Callable[[], object]:
    return lambda: scaled_linear_triton(x, rows, weight, scales, counters=counters, config=name)


def aot_variants() -> list[Variant]:
    """Every configuration in INT8, three in FP8."""
    return [
        *(_variant(name, "int8", splits=4 if name == "16x64" else 1) for name in CONFIGS),
        *(_variant(name, "fp8") for name in ("16x64", "64x128", "128x128")),
    ]


def _variant(name: str, kind: str, splits: int = 1) -> Variant:
    config, type_ = CONFIGS[name], EIGHT_BITS[kind]
    types = {
        **pointers(torch.bfloat16, "output_ptr", "bias_ptr"),
        **pointers(torch.int32 if kind == "int8" else torch.float32, "partial_ptr"),
        "counters_ptr": "*i32",
        **pointers(type_.dtype, "x_ptr", "weight_ptr"),
        **pointers(torch.float32, "x_scales_ptr", "weight_scales_ptr"),
        **dict.fromkeys(("num_rows", "outputs", "inputs", "x_stride"), "i32"),
    }
    constants: dict[str, int | bool | float | None] = {
        "INTEGER": kind == "int8",
        "HAS_BIAS": False,
        "SPLITS": splits,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP": GROUP_M,
        "IN_FLOAT32": False,
    }
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    target = 90 if kind == "fp8" else 80
    return Variant(
        _scaled_linear_kernel, f"{name} {kind}", types, constants, options, True, target, aligned=("inputs", "outputs")
    )

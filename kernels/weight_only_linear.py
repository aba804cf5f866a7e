"""Products with weights of 4 or 8 bits and activations of 16: y = x Wᵀ + b, the weight never unpacked to memory.

Three ways, by the number of rows M of x; :mod:`kernels.weight_only_packing` has the layout that they share.

* **gemv** (M = 1): no matrix unit could help, reading the weight is all. Fields become floats by writing them into the
  mantissa of 2²³ and subtracting it: a conversion instruction has an eighth of the throughput that this needs.
* **tile** (M up to 128): the same fields as operands of matrix instructions of 16 columns each. Whole numbers up to 255
  are exact in bfloat16 and float16; scales meet float32 sums, once a group, so no product is rounded.
* **dequantize** (M above): the product is bound by arithmetic, which dense 16-bit matrices do best; the weight is
  unpacked once a call and torch multiplies.

Where the outputs alone do not fill the GPU, several programs share an output, each with a part of the columns. They
write float32 sums to memory; the last to come, known by a counter, adds them in the order of the programs: the result
does not depend on who was last. A row's bits depend on M only through the choice of the way and the number of programs.
"""

# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (the parameters of a Triton kernel are pointers and scalars of the launch: there is no Python type to write)

import dataclasses
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from kernels.language import tl, triton
from kernels.tuning import select
from kernels.variant import TYPE_NAMES, Variant, pointers
from kernels.weight_only_packing import PackedWeight, pack_int4, pack_int8

TILE_ROWS = 128  # most rows that the tiles multiply
PROGRAMS = 1056  # that fill a large GPU: eight for each multiprocessor


def weight_only_linear_reference(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x Wᵀ + bias in float32.

    Args:
        x: [M, K] in float32, float16 or bfloat16, contiguous in its last dimension.
        weight: of [N, K].
        bias: [N] or None.

    Returns:
        [M, N] in the dtype of ``x``.
    """
    y = x.float() @ weight.dequantize().t()
    return (y if bias is None else y + bias.float()).to(x.dtype)


# -- configurations ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class WeightOnlyConfig:
    """How a product is launched.

    Attributes:
        way: ``"gemv"``, ``"tile"`` or ``"dequantize"``.
        block_m: rows of x in a tile; 1 for gemv.
        block_n: outputs of a program.
        num_warps: as Triton means it.
    """

    way: str
    block_m: int
    block_n: int
    num_warps: int


CONFIGS = {
    "gemv 32": WeightOnlyConfig("gemv", 1, 32, 2),
    "gemv 64": WeightOnlyConfig("gemv", 1, 64, 4),
    "gemv 128": WeightOnlyConfig("gemv", 1, 128, 4),
    "tile 16x64": WeightOnlyConfig("tile", 16, 64, 4),
    "tile 16x128": WeightOnlyConfig("tile", 16, 128, 4),
    "tile 32x128": WeightOnlyConfig("tile", 32, 128, 8),
    "tile 64x128": WeightOnlyConfig("tile", 64, 128, 8),
    "dequantize": WeightOnlyConfig("dequantize", 0, 64, 4),
}


def default_config(num_rows: int) -> str:
    """The rule for shapes that nobody has measured."""
    if num_rows == 1:
        return "gemv 64"
    if num_rows > TILE_ROWS:
        return "dequantize"
    return "tile 16x64" if num_rows <= 16 else "tile 32x128" if num_rows <= 32 else "tile 64x128"


def _key(num_rows: int, weight: PackedWeight) -> tuple[int | str, ...]:
    rows = min(triton.next_power_of_2(num_rows), 2 * TILE_ROWS)
    return rows, weight.outputs, weight.inputs, weight.kind, weight.group_size


def _num_splits(tiles: int, num_blocks: int) -> int:
    """Programs that share an output, each with at least two blocks of columns."""
    return max(1, min(PROGRAMS // max(tiles, 1), num_blocks // 2))


# -- the launch -------------------------------------------------------------------------------------------------------


def weight_only_linear_triton(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None = None,
    *,
    config: str | None = None,
    num_splits: int | None = None,
) -> torch.Tensor:
    """As :func:`weight_only_linear_reference`, in one launch (dequantize: in two).

    Products with the same weight must not overlap on two streams: they would share its counters.

    Args:
        config: a name in :data:`CONFIGS`; None for what was measured, or the rule's.
        num_splits: programs that share an output; None for what the shapes suggest.

    Raises:
        ValueError: naming the argument whose shape or layout does not fit.
    """
    if x.dim() != 2 or x.shape[1] != weight.inputs or x.stride(1) != 1:
        raise ValueError(f"x must be [M, {weight.inputs}] and contiguous in its last dimension, not {list(x.shape)}")
    if bias is not None and (bias.shape != (weight.outputs,) or not bias.is_contiguous()):
        raise ValueError(f"bias must be contiguous [{weight.outputs}], not {list(bias.shape)}")
    num_rows = x.shape[0]
    if not num_rows:
        return x.new_empty((0, weight.outputs))
    name = config or select("weight_only_linear", _key(num_rows, weight), default_config(num_rows), x.device)
    chosen = CONFIGS[name]
    if chosen.way == "dequantize":
        return F.linear(x, dequantize_triton(weight, x.dtype), bias)
    if chosen.way == "gemv" and num_rows != 1:
        raise ValueError(f"config {name!r} takes one row, not {num_rows}")
    return _launch(x, weight, bias, chosen, num_splits)


def _launch(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, config: WeightOnlyConfig, splits: int | None
) -> torch.Tensor:
    num_rows, num_blocks = x.shape[0], weight.words.shape[0]
    row_tiles, column_tiles = triton.cdiv(num_rows, config.block_m), triton.cdiv(weight.outputs, config.block_n)
    tiles = row_tiles * column_tiles
    splits = min(splits or _num_splits(tiles, num_blocks), num_blocks)
    if tiles > weight.counters.shape[0]:  # more tiles than counters: there are programs enough without splitting
        splits = 1
    output = torch.empty((num_rows, weight.outputs), dtype=x.dtype, device=x.device)
    partial = torch.empty((splits if splits > 1 else 0, num_rows, weight.outputs), dtype=torch.float32, device=x.device)
    kernel = _gemv_kernel if config.way == "gemv" else _tile_kernel
    tile = {} if config.way == "gemv" else {"BLOCK_M": config.block_m, "DOT_IN_FLOAT32": x.device.type == "cpu"}
    kernel[(row_tiles, column_tiles, splits)](
        output,
        partial,
        weight.counters,
        x,
        weight.words,
        weight.scales,
        weight.scales if weight.zeros is None else weight.zeros,
        weight.scales if weight.table is None else weight.table,
        weight.words if weight.permutation is None else weight.permutation,
        x if bias is None else bias,
        num_rows,
        weight.outputs,
        weight.inputs,
        num_blocks,
        x.stride(0),
        BITS=weight.bits,
        GROUP_SIZE=_group_constant(weight),
        HAS_ZEROS=weight.zeros is not None,
        HAS_TABLE=weight.table is not None,
        HAS_PERMUTATION=weight.permutation is not None,
        HAS_BIAS=bias is not None,
        SPLITS=splits,
        BLOCK_N=config.block_n,
        **tile,
        num_warps=config.num_warps,
    )
    return output


def _group_constant(weight: PackedWeight) -> int:
    """Columns that share a scale, 0 where all do."""
    return 0 if weight.scales.shape[0] == 1 else weight.group_size


def dequantize_triton(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """The weight [N, K] in ``dtype``, columns in the order of the input channels."""
    output = torch.empty((weight.outputs, weight.inputs), dtype=dtype, device=weight.words.device)
    config = CONFIGS["dequantize"]
    _dequantize_kernel[(weight.words.shape[0], triton.cdiv(weight.outputs, config.block_n))](
        output,
        weight.words,
        weight.scales,
        weight.scales if weight.zeros is None else weight.zeros,
        weight.scales if weight.table is None else weight.table,
        weight.words if weight.permutation is None else weight.permutation,
        weight.outputs,
        weight.inputs,
        BITS=weight.bits,
        GROUP_SIZE=_group_constant(weight),
        HAS_ZEROS=weight.zeros is not None,
        HAS_TABLE=weight.table is not None,
        HAS_PERMUTATION=weight.permutation is not None,
        BLOCK_N=config.block_n,
        num_warps=config.num_warps,
    )
    return output


# -- pieces -----------------------------------------------------------------------------------------------------------


@triton.jit
def field_values(words, field, table_ptr, BITS: tl.constexpr, HAS_TABLE: tl.constexpr):
    """Field number ``field`` of each word as a float32: the signed whole number, or the level of a table."""
    q = (words >> (field * BITS)) & ((1 << BITS) - 1)
    if HAS_TABLE:
        return tl.load(table_ptr + q)
    middle: tl.constexpr = 8 if BITS == 4 else 128
    # The bits of 2^23 + q, without a conversion; the subtraction is exact.
    return (q | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + middle)


@triton.jit
def columns_of(block, field, permutation_ptr, inputs, BITS: tl.constexpr, HAS_PERMUTATION: tl.constexpr):
    """(input channels, which exist) of a field of a block's 16 words."""
    column = block * (16 * (32 // BITS)) + field * 16 + tl.arange(0, 16)
    inside = column < inputs
    if HAS_PERMUTATION:
        column = tl.load(permutation_ptr + column, mask=inside, other=0)
    return column, inside


@triton.jit
def grid_row(grid_ptr, block, group, outputs, inputs, n, GROUP_SIZE: tl.constexpr, BITS: tl.constexpr):
    """Scales (or zeros) of outputs ``n`` for the ``group``-th group of a block, float32."""
    columns: tl.constexpr = 16 * (32 // BITS)
    if GROUP_SIZE == 0:
        row = 0
    elif columns <= GROUP_SIZE:
        row = block * columns // GROUP_SIZE
    else:
        row = block * (columns // GROUP_SIZE) + group
    wanted = (n < outputs) & (row * GROUP_SIZE < inputs)  # the last block may hold fewer groups
    return tl.load(grid_ptr + row * outputs + n, mask=wanted, other=0.0).to(tl.float32)


@triton.jit
def _finish(
    output_ptr,
    partial_ptr,
    counter_ptr,  # of this tile
    bias_ptr,
    y,  # float32 [M, N]
    m,
    n,
    num_rows,
    outputs,
    split,
    HAS_BIAS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Store a tile; where programs share it, its part, and all parts in order if this program is the last of them."""
    mask = (m < num_rows)[:, None] & (n < outputs)[None, :]
    where = m.to(tl.int64)[:, None] * outputs + n[None, :]
    last = True
    if SPLITS > 1:
        part = (split * num_rows + m).to(tl.int64)[:, None] * outputs + n[None, :]
        tl.store(partial_ptr + part, y, mask=mask)
        tl.debug_barrier()  # all of this program's sums are on their way before it counts as come
        last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == SPLITS - 1
        if last:
            y = tl.zeros_like(y)
            for other in range(SPLITS):  # from the second-level cache: the first is not coherent
                part = (other * num_rows + m).to(tl.int64)[:, None] * outputs + n[None, :]
                y += tl.load(partial_ptr + part, mask=mask, other=0.0, cache_modifier=".cg")
            tl.store(counter_ptr, 0)
    if last:
        if HAS_BIAS:
            y += tl.load(bias_ptr + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
        tl.store(output_ptr + where, y.to(output_ptr.dtype.element_ty), mask=mask)


# -- the kernels ------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_rows"])
def _gemv_kernel(
    output_ptr,  # [num_rows, outputs], contiguous
    partial_ptr,  # float32 [SPLITS, num_rows, outputs]
    counters_ptr,
    x_ptr,  # [num_rows, inputs]
    words_ptr,  # int32 [blocks, outputs, 16]
    scales_ptr,  # [groups, outputs]
    zeros_ptr,
    table_ptr,  # float32 [16]
    permutation_ptr,  # int32 [inputs]
    bias_ptr,
    num_rows,
    outputs,
    inputs,
    num_blocks,
    x_stride,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_PERMUTATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tile, split = tl.program_id(1), tl.program_id(2)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    word = tl.arange(0, 16)[None, :]
    wanted = (n < outputs)[:, None]
    fields: tl.constexpr = 32 // BITS
    # Fields that share a scale: a group as large as a block or larger is met once a block.
    members: tl.constexpr = fields if GROUP_SIZE == 0 or 16 * fields <= GROUP_SIZE else GROUP_SIZE // 16
    total = tl.zeros([BLOCK_N, 16], tl.float32)
    for block in range(split, num_blocks, SPLITS):
        rows_of_words = (block * outputs + n).to(tl.int64)[:, None] * 16
        words = tl.load(words_ptr + rows_of_words + word, mask=wanted, other=0)
        for group in tl.static_range(fields // members):
            sums = tl.zeros([BLOCK_N, 16], tl.float32)
            activations = tl.zeros([16], tl.float32)
            for member in tl.static_range(members):
                column, inside = columns_of(
                    block, group * members + member, permutation_ptr, inputs, BITS, HAS_PERMUTATION
                )
                x = tl.load(x_ptr + column, mask=inside, other=0.0).to(tl.float32)
                sums += field_values(words, group * members + member, table_ptr, BITS, HAS_TABLE) * x[None, :]
                activations += x
            total += sums * grid_row(scales_ptr, block, group, outputs, inputs, n, GROUP_SIZE, BITS)[:, None]
            if HAS_ZEROS:
                zero = grid_row(zeros_ptr, block, group, outputs, inputs, n, GROUP_SIZE, BITS)
                total += zero[:, None] * activations[None, :]
    y = tl.sum(total, axis=1)[None, :]
    m = tl.arange(0, 1)
    _finish(output_ptr, partial_ptr, counters_ptr + tile, bias_ptr, y, m, n, num_rows, outputs, split, HAS_BIAS, SPLITS)


@triton.jit(do_not_specialize=["num_rows"])
def _tile_kernel(
    output_ptr,  # [num_rows, outputs], contiguous
    partial_ptr,  # float32 [SPLITS, num_rows, outputs]
    counters_ptr,
    x_ptr,  # [num_rows, inputs]
    words_ptr,  # int32 [blocks, outputs, 16]
    scales_ptr,  # [groups, outputs]
    zeros_ptr,
    table_ptr,  # float32 [16]
    permutation_ptr,  # int32 [inputs]
    bias_ptr,
    num_rows,
    outputs,
    inputs,
    num_blocks,
    x_stride,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_PERMUTATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    DOT_IN_FLOAT32: tl.constexpr,
):
    split = tl.program_id(2)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    word = tl.arange(0, 16)[None, :]
    wanted = (n < outputs)[:, None]
    rows = x_ptr + m.to(tl.int64)[:, None] * x_stride
    fields: tl.constexpr = 32 // BITS
    members: tl.constexpr = fields if GROUP_SIZE == 0 or 16 * fields <= GROUP_SIZE else GROUP_SIZE // 16
    compute: tl.constexpr = tl.float32 if DOT_IN_FLOAT32 else x_ptr.dtype.element_ty
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for block in range(split, num_blocks, SPLITS):
        rows_of_words = (block * outputs + n).to(tl.int64)[:, None] * 16
        words = tl.load(words_ptr + rows_of_words + word, mask=wanted, other=0)
        for group in tl.static_range(fields // members):
            sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            activations = tl.zeros([BLOCK_M], tl.float32)
            for member in tl.static_range(members):
                column, inside = columns_of(
                    block, group * members + member, permutation_ptr, inputs, BITS, HAS_PERMUTATION
                )
                mask = (m < num_rows)[:, None] & inside[None, :]
                x = tl.load(rows + column[None, :], mask=mask, other=0.0).to(compute)
                w = field_values(words, group * members + member, table_ptr, BITS, HAS_TABLE).to(compute)
                sums = tl.dot(x, tl.trans(w), sums, input_precision="ieee")
                if HAS_ZEROS:
                    activations += tl.sum(x.to(tl.float32), axis=1)
            total += sums * grid_row(scales_ptr, block, group, outputs, inputs, n, GROUP_SIZE, BITS)[None, :]
            if HAS_ZEROS:
                zero = grid_row(zeros_ptr, block, group, outputs, inputs, n, GROUP_SIZE, BITS)
                total += activations[:, None] * zero[None, :]
    counter_ptr = counters_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    _finish(output_ptr, partial_ptr, counter_ptr, bias_ptr, total, m, n, num_rows, outputs, split, HAS_BIAS, SPLITS)


@triton.jit
def _dequantize_kernel(
    output_ptr,  # [outputs, inputs], contiguous
    words_ptr,
    scales_ptr,
    zeros_ptr,
    table_ptr,
    permutation_ptr,
    outputs,
    inputs,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_PERMUTATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    block = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_of_words = (block * outputs + n).to(tl.int64)[:, None] * 16
    words = tl.load(words_ptr + rows_of_words + tl.arange(0, 16)[None, :], mask=(n < outputs)[:, None], other=0)
    fields: tl.constexpr = 32 // BITS
    members: tl.constexpr = fields if GROUP_SIZE == 0 or 16 * fields <= GROUP_SIZE else GROUP_SIZE // 16
    for field in tl.static_range(fields):
        column, inside = columns_of(block, field, permutation_ptr, inputs, BITS, HAS_PERMUTATION)
        values = field_values(words, field, table_ptr, BITS, HAS_TABLE)
        values *= grid_row(scales_ptr, block, field // members, outputs, inputs, n, GROUP_SIZE, BITS)[:, None]
        if HAS_ZEROS:
            values += grid_row(zeros_ptr, block, field // members, outputs, inputs, n, GROUP_SIZE, BITS)[:, None]
        where = n.to(tl.int64)[:, None] * inputs + column[None, :]
        mask = (n < outputs)[:, None] & inside[None, :]
        tl.store(output_ptr + where, values.to(output_ptr.dtype.element_ty), mask=mask)


# -- for the tuner and ahead of time ----------------------------------------------------------------------------------

LLAMA_3_1_8B = {"qkv": (6144, 4096), "output": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
"""(N, K) of the linear layers."""


def tuning_problems(device: torch.device) -> Iterator[tuple[tuple[int | str, ...], dict[str, Callable[[], object]]]]:
    """Each shape of Llama-3.1-8B with each format at several rows: its key, and a launch in every configuration."""
    for outputs, inputs in LLAMA_3_1_8B.values():
        for make in (random_int4, random_int8):
            weight = make(outputs, inputs, device)
            for num_rows in (1, 2, 16, 32, 64, 128, 256):
                x = torch.randn(num_rows, inputs, device=device, dtype=torch.bfloat16)
                names = [name for name, config in CONFIGS.items() if (config.way == "gemv") == (num_rows == 1)]
                yield _key(num_rows, weight), {name: _launcher(x, weight, name) for name in names}


def _launcher(x: torch.Tensor, weight: PackedWeight, name: str) -> Callable[[], object]:
    return lambda: weight_only_linear_triton(x, weight, config=name)


def random_int4(
    outputs: int, inputs: int, device: torch.device, group_size: int = 128, dtype: torch.dtype = torch.bfloat16
) -> PackedWeight:
    """A random asymmetric INT4 weight, about as large as a trained layer's."""
    q = torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8, device=device)
    groups = inputs // group_size
    scales = torch.rand(outputs, groups, device=device).add(0.5).mul(0.01).to(dtype)
    zeros = torch.randn(outputs, groups, device=device).mul(0.01).to(dtype)
    return pack_int4(q, scales, zeros)


def random_int8(outputs: int, inputs: int, device: torch.device) -> PackedWeight:
    """A random INT8 weight."""
    q = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, device=device)
    return pack_int8(q, torch.rand(outputs, device=device).add(0.5).mul(1e-3).to(torch.bfloat16))


def aot_variants() -> list[Variant]:
    """Every configuration; both widths, with and without zeros, a table and act-order."""
    names = [name for name in CONFIGS if name != "dequantize"]
    return [
        *(_variant(name, torch.bfloat16, bits=4, group_size=128, zeros=True) for name in names),
        _variant("gemv 64", torch.float16, bits=4, group_size=32, zeros=True),
        _variant("gemv 64", torch.bfloat16, bits=8),
        _variant("gemv 64", torch.bfloat16, bits=4, group_size=64, table=True),
        _variant("tile 16x64", torch.float16, bits=4, group_size=32, permutation=True),
        _variant("tile 16x64", torch.bfloat16, bits=8),
        _variant("tile 64x128", torch.float16, bits=8),
        _variant("tile 16x64", torch.bfloat16, bits=4, group_size=64, table=True),
        _variant("dequantize", torch.bfloat16, bits=4, group_size=128, zeros=True),
    ]


def _variant(
    name: str,
    dtype: torch.dtype,
    *,
    bits: int,
    group_size: int = 0,
    zeros: bool = False,
    table: bool = False,
    permutation: bool = False,
) -> Variant:
    config = CONFIGS[name]
    grid = pointers(torch.bfloat16, "scales_ptr", "zeros_ptr") | {"table_ptr": "*fp32", "permutation_ptr": "*i32"}
    constants: dict[str, int | bool | float | None] = {
        "BITS": bits,
        "GROUP_SIZE": group_size,
        "HAS_ZEROS": zeros,
        "HAS_TABLE": table,
        "HAS_PERMUTATION": permutation,
        "BLOCK_N": config.block_n,
    }
    flags = {"zeros": zeros, "table": table, "act-order": permutation}
    width = f"int{bits}" + (f" g{group_size}" if group_size else "")
    label = " ".join([name, TYPE_NAMES[dtype], width, *(flag for flag, on in flags.items() if on)])
    options = {"num_warps": config.num_warps}
    if config.way == "dequantize":
        types = {**pointers(dtype, "output_ptr"), "words_ptr": "*i32", **grid, "outputs": "i32", "inputs": "i32"}
        return Variant(_dequantize_kernel, label, types, constants, options)
    types = {
        **pointers(dtype, "output_ptr", "x_ptr", "bias_ptr"),
        "partial_ptr": "*fp32",
        **pointers(torch.int32, "counters_ptr", "words_ptr"),
        **grid,
        **dict.fromkeys(("num_rows", "outputs", "inputs", "num_blocks", "x_stride"), "i32"),
    }
    constants |= {"HAS_BIAS": False, "SPLITS": 4}
    if config.way == "gemv":
        return Variant(_gemv_kernel, label, types, constants, options, aligned=("inputs", "outputs"))
    constants |= {"BLOCK_M": config.block_m, "DOT_IN_FLOAT32": False}
    return Variant(_tile_kernel, label, types, constants, options, True, aligned=("inputs", "outputs"))

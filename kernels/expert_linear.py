"""The products of a mixture of experts in one launch: the rows of every token with the weights of its experts.

Pairs of a token and an expert are sorted by expert. A program owns ``BLOCK_M`` consecutive pairs of one expert and some
of its outputs; expert e's programs start at ``offsets[e] // BLOCK_M + e``, so the grid follows from shapes alone (at
most one wasted tile an expert) and nobody on the host needs to know how many tokens an expert got:

    chosen experts    token 0: [3, 1]   token 1: [1, 0]   token 2: [3, 2]
    sorted pairs      0: token 1 | 1: tokens 0, 1 | 2: token 2 | 3: tokens 0, 2
    offsets           0, 1, 3, 4, 6
"""

# ruff: noqa: ANN001
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (the parameters of a Triton kernel are pointers and scalars of the launch: there is no Python type to write)

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import torch

from kernels.language import tl, triton
from kernels.paged_attention import find_sequence
from kernels.tuning import select
from kernels.variant import TYPE_NAMES, Variant, pointers


@dataclasses.dataclass(frozen=True, slots=True)
class ExpertLinearConfig:
    """Tile sizes and launch parameters."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


CONFIGS = {
    "16x64": ExpertLinearConfig(16, 64, 64, 4, 4),
    "32x128": ExpertLinearConfig(32, 128, 64, 4, 3),
    "64x128": ExpertLinearConfig(64, 128, 64, 4, 3),
    "128x128": ExpertLinearConfig(128, 128, 64, 8, 3),
    "float32": ExpertLinearConfig(16, 64, 32, 4, 2),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Routing:
    """Which pairs of a token and an expert there are, sorted by expert.

    Attributes:
        order: int64 [P], the pair ``token · k + choice`` at each sorted place.
        offsets: int32 [E + 1], the sorted places of expert e are ``offsets[e] : offsets[e + 1]``.
        per_token: k.
    """

    order: torch.Tensor
    offsets: torch.Tensor
    per_token: int


def sort_by_expert(chosen: torch.Tensor, num_experts: int) -> Routing:
    """Sort the pairs of ``chosen`` (int64 [T, k]), stable, without a value read back."""
    flat = chosen.flatten()
    counts = torch.zeros(num_experts, dtype=torch.int64, device=chosen.device)
    counts.scatter_add_(0, flat, torch.ones_like(flat))
    offsets = torch.zeros(num_experts + 1, dtype=torch.int32, device=chosen.device)
    offsets[1:] = counts.cumsum(0)
    return Routing(torch.argsort(flat, stable=True), offsets, chosen.shape[1])


def expert_linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    routing: Routing,
    *,
    of_tokens: bool,
    pair_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each pair's row times its expert's weight, expert by expert.

    Args:
        x: with ``of_tokens`` [T, K], a row for each token; else [P, K], a row for each pair in sorted order.
        weight: [E, N, K], contiguous.
        routing: of T tokens.
        of_tokens: see ``x``.
        pair_weights: float32 [T, k]. If given, the result is multiplied by them and stands in the order of the pairs
            (``result.view(T, k, N).sum(1)`` is the mixture's); else it stands in sorted order.

    Returns:
        [P, N] in the dtype of ``x``.
    """
    rows = (x[routing.order // routing.per_token] if of_tokens else x).float()
    bounds = routing.offsets.tolist()
    pieces = [
        rows[start:stop] @ weight[expert].float().t() for expert, (start, stop) in enumerate(itertools.pairwise(bounds))
    ]
    product = torch.cat(pieces)
    if pair_weights is None:
        return product.to(x.dtype)
    scaled = product * pair_weights.flatten()[routing.order][:, None]
    return torch.empty_like(scaled).index_copy_(0, routing.order, scaled).to(x.dtype)


def expert_linear_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    routing: Routing,
    *,
    of_tokens: bool,
    pair_weights: torch.Tensor | None = None,
    config: str | None = None,
) -> torch.Tensor:
    """As :func:`expert_linear_reference`, in one launch; rows are gathered as they are read.

    Raises:
        ValueError: naming the argument whose shape does not fit.
    """
    num_experts, outputs, inputs = weight.shape
    num_pairs = routing.order.shape[0]
    _check(x, weight, routing, of_tokens)
    output = torch.empty((num_pairs, outputs), dtype=x.dtype, device=x.device)
    if not num_pairs:
        return output
    mean = max(1, num_pairs // num_experts)
    key = (min(triton.next_power_of_2(mean), 1024), num_experts, outputs, inputs, TYPE_NAMES[x.dtype])
    name = config or select("expert_linear", key, default_config(mean, x.dtype), x.device)
    chosen = CONFIGS[name]
    grid = (num_pairs // chosen.block_m + num_experts, triton.cdiv(outputs, chosen.block_n))
    _expert_linear_kernel[grid](
        output,
        x,
        weight,
        routing.order,
        routing.offsets,
        x if pair_weights is None else pair_weights,
        num_experts,
        outputs,
        inputs,
        routing.per_token,
        x.stride(0),
        OF_TOKENS=of_tokens,
        WEIGHTED=pair_weights is not None,
        BLOCK_M=chosen.block_m,
        BLOCK_N=chosen.block_n,
        BLOCK_K=chosen.block_k,
        DOT_IN_FLOAT32=x.device.type == "cpu",
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
    )
    return output


def default_config(pairs_per_expert: int, dtype: torch.dtype) -> str:
    """The rule for shapes that nobody has measured."""
    if dtype == torch.float32:
        return "float32"
    if pairs_per_expert <= 16:
        return "16x64"
    return "32x128" if pairs_per_expert <= 64 else "64x128" if pairs_per_expert <= 512 else "128x128"


def _check(x: torch.Tensor, weight: torch.Tensor, routing: Routing, of_tokens: bool) -> None:
    num_pairs = routing.order.shape[0]
    rows = num_pairs // routing.per_token if of_tokens else num_pairs
    if x.shape != (rows, weight.shape[2]) or x.stride(1) != 1:
        raise ValueError(f"x must be [{rows}, {weight.shape[2]}], contiguous in its last dimension: {list(x.shape)}")
    if not weight.is_contiguous() or weight.dtype is not x.dtype:
        raise ValueError(f"weight must be contiguous and {x.dtype}, not {weight.dtype}")
    if routing.offsets.shape != (weight.shape[0] + 1,):
        raise ValueError(f"routing is of {routing.offsets.shape[0] - 1} experts, weight has {weight.shape[0]}")


@triton.jit
def _expert_linear_kernel(
    output_ptr,  # [P, outputs]
    x_ptr,
    weight_ptr,  # [E, outputs, inputs]
    order_ptr,  # int64 [P]
    offsets_ptr,  # int32 [E + 1]
    pair_weights_ptr,  # float32 [P], by pair
    num_experts,
    outputs,
    inputs,
    per_token,
    x_stride,
    OF_TOKENS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT_IN_FLOAT32: tl.constexpr,
):
    tile = tl.program_id(0)
    expert = find_sequence(offsets_ptr, tile, num_experts, BLOCK_M)
    begin = tl.load(offsets_ptr + expert)
    place = begin + (tile - (begin // BLOCK_M + expert)) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = place < tl.load(offsets_ptr + expert + 1)
    if tl.max(inside.to(tl.int32), axis=0) == 0:
        return
    pair = tl.load(order_ptr + place, mask=inside, other=0)
    row = (pair // per_token if OF_TOKENS else place).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    rows = x_ptr + row[:, None] * x_stride
    columns = weight_ptr + (expert.to(tl.int64) * outputs + n)[None, :] * inputs
    compute: tl.constexpr = tl.float32 if DOT_IN_FLOAT32 else x_ptr.dtype.element_ty
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, inputs, BLOCK_K):
        column = start + k
        x = tl.load(rows + column[None, :], mask=inside[:, None] & (column < inputs)[None, :], other=0.0).to(compute)
        mask = (n < outputs)[None, :] & (column < inputs)[:, None]
        w = tl.load(columns + column[:, None], mask=mask, other=0.0).to(compute)
        total = tl.dot(x, w, total, input_precision="ieee")
    target = place.to(tl.int64)
    if WEIGHTED:
        total = total * tl.load(pair_weights_ptr + pair, mask=inside, other=0.0).to(tl.float32)[:, None]
        target = pair.to(tl.int64)
    where = target[:, None] * outputs + n[None, :]
    tl.store(output_ptr + where, total.to(output_ptr.dtype.element_ty), mask=inside[:, None] & (n < outputs)[None, :])


def tuning_problems(device: torch.device) -> Iterator[tuple[tuple[int | str, ...], dict[str, Callable[[], object]]]]:
    """The gate and up product of Qwen3-30B-A3B (128 experts, 8 a token): its key, a launch in every configuration."""
    experts, outputs, inputs, per_token = 128, 1536, 2048, 8
    weight = torch.randn(experts, outputs, inputs, device=device, dtype=torch.bfloat16)
    for num_tokens in (1, 16, 64, 256, 1024, 4096):
        chosen = torch.randint(0, experts, (num_tokens, per_token), device=device)
        routing, x = sort_by_expert(chosen, experts), torch.randn(num_tokens, inputs, device=device, dtype=weight.dtype)
        mean = max(1, num_tokens * per_token // experts)
        key = (min(triton.next_power_of_2(mean), 1024), experts, outputs, inputs, TYPE_NAMES[weight.dtype])
        yield key, {name: _launcher(x, weight, routing, name) for name in CONFIGS if name != "float32"}


def _launcher(x: torch.Tensor, weight: torch.Tensor, routing: Routing, name: str) -> Callable[[], object]:
    return lambda: expert_linear_triton(x, weight, routing, of_tokens=True, config=name)


def aot_variants() -> list[Variant]:
    """Every configuration: the product of gathered rows, and for one the weighted product back to the tokens."""
    sixteen = [name for name in CONFIGS if name != "float32"]
    return [
        *(_variant(name, torch.bfloat16) for name in sixteen),
        _variant("64x128", torch.float16, weighted=True),
        _variant("float32", torch.float32),
    ]


def _variant(name: str, dtype: torch.dtype, *, weighted: bool = False) -> Variant:
    config = CONFIGS[name]
    types = {
        **pointers(dtype, "output_ptr", "x_ptr", "weight_ptr"),
        "order_ptr": "*i64",
        "offsets_ptr": "*i32",
        "pair_weights_ptr": "*fp32",
        **dict.fromkeys(("num_experts", "outputs", "inputs", "per_token", "x_stride"), "i32"),
    }
    constants: dict[str, int | bool | float | None] = {
        "OF_TOKENS": not weighted,
        "WEIGHTED": weighted,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "DOT_IN_FLOAT32": False,
    }
    label = f"{name} {TYPE_NAMES[dtype]}" + (" weighted" if weighted else "")
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    # float32 must not be rounded to TF32, so it does not use the matrix units.
    matrix = dtype is not torch.float32
    return Variant(_expert_linear_kernel, label, types, constants, options, matrix, aligned=("inputs", "outputs"))

"""How quantized weights lie in memory for :mod:`kernels.weight_only_linear`, converted once when weights are swapped.

A weight [N, K] is cut into blocks of 128 (4-bit) or 64 (8-bit) columns. A block's row is 16 words of 32 bits, and field
i of word j holds column ``16 i + j`` of the block:

    4-bit, block b of row n: words[b, n, 0 … 15]

    bits of word j      0 … 3        4 … 7         8 … 11       …    28 … 31
    holds column      128 b + j   128 b + 16 + j  128 b + 32 + j  …  128 b + 112 + j

So a shift and a mask take 16 neighbouring columns out of 16 words with the threads that loaded them: nothing is
shuffled, for a row of activations as for the tiles of a matrix product, whose sum over columns may be taken in any
order. The words of a block are contiguous over rows (16 bytes a thread, no gap); so are scales: ``scales[group, n]``.
"""

from __future__ import annotations

import dataclasses

import torch

WORDS = 16  # of a block's row
MIDDLE = {4: 8, 8: 128}  # what is added to signed values so that fields hold whole numbers from 0
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Quantiles of a normal distribution (Dettmers et al. 2023, appendix E)."""


@dataclasses.dataclass(frozen=True, slots=True)
class PackedWeight:
    """One quantized weight in the layout of the kernel.

    Attributes:
        kind: ``"int4"``, ``"int8"`` or ``"nf4"``.
        words: int32 [blocks, N, 16].
        scales: [groups, N], a float type; one group where a whole row shares a scale.
        zeros: [groups, N] in the dtype of ``scales``, or None: w = q · scale + zero.
        table: float32 [16], the levels of NF4, or None.
        permutation: int32 [K], the input channel of each column (act-order), or None for their own order.
        counters: int32 [tiles], zero between two launches: which of the programs that share an output comes last.
        outputs, inputs: N and K.
        group_size: columns that share a scale, K where all do.
    """

    kind: str
    words: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    table: torch.Tensor | None
    permutation: torch.Tensor | None
    counters: torch.Tensor
    outputs: int
    inputs: int
    group_size: int

    @property
    def bits(self) -> int:
        """Of one weight."""
        return 8 if self.kind == "int8" else 4

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that is resident, by role."""
        parts = {name: getattr(self, name) for name in ("words", "scales", "zeros", "table", "permutation", "counters")}
        return {name: tensor for name, tensor in parts.items() if tensor is not None}

    def fields(self) -> torch.Tensor:
        """The stored whole numbers, uint8 [N, K], columns in their packed order."""
        per_word, mask = 32 // self.bits, (1 << self.bits) - 1
        shifts = torch.arange(per_word, device=self.words.device, dtype=torch.int32) * self.bits
        parts = (self.words[:, :, None, :] >> shifts[:, None]) & mask  # [blocks, N, per_word, 16]
        flat = parts.permute(1, 0, 2, 3).reshape(self.outputs, -1)
        return flat[:, : self.inputs].to(torch.uint8)

    def dequantize(self) -> torch.Tensor:
        """float32 [N, K], columns in the order of the input channels."""
        return self._values(self.fields(), self.scales, self.zeros)

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """float32 [T, K] of the rows ``index`` (int64 [T]): the lookup of an embedding."""
        some = dataclasses.replace(self, words=self.words[:, index], outputs=index.shape[0])
        zeros = None if self.zeros is None else self.zeros[:, index]
        return self._values(some.fields(), self.scales[:, index], zeros)

    def _values(self, fields: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor:
        q = fields.float() - MIDDLE[self.bits] if self.table is None else self.table[fields.long()]
        values = q * _per_column(scales, self.group_size, self.inputs)
        if zeros is not None:
            values = values + _per_column(zeros, self.group_size, self.inputs)
        if self.permutation is None:
            return values
        return torch.empty_like(values).index_copy_(1, self.permutation.long(), values)


def _per_column(grid: torch.Tensor, group_size: int, inputs: int) -> torch.Tensor:
    return grid.float().t().repeat_interleave(group_size, dim=1)[:, :inputs]


def pack_int4(
    q: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None = None,
    group_index: torch.Tensor | None = None,
) -> PackedWeight:
    """w = (q - 8) · scale + zero.

    Args:
        q: uint8 [N, K] in 0 … 15.
        scales: [N, groups]; every group has K / groups input channels, at least 16.
        zeros: [N, groups] or None for a symmetric grid.
        group_index: int [K], the group of each input channel (act-order of GPTQ, Frantar et al. 2022); None where
            group g is the channels from g · K / groups on.

    Raises:
        ValueError: naming the argument whose shape does not fit.
    """
    group_size = _group_size(q, scales)
    permutation = None
    if group_index is not None:
        permutation = torch.argsort(group_index, stable=True)
        counts = torch.bincount(group_index.long(), minlength=scales.shape[1])
        if (counts != group_size).any():
            raise ValueError(f"group_index must name every group {group_size} times")
        q, permutation = q[:, permutation], permutation.int()
    return _pack("int4", q, scales, zeros, group_size, permutation=permutation)


def pack_int8(q: torch.Tensor, scales: torch.Tensor) -> PackedWeight:
    """w = q · scale, one scale an output channel.

    Args:
        q: int8 [N, K].
        scales: [N].
    """
    if scales.shape != q.shape[:1]:
        raise ValueError(f"scales must be [{q.shape[0]}], not {list(scales.shape)}")
    return _pack("int8", (q.short() + MIDDLE[8]).to(torch.uint8), scales[:, None], None, q.shape[1])


def pack_nf4(q: torch.Tensor, scales: torch.Tensor) -> PackedWeight:
    """w = level[q] · scale.

    Args:
        q: uint8 [N, K], numbers of :data:`NF4_LEVELS`.
        scales: [N, groups], the largest magnitude of each group.
    """
    table = torch.tensor(NF4_LEVELS, dtype=torch.float32, device=q.device)
    return _pack("nf4", q, scales, None, _group_size(q, scales), table=table)


def num_counters(num_rows: int) -> int:
    """Counters that a product with so many outputs needs at most."""
    return -(-num_rows // 16)


def _group_size(q: torch.Tensor, scales: torch.Tensor) -> int:
    inputs, groups = q.shape[1], scales.shape[1]
    size = inputs // groups
    if scales.shape[0] != q.shape[0] or size * groups != inputs:
        raise ValueError(f"scales must be [{q.shape[0]}, groups] with groups that divide {inputs}")
    if groups > 1 and (size % 128 if size > 128 else 128 % size or size < 16):
        raise ValueError(f"scales make groups of {size} channels: 16, 32, 64, 128 or a multiple of 128 are packed")
    return size


def _pack(
    kind: str,
    q: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    group_size: int,
    *,
    table: torch.Tensor | None = None,
    permutation: torch.Tensor | None = None,
) -> PackedWeight:
    bits = 8 if kind == "int8" else 4
    num_rows, num_columns = q.shape
    per_word = 32 // bits
    block = WORDS * per_word
    padded = torch.nn.functional.pad(q, (0, -num_columns % block))  # columns behind the last meet activations of 0
    fields = padded.view(num_rows, -1, per_word, WORDS).permute(1, 0, 2, 3).to(torch.int64)
    shifts = torch.arange(per_word, device=q.device, dtype=torch.int64)[:, None] * bits
    words = (fields << shifts).sum(dim=2)
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    return PackedWeight(
        kind=kind,
        words=words.contiguous(),
        scales=scales.t().contiguous(),
        zeros=None if zeros is None else zeros.t().contiguous(),
        table=table,
        permutation=permutation,
        counters=torch.zeros(num_counters(num_rows), dtype=torch.int32, device=q.device),
        outputs=num_rows,
        inputs=num_columns,
        group_size=group_size,
    )

"""Number formats of weights, activations and the KV cache, and what they cost per value. One row each.

Names are resolved here, once, where a request or a checkpoint comes in; all else works on the objects.
"""

from __future__ import annotations

import dataclasses
import re
from fractions import Fraction

from engine.errors import ConfigError

GROUP_SIZES = (32, 64, 128)

#: GGUF block types: (weights a block, bytes a block), from ggml's block structures.
_GGUF_BLOCKS = {
    "q4_0": (32, 18),
    "q4_1": (32, 20),
    "q5_0": (32, 22),
    "q5_1": (32, 24),
    "q8_0": (32, 34),
    "iq4_nl": (32, 18),
    "q2_k": (256, 84),
    "q3_k": (256, 110),
    "q4_k": (256, 144),
    "q5_k": (256, 176),
    "q6_k": (256, 210),
    "iq4_xs": (256, 136),
}
#: Where 256 does not divide a row, llama.cpp falls back to a type with blocks of 32.
_GGUF_FALLBACK = {
    "q2_k": "q4_0",
    "q3_k": "q4_0",
    "q4_k": "q5_0",
    "q5_k": "q5_1",
    "q6_k": "q8_0",
    "iq4_xs": "iq4_nl",
}
#: Mixtures of block types, e.g. Q4_K_M: (type of most matrices, type of the more sensitive ones).
_GGUF_MIXTURES = {"q4_k_m": ("q4_k", "q6_k"), "q5_k_m": ("q5_k", "q6_k")}


@dataclasses.dataclass(frozen=True, slots=True)
class ComputeDtype:
    """A format that models compute in: its canonical name and the bytes of one value."""

    name: str
    bytes: int

    @property
    def as_weights(self) -> WeightPrecision:
        """Weights in this format: not quantized."""
        return WeightPrecision(self.name, 8 * self.bytes, dtype=self)

    @property
    def as_kv(self) -> KVPrecision:
        """Keys and values in this format."""
        return KVPrecision(self.name, 8 * self.bytes)


BFLOAT16, FLOAT16, FLOAT32 = ComputeDtype("bfloat16", 2), ComputeDtype("float16", 2), ComputeDtype("float32", 4)
_DTYPES = {
    "bf16": BFLOAT16,
    "fp16": FLOAT16,
    "half": FLOAT16,
    "fp32": FLOAT32,
    "float": FLOAT32,
    **{dtype.name: dtype for dtype in (BFLOAT16, FLOAT16, FLOAT32)},
}


def compute_dtype(text: str, field: str = "dtype") -> ComputeDtype:
    """The compute dtype of that name; ``"bf16"`` and other short forms are known.

    >>> compute_dtype("fp16").name, compute_dtype("torch.float32").bytes
    ('float16', 4)

    Raises:
        ConfigError: if it is none.
    """
    found = _DTYPES.get(str(text).lower().removeprefix("torch."))
    if found is None:
        raise ConfigError(
            f"{str(text)[:40]!r} is not a compute dtype.", field=field, remedy="Choose bfloat16, float16 or float32."
        )
    return found


@dataclasses.dataclass(frozen=True, slots=True)
class WeightPrecision:
    """How the matrices of attention and MLP are stored; embedding, head, norms and biases keep the model's dtype.

    Attributes:
        name: canonical name, e.g. ``"int4-g128"``.
        bits: of one weight (of a GGUF block type: rounded down).
        group_size: weights along the input dimension that share a scale; None: one scale per output channel.
        scale_bytes: of one scale; 0 if the format has none.
        zero_point_bits: of one zero point; 0 if the grid is symmetric.
        dtype: set for the formats a model computes in, else None.
        mixture: GGUF: (type of most matrices, type of the more sensitive ones) where these differ.
        tile: a scale covers ``tile`` · ``tile`` weights; None: see ``group_size``.
        block: GGUF: (weights, bytes) of one block; scales are inside. Embedding and head are quantized too.
        experts_only: where a model has routed experts, nothing else is quantized (gpt-oss).
        whole_tensor: one scale for all of a projection.
        exact: groups are as a checkpoint has them: of ``group_size``, the last one perhaps smaller.
        absmax: bitsandbytes: (values that share a maximum, maxima that share a scale of their own or 0).
    """

    name: str
    bits: int
    group_size: int | None = None
    scale_bytes: int = 0
    zero_point_bits: int = 0
    dtype: ComputeDtype | None = None
    tile: int | None = None
    block: tuple[int, int] | None = None
    mixture: tuple[WeightPrecision, WeightPrecision] | None = None
    experts_only: bool = False
    whole_tensor: bool = False
    exact: bool = False
    absmax: tuple[int, int] | None = None

    @property
    def products(self) -> str | None:
        """Arithmetic of its own that matrix products use where a GPU has it: "fp8" or "int8" (activations of 8 bits
        too); None where weights are widened to the compute dtype."""
        return "fp8" if self.name.startswith("fp8") else "int8" if self.name in ("w8a8", "w4a8") else None

    def matrix_bytes(self, rows: int, columns: int, plain_bytes: int = 2, slices: int = 1) -> int:
        """Bytes of a matrix of ``rows`` outputs and ``columns`` inputs, scales and zero points included.

        Where the group size does not divide ``columns``, the largest smaller one that does is used; where none does,
        the matrix stays unquantized at ``plain_bytes`` a value. ``slices``: projections that are fused into the matrix.

        >>> weight_precision("int4-g128").matrix_bytes(2, 128)  # 128 B of weights, 2 scales of 2 B, 2 halves
        133
        >>> weight_precision("q4_k").matrix_bytes(1, 4096) * 8 / 4096  # 4.5 bits a weight
        4.5
        """
        if self.block is not None:
            return self._block_bytes(rows, columns, plain_bytes)
        if self.absmax is not None:
            return self._absmax_bytes(rows * columns, slices)
        if self.whole_tensor:
            return rows * columns * self.bits // 8 + slices * self.scale_bytes
        if self.tile is not None:
            scales = -(-rows // self.tile) * -(-columns // self.tile)
            return rows * columns * self.bits // 8 + scales * self.scale_bytes
        group = self.group_size
        if group is not None and not self.exact:
            sizes = (size for size in (*reversed(GROUP_SIZES), 16) if size <= group and columns % size == 0)
            group = next(sizes, None) if self.zero_point_bits else (group if columns % group == 0 else None)
            if group is None or rows % 2:
                return rows * columns * plain_bytes
        groups = rows * (-(-columns // group) if group else 1)
        return rows * columns * self.bits // 8 + groups * self.scale_bytes + -(-groups * self.zero_point_bits // 8)

    def _absmax_bytes(self, values: int, slices: int) -> int:
        """bitsandbytes (arXiv:2305.14314): codes, a maximum a block in float32, or (double quantization) in a byte with
        the maxima of these in float32 and a table of 256, and the table of the 16 values.

        >>> weight_precision("nf4").matrix_bytes(4096, 4096)  # 8 MiB, 262,144 maxima, 1,024 of those, two tables
        8655936
        """
        block, nested = self.absmax or (64, 0)
        maxima = -(-values // block)
        held = maxima + 4 * -(-maxima // nested) + 1024 * slices if nested else 4 * maxima
        return -(-values * self.bits // 8) + held + 64 * slices

    def _block_bytes(self, rows: int, columns: int, plain_bytes: int) -> int:
        weights, size = self.block or (1, 1)
        if columns % weights:
            weights, size = _GGUF_BLOCKS[_GGUF_FALLBACK.get(self.name, self.name)]
        if columns % weights:
            return rows * columns * plain_bytes
        return rows * columns // weights * size

    def bytes_per_weight(self) -> float:
        """Bytes a weight on average, for display; a scale per output channel or tile is left out.

        >>> weight_precision("int4-g64").bytes_per_weight()  # 0.5 + 2.5/64
        0.5390625
        >>> weight_precision("mxfp4").bytes_per_weight() * 8, weight_precision("nvfp4").bytes_per_weight() * 8
        (4.25, 4.5)
        """
        if self.block is not None:
            return self.block[1] / self.block[0]
        if self.absmax is not None:
            block, nested = self.absmax
            return self.bits / 8 + ((1 + 4 / nested) if nested else 4) / block
        extra = 0.0 if self.group_size is None else (self.scale_bytes + self.zero_point_bits / 8) / self.group_size
        return self.bits / 8 + extra


def weight_precision(name: str, *, zero_point_bits: int = 4) -> WeightPrecision:
    """The weight format of that name.

    Args:
        name: a dtype (bf16, fp16, fp32 and their long forms), ``fp8`` (a scale per channel), ``fp8-block`` (a scale per
            128 · 128), ``int8``, ``w8a8`` (INT8 with activations of 8 bits; scales of 4 bytes), ``w4a8`` (INT4 in
            groups of 32, with activations of 8 bits), ``int4`` (groups of 128) or ``int4-g32|64|128``, ``mxfp4``
            (groups of 32, scales of 8 bits), ``nvfp4`` (groups of 16, scales of 8 bits), ``nf4`` (bitsandbytes' 4 bits
            with double quantization), a GGUF type (``q4_k``,
            ``q8_0`` …) or mixture (``q4_k_m``, ``q5_k_m``).
        zero_point_bits: of an INT4 group's zero point. 4 as packed checkpoints (AWQ, GPTQ) store it; 16 where the
            kernel wants it next to the scale in bfloat16, as torch's CPU operator does.

    Raises:
        ConfigError: for any other name.
    """
    text = str(name).lower()
    if text in _DTYPES:
        return _DTYPES[text].as_weights
    if text in _NAMED:
        return _NAMED[text]
    if text == "w4a8":
        return WeightPrecision("w4a8", 4, 32, scale_bytes=2, zero_point_bits=zero_point_bits)
    grouped = re.fullmatch(r"int4(?:-g(\d{1,4}))?", text)
    if grouped and int(grouped[1] or 128) in GROUP_SIZES:
        size = int(grouped[1] or 128)
        return WeightPrecision(f"int4-g{size}", 4, size, scale_bytes=2, zero_point_bits=zero_point_bits)
    choices = ", ".join(f"int4-g{size}" for size in GROUP_SIZES)
    raise ConfigError(
        f"{text[:40]!r} is not a weight format.",
        field="weights",
        remedy=f"Choose bf16, fp16, fp32, fp8, fp8-block, int8, w8a8, w4a8, {choices}, mxfp4, nvfp4, nf4, or a GGUF "
        "type such as q4_k_m or q8_0.",
    )


_FP8 = WeightPrecision("fp8", 8, scale_bytes=4)
#: GGUF's block types by name.
GGUF_TYPES = {
    name: WeightPrecision(name, 8 * size // weights, block=(weights, size))
    for name, (weights, size) in _GGUF_BLOCKS.items()
}
_NAMED = {
    **GGUF_TYPES,
    **{
        name: dataclasses.replace(GGUF_TYPES[most], name=name, mixture=(GGUF_TYPES[most], GGUF_TYPES[sensitive]))
        for name, (most, sensitive) in _GGUF_MIXTURES.items()
    },
    "fp8": _FP8,
    "fp8_e4m3": _FP8,
    "fp8-e4m3": _FP8,
    "fp8-block": WeightPrecision("fp8-block", 8, scale_bytes=4, tile=128),
    "int8": WeightPrecision("int8", 8, scale_bytes=2),
    "w8a8": WeightPrecision("w8a8", 8, scale_bytes=4),
    "mxfp4": WeightPrecision("mxfp4", 4, 32, scale_bytes=1, experts_only=True),
    "nvfp4": WeightPrecision("nvfp4", 4, 16, scale_bytes=1),
    "nf4": WeightPrecision("nf4", 4, absmax=(64, 256)),
}
#: Keeps the model's dtype, in a checkpoint where other matrices do not.
UNQUANTIZED = WeightPrecision("unquantized", 16)


@dataclasses.dataclass(frozen=True, slots=True)
class KVPrecision:
    """How keys and values are stored.

    Attributes:
        name: canonical name.
        bits: of one value.
        head_overhead_bytes: scale and zero point of one head of one token, for keys and for values each.
    """

    name: str
    bits: int
    head_overhead_bytes: int = 0

    def bytes_per_head(self, head_dim: int) -> Fraction:
        """Bytes of the keys (or the values) of one head of one token.

        >>> kv_precision("bf16").bytes_per_head(128)
        Fraction(256, 1)
        >>> kv_precision("int4").bytes_per_head(128)  # 64 and a scale and zero point of 2 bytes each
        Fraction(68, 1)
        """
        return Fraction(head_dim * self.bits, 8) + self.head_overhead_bytes


_FP8_KV = KVPrecision("fp8", 8)
_NAMED_KV = {
    "fp8": _FP8_KV,
    "fp8_e4m3": _FP8_KV,
    "fp8_e5m2": _FP8_KV,
    "int8": KVPrecision("int8", 8, head_overhead_bytes=4),
    "int4": KVPrecision("int4", 4, head_overhead_bytes=4),
    "fp8_per_token_head": KVPrecision("fp8_per_token_head", 8, head_overhead_bytes=2),
    "int8_per_token_head": KVPrecision("int8_per_token_head", 8, head_overhead_bytes=2),
}


def kv_precision(name: str, model_dtype: ComputeDtype = BFLOAT16) -> KVPrecision:
    """The KV cache format of that name.

    Args:
        name: a compute dtype, ``auto`` or ``model`` (the model's dtype), ``fp8`` (scales per layer, which cost
            nothing), ``int8`` (a 4-byte scale per token and head), ``int4`` (scale and zero point of 2 bytes each per
            token and head), ``fp8_per_token_head`` or ``int8_per_token_head`` (this engine's: a 2-byte scale per token
            and head).
        model_dtype: what ``auto`` stands for.

    Raises:
        ConfigError: for any other name.
    """
    text = str(name).lower()
    if text in ("auto", "model"):
        return model_dtype.as_kv
    if text in _DTYPES:
        return _DTYPES[text].as_kv
    if text in _NAMED_KV:
        return _NAMED_KV[text]
    raise ConfigError(
        f"{text[:40]!r} is not a KV cache format.",
        field="kv_dtype",
        remedy="Choose auto, bf16, fp16, fp32, fp8, int8 or int4.",
    )

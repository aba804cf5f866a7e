"""All layers of a dense decoder in one call of the CPU kernels. See ``native/decoder.h`` for what it computes."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Sequence

import torch

from kernels.cpu.attention import CACHE_TYPES
from kernels.cpu.build import native
from kernels.cpu.linear import PanelWeight
from kernels.kv_write import KVScales

ACTIVATIONS = {"silu": 0, "swish": 0, "gelu": 1, "gelu_pytorch_tanh": 2, "gelu_new": 2, "relu": 3}
"""By the name that a ``config.json`` gives them."""


@dataclasses.dataclass(frozen=True, slots=True)
class LayerWeights:
    """What one layer computes with.

    Attributes:
        input_norm, attention_output_norm, mlp_norm, mlp_output_norm: float32 [hidden_size]; None where the layer has
            no such norm.
        query_norm, key_norm: float32 [head_dim] or None.
        qkv, output, gate_up, down: weights, each with its float32 bias [N] or None.
        window: positions that a query sees, itself included; None for all.
        scale: factor on the attention scores.
        rotary: index of the layer's rotary embedding.
    """

    input_norm: torch.Tensor | None
    attention_output_norm: torch.Tensor | None
    mlp_norm: torch.Tensor | None
    mlp_output_norm: torch.Tensor | None
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    qkv: tuple[PanelWeight, torch.Tensor | None]
    output: tuple[PanelWeight, torch.Tensor | None]
    gate_up: tuple[PanelWeight, torch.Tensor | None]
    down: tuple[PanelWeight, torch.Tensor | None]
    window: int | None
    scale: float
    rotary: int


@dataclasses.dataclass(frozen=True, slots=True)
class RotaryAngles:
    """Attributes:
    frequencies: float32 [pairs], radians a position; a head's leading 2 · pairs dimensions turn.
    factor: on cos and sin.
    """

    frequencies: torch.Tensor
    factor: float


@dataclasses.dataclass(frozen=True, slots=True)
class DecoderShape:
    """Attributes:
    hidden_size, num_heads, num_kv_heads, head_dim: of the model.
    activation: a name in :data:`ACTIVATIONS`.
    eps: of every norm.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    activation: str
    eps: float


class NativeDecoder:
    """The layers and the final norm of a decoder, over the paged cache of one engine.

    Args:
        shape: of the model; hidden_size and head_dim are multiples of the vector width.
        layers: in order.
        rotaries: the rotary embeddings that layers refer to.
        final_norm: float32 [hidden_size].
        keys, values: of each layer, [num_blocks, block_size, num_kv_heads, head_dim] in a format of
            :mod:`kernels.kv_formats` (of the unquantized ones float32 or bfloat16).
        scales: of each layer; None where the cache is not quantized.
    """

    def __init__(
        self,
        shape: DecoderShape,
        layers: Sequence[LayerWeights],
        rotaries: Sequence[RotaryAngles],
        final_norm: torch.Tensor,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        scales: Sequence[KVScales | None],
    ) -> None:
        # what the structures point into
        self._kept = (tuple(layers), tuple(rotaries), final_norm, tuple(keys), tuple(values), tuple(scales))
        self._layers = (_Layer * len(layers))(*map(_layer, layers, keys, values, scales))
        self._rotaries = (_Rotary * len(rotaries))(*map(_rotary, rotaries))
        self._model = _Model(
            layers=ctypes.addressof(self._layers),
            rotaries=ctypes.addressof(self._rotaries),
            final_norm=final_norm.data_ptr(),
            num_layers=len(layers),
            num_rotaries=len(rotaries),
            hidden=shape.hidden_size,
            heads=shape.num_heads,
            kv_heads=shape.num_kv_heads,
            dim=shape.head_dim,
            block=keys[0].shape[1],
            activation=ACTIVATIONS[shape.activation],
            cache_type=CACHE_TYPES[keys[0].dtype],
            eps=shape.eps,
        )

    def step(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        slot_mapping: torch.Tensor,
        block_tables: torch.Tensor,
        query_start: torch.Tensor,
        context_lens: torch.Tensor,
    ) -> None:
        """Run a ragged batch through all layers; writes its keys and values to the cache.

        Args:
            hidden: float32 [T, hidden_size], contiguous: the embeddings; overwritten by the normalized result.
            positions: int64 [T], each token's position in its own sequence.
            slot_mapping: int64 [T], block · block_size + offset; a negative slot is not written.
            block_tables: int32 [B, max_blocks].
            query_start: int32 [B + 1]; sequence i owns rows query_start[i] : query_start[i + 1].
            context_lens: int32 [B], positions in the cache, this step's included.
        """
        if not hidden.shape[0]:
            return
        tables, starts, lens = (table.contiguous() for table in (block_tables, query_start, context_lens))
        step = _Step(
            x=hidden.data_ptr(),
            positions=positions.data_ptr(),
            slots=slot_mapping.data_ptr(),
            tables=tables.data_ptr(),
            query_start=starts.data_ptr(),
            context_lens=lens.data_ptr(),
            tokens=hidden.shape[0],
            batch=tables.shape[0],
            table_width=tables.shape[1],
        )
        native().functions.headroom_decode_step(ctypes.byref(self._model), ctypes.byref(step), torch.get_num_threads())


_NORMS = ("input_norm", "attention_output_norm", "mlp_norm", "mlp_output_norm", "query_norm", "key_norm")


# The structures of native/decoder.h, field by field.
class _Affine(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("panels", "parameters", "scales", "bias")),
        *((name, ctypes.c_int64) for name in ("outputs", "inputs", "group")),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in _NORMS),
        *((name, _Affine) for name in ("qkv", "output", "gate_up", "down")),
        *((name, ctypes.c_void_p) for name in ("keys", "values", "key_scales", "value_scales")),
        *((name, ctypes.c_int64) for name in ("rotary", "window")),
        ("scale", ctypes.c_double),
    ]


class _Rotary(ctypes.Structure):
    _fields_ = [("frequencies", ctypes.c_void_p), ("pairs", ctypes.c_int64), ("factor", ctypes.c_double)]


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("layers", "rotaries", "final_norm")),
        *(
            (name, ctypes.c_int64)
            for name in ("num_layers", "num_rotaries", "hidden", "heads", "kv_heads", "dim", "block")
        ),
        *((name, ctypes.c_int64) for name in ("activation", "cache_type")),
        ("eps", ctypes.c_double),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "positions", "slots", "tables", "query_start", "context_lens")),
        *((name, ctypes.c_int64) for name in ("tokens", "batch", "table_width")),
    ]


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _rotary(rotary: RotaryAngles) -> _Rotary:
    return _Rotary(rotary.frequencies.data_ptr(), rotary.frequencies.numel(), rotary.factor)


def _affine(weight: PanelWeight, bias: torch.Tensor | None) -> _Affine:
    return _Affine(
        type=weight.type,
        panels=weight.panels.data_ptr(),
        parameters=_pointer(weight.grids),
        scales=_pointer(weight.scales),
        bias=_pointer(bias),
        outputs=weight.outputs,
        inputs=weight.inputs,
        group=weight.group or 1,
    )


def _layer(layer: LayerWeights, keys: torch.Tensor, values: torch.Tensor, scales: KVScales | None) -> _Layer:
    key_scales, value_scales = scales or (None, None)
    return _Layer(
        **{name: _pointer(getattr(layer, name)) for name in _NORMS},
        qkv=_affine(*layer.qkv),
        output=_affine(*layer.output),
        gate_up=_affine(*layer.gate_up),
        down=_affine(*layer.down),
        keys=keys.data_ptr(),
        values=values.data_ptr(),
        key_scales=_pointer(key_scales),
        value_scales=_pointer(value_scales),
        rotary=layer.rotary,
        window=layer.window or 0,
        scale=layer.scale,
    )

"""Fused execution: a decoder's layers through our Triton kernels, every run of small operations one launch.

What a layer launches, T tokens at once:

    eager                                       fused
    residual + out, norm            (2)         rms_norm with residual               (1)
    qkv product                     (1)         qkv product                          (1)
    norms of heads, rotary, write   (5 to 9)    rotary_kv_write                      (1)
    attention                       (1)         attention                            (1)
    output product                  (1)         output product                       (1)
    residual + out, norm            (2)         rms_norm with residual               (1)
    gate and up product             (1)         gate and up product                  (1)
    activation, product             (2)         gated_mul                            (1)
    down product                    (1)         down product                         (1)
    experts              (3 for each one)       two products for all, sorted on the device

Where a product takes activations of 8 bits, the norm or the gated activation before it quantizes them: only the output
product's are a launch of their own.

It computes what eager execution computes and rounds where that rounds, so the two differ by the order of sums alone.
Everything is launched from shapes: nothing is read back, so a CUDA graph can hold it.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch

from engine.attention.base import AttentionBackend
from engine.execution.base import Progress, Step
from engine.execution.direct import DirectMode
from engine.execution.environment import NEEDS_OWN_DECODER, ExecutionEnvironment, Kernels, Unsupported
from engine.execution.warm_up import KernelWarmUp
from engine.layers.linear import Linear
from engine.layers.mixture import MixtureMLP
from engine.layers.mlp import GatedMLP
from engine.layers.norm import RMSNorm
from engine.models.decoder import Decoder, DecoderLayer
from engine.quantization.triton import TritonScaledFormat
from kernels.dispatch import Op, choose
from kernels.expert_linear import expert_linear_triton, sort_by_expert
from kernels.gated_mul import ACTIVATIONS, gated_mul_triton
from kernels.paged_attention import paged_attention_triton
from kernels.quantize_rows import gated_mul_quantize_triton, rms_norm_quantize_triton
from kernels.rms_norm import rms_norm_triton
from kernels.rotary_kv_write import rotary_kv_write_triton

ATTENTION = "triton"
REMEDY = "Choose auto or eager, or set attention to triton in the same change."
OPERATIONS: tuple[Op, ...] = ("rms_norm", "rotary_kv_write", "gated_mul")
Angles = tuple[torch.Tensor, torch.Tensor]


class EightBitRows(NamedTuple):
    """Activations quantized already: ``payload`` [T, K], ``scales`` float32 [T], and the type they came from."""

    payload: torch.Tensor
    scales: torch.Tensor
    dtype: torch.dtype


Rows = torch.Tensor | EightBitRows
"""[T, K] as a linear layer takes it."""


class FusedMode(DirectMode):
    """The layers of one model over the cache of its engine; weights are read where they lie at each step.

    Attributes:
        warm_up: what Triton is to compile before a request needs it; None where it compiles nothing.
    """

    name = "fused"

    def __init__(self, environment: ExecutionEnvironment) -> None:
        super().__init__(environment)
        self.warm_up: KernelWarmUp | None = None

    @classmethod
    def unsupported_reason(cls, environment: ExecutionEnvironment, kernels: Kernels) -> Unsupported | None:
        """As :meth:`ExecutionMode.unsupported_reason`."""
        decoder = environment.own_decoder
        if decoder is None:
            return NEEDS_OWN_DECODER
        reason = _unsupported_reason(decoder, environment.device, kernels.attention)
        return None if reason is None else Unsupported(reason, REMEDY)

    def make(self, attention: AttentionBackend) -> None:
        """As :meth:`DirectMode.make`."""
        if self.environment.compiles_at_launch:
            self.warm_up = KernelWarmUp(self.environment, attention, self)

    def poll(self) -> None:
        """As :meth:`ExecutionMode.poll`."""
        if self.warm_up is not None:
            self.warm_up.run_next()

    @property
    def has_work(self) -> bool:
        """As :attr:`ExecutionMode.has_work`."""
        return self.warm_up is not None and bool(self.warm_up.pending)

    def progress(self) -> Progress:
        """As :meth:`ExecutionMode.progress`."""
        return super().progress() if self.warm_up is None else self.warm_up.progress()

    def forward(self, step: Step) -> torch.Tensor:
        """As :meth:`Execution.forward`."""
        decoder = self.environment.own_decoder
        assert decoder is not None, "checked before"
        angles = [rotary(step.positions) for rotary in decoder.rotaries]
        layers = [cast("DecoderLayer", layer) for layer in decoder.layers]
        total = decoder.embed(step.token_ids)
        x, total = add_norm(None, total, layers[0].input_norm, layers[0].qkv_proj)
        after: list[tuple[torch.nn.Module, Linear | None]]
        after = [*((layer.input_norm, layer.qkv_proj) for layer in layers[1:]), (decoder.norm, None)]
        for layer, rotary, (next_norm, reader) in zip(layers, decoder.layer_rotaries, after, strict=True):
            attended = self._attend(layer, x, angles[rotary], step)
            attended = norm(attended, layer.attention_output_norm)
            x, total = add_norm(attended, total, layer.mlp_norm, getattr(layer.mlp, "gate_up_proj", None))
            x, total = add_norm(norm(_mlp(layer, x), layer.mlp_output_norm), total, next_norm, reader)
        assert isinstance(x, torch.Tensor)
        return x

    def _attend(self, layer: DecoderLayer, x: Rows, angles: Angles, step: Step) -> torch.Tensor:
        """[T, hidden_size] → the same: products, norms of heads, rotary, cache write and attention of one layer."""
        batch, cache, context = step.batch, self.environment.cache, self.environment.context
        heads = product(layer.qkv_proj, x)
        heads = heads.view(heads.shape[0], -1, layer.head_dim)
        keys, values, scales = cache.keys[layer.index], cache.values[layer.index], cache.scales(layer.index)
        query = rotary_kv_write_triton(
            heads,
            *angles,
            keys,
            values,
            batch.slot_mapping,
            num_heads=layer.num_heads,
            query_norm=_weight(layer.query_norm),
            key_norm=_weight(layer.key_norm),
            eps=layer.query_norm.eps if isinstance(layer.query_norm, RMSNorm) else 0.0,
            scales=scales,
        )
        attended, _ = paged_attention_triton(
            query,
            keys,
            values,
            batch.block_tables,
            batch.query_start,
            batch.context_lens_tensor,
            context.scale(layer.index),
            context.window(layer.index),
            scales=scales,
        )
        return product(layer.o_proj, attended.view(heads.shape[0], -1))


def _mlp(layer: DecoderLayer, x: Rows) -> torch.Tensor:
    mlp = layer.mlp
    if isinstance(mlp, GatedMLP):
        gate_up, kind = product(mlp.gate_up_proj, x), activation_kind(mlp.down_proj)
        if kind is None:
            return product(mlp.down_proj, gated_mul_triton(gate_up, mlp.activation_name))
        rows = gated_mul_quantize_triton(gate_up, mlp.activation_name, kind)
        return product(mlp.down_proj, EightBitRows(*rows, gate_up.dtype))
    assert isinstance(mlp, MixtureMLP)
    assert isinstance(x, torch.Tensor)
    stacked = mlp.stacked()
    if stacked is None:  # quantized experts: one product for each, counted on the host
        output: torch.Tensor = mlp(x)
        return output
    gate_up, down = stacked
    shares, chosen = mlp.route(x)
    routing = sort_by_expert(chosen, gate_up.shape[0])
    activation = cast("GatedMLP", mlp.experts[0]).activation_name
    hidden = gated_mul_triton(expert_linear_triton(x, gate_up, routing, of_tokens=True), activation)
    pairs = expert_linear_triton(hidden, down, routing, of_tokens=False, pair_weights=shares)
    return pairs.view(*chosen.shape, -1).sum(dim=1)  # in the order of a token's choices, whatever else is in the batch


def activation_kind(linear: Linear) -> str | None:
    """The 8-bit type that a layer takes its activations in; None if it takes them as they are."""
    return linear.format.kind if isinstance(linear.format, TritonScaledFormat) else None


def product(linear: Linear, x: Rows) -> torch.Tensor:
    """[T, in_features] → [T, out_features]."""
    if isinstance(x, torch.Tensor):
        return cast("torch.Tensor", linear(x))
    return cast("TritonScaledFormat", linear.format).product(*x, linear.bias)


def add_norm(
    x: torch.Tensor | None, total: torch.Tensor, module: torch.nn.Module, reader: Linear | None = None
) -> tuple[Rows, torch.Tensor]:
    """(norm(x + total), x + total), [T, hidden_size] each; without x the norm of ``total`` alone.

    The first is as ``reader`` takes it, the layer that multiplies it.
    """
    if not isinstance(module, RMSNorm):  # a family without a norm here
        total = total if x is None else x + total
        return total, total
    kind = None if reader is None else activation_kind(reader)
    if kind is not None:
        hidden, residual = (total, None) if x is None else (x, total)
        payload, scales, summed = rms_norm_quantize_triton(hidden, module.weight, module.eps, kind, residual)
        return EightBitRows(payload, scales, total.dtype), summed
    if x is None:
        return rms_norm_triton(total, module.weight, module.eps)[0], total
    return rms_norm_triton(x, module.weight, module.eps, residual=total)


def norm(x: torch.Tensor, module: torch.nn.Module) -> torch.Tensor:
    """norm(x), or x where the family has no norm here."""
    return rms_norm_triton(x, module.weight, module.eps)[0] if isinstance(module, RMSNorm) else x


def _weight(module: torch.nn.Module) -> torch.Tensor | None:
    return module.weight if isinstance(module, RMSNorm) else None


def _unsupported_reason(decoder: Decoder, device: torch.device, attention: str) -> str | None:
    if attention != ATTENTION:
        return f"it needs attention={ATTENTION}, not {attention}."
    if decoder.config.activation not in ACTIVATIONS:
        return f"it has no {decoder.config.activation}."
    for operation in OPERATIONS:
        choice = choose(operation, "triton", device=device, dtype=decoder.dtype, head_dim=decoder.head_dim)
        if choice.path is None:
            return f"{operation}: {choice.reason}"
    return None

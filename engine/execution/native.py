"""Native execution: all layers of a dense decoder in one call of the CPU kernels, for steps of any size.

What it computes is what eager execution computes with the native kernels; what it saves is launching some four hundred
small operations a step, which on a small model take longer than reading its weights.
"""

from __future__ import annotations

from typing import cast

import torch

from engine.attention.base import AttentionBackend
from engine.attention.operator import AttendContext
from engine.execution.base import Step
from engine.execution.direct import DirectMode
from engine.execution.environment import NEEDS_OWN_DECODER, ExecutionEnvironment, Kernels, Unsupported
from engine.layers.linear import Linear
from engine.layers.mlp import GatedMLP
from engine.layers.norm import RMSNorm
from engine.models.decoder import Decoder, DecoderLayer
from engine.quantization.native import NativeFormat
from kernels.cpu.build import native, why_not
from kernels.cpu.decoder import ACTIVATIONS, DecoderShape, LayerWeights, NativeDecoder, RotaryAngles
from kernels.cpu.linear import PanelWeight

REMEDY = "Choose auto or eager, or set attention and linear to native in the same change."


class NativeMode(DirectMode):
    """The layers of one model over the cache of one engine, with the weights as they are now."""

    name = "native"
    _decoder: Decoder
    _native: NativeDecoder

    @classmethod
    def unsupported_reason(cls, environment: ExecutionEnvironment, kernels: Kernels) -> Unsupported | None:
        """As :meth:`ExecutionMode.unsupported_reason`."""
        decoder = environment.own_decoder
        if decoder is None:
            return NEEDS_OWN_DECODER
        reason = _unsupported_reason(decoder, environment.device, kernels)
        return None if reason is None else Unsupported(reason, REMEDY)

    def make(self, attention: AttentionBackend) -> None:
        """As :meth:`DirectMode.make`."""
        decoder, context, cache = self.environment.own_decoder, self.environment.context, self.environment.cache
        assert decoder is not None, "checked before"
        self._decoder = decoder
        config = decoder.config
        shape = DecoderShape(
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            config.activation,
            config.rms_norm_eps,
        )
        layers = [
            _layer_weights(cast("DecoderLayer", layer), context, rotary)
            for layer, rotary in zip(decoder.layers, decoder.layer_rotaries, strict=True)
        ]
        final_norm = _norm(decoder.norm)
        assert final_norm is not None
        rotaries = [
            RotaryAngles(rotary.inv_freq.float().contiguous(), rotary.attention_factor) for rotary in decoder.rotaries
        ]
        scales = [cache.scales(index) for index in range(len(layers))]
        self._native = NativeDecoder(shape, layers, rotaries, final_norm, cache.keys, cache.values, scales)

    def forward(self, step: Step) -> torch.Tensor:
        """As :meth:`Execution.forward`; between the layers all is kept in float32."""
        batch = step.batch
        hidden = self._decoder.embed(step.token_ids).float()  # of its own: embed never gives a view of the table
        self._native.step(
            hidden, step.positions, batch.slot_mapping, batch.block_tables, batch.query_start, batch.context_lens_tensor
        )
        return hidden.to(self._decoder.dtype)


def _unsupported_reason(decoder: Decoder, device: torch.device, kernels: Kernels) -> str | None:
    if device.type != "cpu":
        return f"it runs on the CPU, and the model is on {device}."
    if decoder.config.mixture is not None:
        return "it knows no mixture of experts."
    if decoder.config.activation not in ACTIVATIONS:
        return f"it has no {decoder.config.activation}."
    if reason := why_not():
        return reason
    if kernels.attention != "native":
        return f"it needs attention=native, not {kernels.attention}."
    if kernels.linear != "native":
        return f"it needs linear=native, not {kernels.linear}."
    return _unpacked(decoder)


def _unpacked(decoder: Decoder) -> str | None:
    """Weights that stay out of panels because their outputs fill no whole ones."""
    panel = native().panel
    for name, module, _ in decoder.linears():
        outputs = module.format.shape[0] // (2 if name.endswith("gate_up_proj") else 1)
        if outputs % panel:
            return f"{name} has {outputs} outputs, which are no multiple of {panel}."
    return None


def _layer_weights(layer: DecoderLayer, context: AttendContext, rotary: int) -> LayerWeights:
    mlp = layer.mlp
    assert isinstance(mlp, GatedMLP)
    return LayerWeights(
        input_norm=_norm(layer.input_norm),
        attention_output_norm=_norm(layer.attention_output_norm),
        mlp_norm=_norm(layer.mlp_norm),
        mlp_output_norm=_norm(layer.mlp_output_norm),
        query_norm=_norm(layer.query_norm),
        key_norm=_norm(layer.key_norm),
        qkv=_packed(layer.qkv_proj),
        output=_packed(layer.o_proj),
        gate_up=_packed(mlp.gate_up_proj),
        down=_packed(mlp.down_proj),
        window=context.window(layer.index),
        scale=context.scale(layer.index),
        rotary=rotary,
    )


def _norm(module: torch.nn.Module) -> torch.Tensor | None:
    return module.weight.detach().float().contiguous() if isinstance(module, RMSNorm) else None


def _packed(linear: Linear) -> tuple[PanelWeight, torch.Tensor | None]:
    assert isinstance(linear.format, NativeFormat)
    return linear.format.packed, None if linear.bias is None else linear.bias.detach().float().contiguous()

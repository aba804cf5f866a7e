"""What the planner must know of a model: its shape, read from a Hugging Face ``config.json`` and checked."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any

from engine.capacity.formats import (
    ComputeDtype,
    KVPrecision,
    WeightPrecision,
    compute_dtype,
    kv_precision,
    weight_precision,
)
from engine.capacity.model.checkpoint_formats import checkpoint_quantization
from engine.capacity.model.encoders import encoder_parameters
from engine.capacity.model.families import FAMILIES, FamilyFields, family_of
from engine.capacity.model.fields import REMEDY, flag, positive
from engine.capacity.model.layers import Layer, MixtureOfExperts
from engine.capacity.model.mixers import Attention, LatentAttention
from engine.capacity.model.positions import longest_position
from engine.capacity.model.readers import read_layers
from engine.capacity.model.recent_readers import read_extra
from engine.capacity.model.stated import Stated, unread_warning
from engine.capacity.model.tensors import Tensor
from engine.capacity.text import shown
from engine.errors import ConfigError


@dataclasses.dataclass(frozen=True, slots=True)
class ModelSpec:
    """The shape of a decoder-only language model. Sizes are numbers of elements, lengths are tokens.

    >>> spec = ModelSpec.from_hf_config({
    ...     "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "num_hidden_layers": 32,
    ...     "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
    ...     "max_position_embeddings": 131072})
    >>> spec.head_dim, spec.group_queries  # Llama 3 herd, table 3: 32 heads share 8 key/value heads
    (128, 4)

    Attributes:
        name: for display.
        architecture: e.g. ``"LlamaForCausalLM"``; model_type: e.g. ``"llama"``.
        hidden_size, vocab_size: dimensions.
        kinds: the different layers; pattern: of each layer, the index of its kind.
        tie_word_embeddings: the head is the embedding, one copy.
        head_bias: the head has a bias; norm_bias: the norms have one.
        max_position: the longest context, RoPE scaling included.
        rotary_share: share of a head that position turns.
        extra: tensors besides embedding, layers and head, with the embedding.
        encoder: parameters of an image encoder and its projector, which no count of parameters includes.
        torch_dtype: number format of the checkpoint: "bfloat16", "float16" or "float32".
        quantization: weight format that most matrices of the checkpoint are quantized in, None if they are not;
            exceptions stand with the layers. head_format: that of a quantized head.
        kv_dtype: KV cache format that the checkpoint asks for, None for none.
        notes: what the counts leave out, or take for granted, for display.
    """

    name: str
    architecture: str
    model_type: str
    hidden_size: int
    vocab_size: int
    kinds: tuple[Layer, ...]
    pattern: tuple[int, ...]
    tie_word_embeddings: bool
    head_bias: bool
    norm_bias: bool
    max_position: int
    torch_dtype: str
    quantization: WeightPrecision | None = None
    head_format: WeightPrecision | None = None
    kv_dtype: str | None = None
    notes: tuple[str, ...] = ()
    rotary_share: float = 1.0
    extra: tuple[Tensor, ...] = ()
    encoder: int = 0

    @classmethod
    def from_hf_config(
        cls, config: Mapping[str, Any], name: str | None = None, quantization: Mapping[str, Any] | None = None
    ) -> ModelSpec:
        """The spec of a parsed ``config.json``.

        Args:
            config: the parsed file. A field that is not read, and is none of those that are known to change no sizes,
                is named in the notes.
            name: for display; by default ``_name_or_path`` or the architecture.
            quantization: the parsed ``hf_quant_config.json`` next to it, if there is one.

        Raises:
            ConfigError: naming the field that is missing, malformed or contradicts another, or the architecture that
                is not supported.
        """
        if not isinstance(config, Mapping):
            raise ConfigError("is not a JSON object.", field="config.json", remedy=REMEDY)
        if quantization is not None and not isinstance(quantization, Mapping):
            raise ConfigError("is not a JSON object.", field="hf_quant_config.json", remedy=REMEDY)
        stated = Stated(config)
        outer = family_of(stated)
        family, inner, notes = _language_model(stated, outer)
        quantized, unread_of_it = checkpoint_quantization(stated, quantization)
        kinds, pattern = _distinct(quantized.apply(read_layers(inner, family)))
        encoder, unread_of_encoder = encoder_parameters(stated, outer.model_type, positive(inner, "hidden_size"))
        notes += _encoder_notes(stated, encoder) if outer.text else []
        longest, rotary_share, unread = longest_position(inner, family.max_position)
        own_name = name or config.get("_name_or_path")
        spec = cls(
            name=own_name if isinstance(own_name, str) and own_name else outer.architecture,
            architecture=outer.architecture,
            model_type=outer.model_type,
            hidden_size=positive(inner, "hidden_size"),
            vocab_size=positive(inner, "vocab_size"),
            kinds=kinds,
            pattern=pattern,
            tie_word_embeddings=flag(stated, "tie_word_embeddings", flag(inner, "tie_word_embeddings", family.tied)),
            head_bias=flag(inner, "lm_head_bias", False) if family.head_bias == "config" else bool(family.head_bias),
            norm_bias=family.norm_bias,
            max_position=longest,
            torch_dtype=_dtype(inner if _states_dtype(inner) else stated),
            quantization=quantized.format,
            head_format=quantized.head(),
            kv_dtype=quantized.kv_dtype,
            rotary_share=rotary_share,
            extra=read_extra(inner, family),
            encoder=encoder or 0,
        )
        stated.mark(*(_PROJECTOR if outer.text else ()))
        for fields in (stated, inner):
            fields.mark("torch_dtype", "dtype", *_ELSEWHERE, *family.unused, *outer.unused)
        remarks = [*quantized.remarks, *_left_out(inner)]
        left = [*dict.fromkeys((*stated.unread(), *inner.unread(), *unread, *unread_of_it, *unread_of_encoder))]
        remarks += unread_warning(left, family.model_type)
        return dataclasses.replace(spec, notes=(*notes, *remarks))

    @property
    def checkpoint_format(self) -> str | None:
        """Name of the weight format that the checkpoint is quantized in, None if it is not."""
        return None if self.quantization is None else self.quantization.name

    @property
    def checkpoint_dtype(self) -> ComputeDtype:
        """Number format of what the checkpoint does not quantize."""
        return compute_dtype(self.torch_dtype)

    def kv_precision(self, name: str = "auto") -> KVPrecision:
        """The KV cache format of that name; ``"auto"``: that of the checkpoint."""
        return kv_precision(name, self.checkpoint_dtype)

    def weight_precision(self, name: str, *, zero_point_bits: int = 4) -> WeightPrecision:
        """The format of that name: the checkpoint's own if it is called so, else as
        :func:`engine.capacity.formats.weight_precision`."""
        if self.quantization is not None and name == self.quantization.name:
            return self.quantization
        return weight_precision(name, zero_point_bits=zero_point_bits)

    @property
    def num_layers(self) -> int:
        """How many layers there are."""
        return len(self.pattern)

    @property
    def attention(self) -> Attention | LatentAttention | None:
        """The first layer's attention, None in a model without any."""
        mixers = (self.kinds[index].mixer for index in self.pattern)
        return next((mixer for mixer in mixers if isinstance(mixer, Attention | LatentAttention)), None)

    @property
    def num_heads(self) -> int:
        """Attention heads, 0 in a model without attention."""
        return 0 if self.attention is None else self.attention.num_heads

    @property
    def num_kv_heads(self) -> int:
        """Key/value heads that are cached: 1 with latent attention, 0 in a model without attention."""
        if isinstance(self.attention, Attention):
            return self.attention.num_kv_heads
        return 0 if self.attention is None else 1

    @property
    def head_dim(self) -> int:
        """Elements of a head (of the cached latent with latent attention); need not be hidden_size / num_heads."""
        if isinstance(self.attention, Attention):
            return self.attention.head_dim
        return 0 if self.attention is None else self.attention.cached_heads(1)[1]

    @property
    def rotary_dim(self) -> int:
        """Elements of a head that position turns, for the table of angles."""
        if isinstance(self.attention, LatentAttention):
            return self.attention.rope_dim
        return int(self.head_dim * self.rotary_share)

    @property
    def intermediate_size(self) -> int:
        """Width of the widest MLP that a token passes through: of a mixture, all its active experts together."""
        return max(kind.mlp.active_width for kind in self.kinds)

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        """Per layer, how many positions a query sees, itself included; None for all."""
        return tuple(self.kinds[index].window for index in self.pattern)

    @property
    def sliding_window(self) -> int | None:
        """The window of the layers that slide, or None if no layer does. Tokens."""
        return next((window for window in self.layer_windows if window is not None), None)

    @property
    def num_sliding_layers(self) -> int:
        """How many layers attend to a window only."""
        return sum(window is not None for window in self.layer_windows)

    @property
    def num_attention_layers(self) -> int:
        """How many layers keep keys and values."""
        return sum(self.kinds[index].attends for index in self.pattern)

    @property
    def group_queries(self) -> int:
        """How many query heads share one key/value head; 1 is multi-head attention."""
        return self.num_heads // self.num_kv_heads if self.num_kv_heads else 1

    @property
    def is_mixture(self) -> bool:
        """True if some layer has routed experts."""
        return any(isinstance(kind.mlp, MixtureOfExperts) for kind in self.kinds)

    @property
    def is_recurrent(self) -> bool:
        """True if some layer keeps a state of constant size."""
        return any(kind.mixer.state_elements(1)[0] for kind in self.kinds)

    @property
    def is_latent(self) -> bool:
        """True if keys and values are cached as one latent."""
        return isinstance(self.attention, LatentAttention)

    @property
    def attention_bias(self) -> bool:
        """Query, key and value projections have biases."""
        return isinstance(self.attention, Attention) and self.attention.qkv_bias

    @property
    def attention_output_bias(self) -> bool:
        """The attention's output projection has one."""
        return isinstance(self.attention, Attention) and self.attention.output_bias

    @property
    def qk_norm(self) -> bool:
        """Queries and keys are normalized."""
        return isinstance(self.attention, Attention) and bool(self.attention.qk_norm)

    def layer_counts(self, start: int, stop: int) -> list[tuple[Layer, int]]:
        """(kind, how many of it) of the layers ``start … stop - 1``."""
        counts = Counter(self.pattern[start:stop])
        return [(self.kinds[index], counts[index]) for index in sorted(counts)]


#: Of the projector from an encoder to the language model, which is left out with it.
_PROJECTOR = (
    "projector_hidden_act",
    "projector_hidden_size",
    "projection_hidden_size",
    "projection_layer_norm_eps",
    "multimodal_projector_bias",
    "spatial_merge_size",
    "vision_feature_layer",
    "vision_feature_select_strategy",
)
#: Objects that are read on their own.
_ELSEWHERE = ("quantization_config", "compression_config", "text_config", "vision_config", "audio_config")


def _language_model(config: Stated, outer: FamilyFields) -> tuple[FamilyFields, Stated, list[str]]:
    """The family and the fields of the language model, which a multimodal model states under ``text_config``."""
    if not outer.text:
        return outer, config.over(dict(outer.defaults)), []
    inner = config.get("text_config", config.get("llm_config"))
    if inner is None and config.get("hidden_size") is not None:  # older files have its fields next to the encoder's
        inner = {name: config[name] for name in config if name not in ("model_type", "architectures", *_ELSEWHERE)}
    if not isinstance(inner, Mapping):
        raise ConfigError("is missing or not an object.", field="text_config", remedy=REMEDY)
    wanted = inner.get("model_type") or dict(outer.defaults)["text_model_type"]
    known = [family for family in FAMILIES if wanted in (family.model_type, *family.aliases) and not family.text]
    if not known:
        raise ConfigError(
            f"the planner does not know the language model {shown(wanted)} inside {outer.architecture} yet.",
            field="text_config",
            remedy=REMEDY,
        )
    return known[0], Stated(inner, dict(known[0].defaults), "text_config."), []


def _encoder_notes(config: Stated, encoder: int | None) -> list[str]:
    if encoder is not None:
        return [
            f"An image encoder and its projector of {encoder:,} parameters are among the weights, but not in the "
            "number of parameters."
        ]
    sound = " and sound" if config.peek("audio_config") else ""
    return [f"Only the language model is counted: the image{sound} encoder and its projector are left out."]


def _left_out(config: Mapping[str, Any]) -> list[str]:
    extra = config.get("num_nextn_predict_layers")
    if isinstance(extra, int) and not isinstance(extra, bool) and extra > 0:
        return ["Layers for multi-token prediction are in the checkpoint but are not counted: engines skip them."]
    return []


def _distinct(layers: tuple[Layer, ...]) -> tuple[tuple[Layer, ...], tuple[int, ...]]:
    kinds: dict[Layer, int] = {}
    pattern = tuple(kinds.setdefault(layer, len(kinds)) for layer in layers)
    return tuple(kinds), pattern


def _states_dtype(config: Mapping[str, Any]) -> bool:
    return config.get("torch_dtype", config.get("dtype")) is not None


def _dtype(config: Mapping[str, Any]) -> str:
    stated = config.get("torch_dtype", config.get("dtype"))
    if stated is None:
        return "bfloat16"
    text = stated.removeprefix("torch.") if isinstance(stated, str) else ""
    if text not in ("bfloat16", "float16", "float32"):
        raise ConfigError(
            f"{shown(stated)} is not a number format of weights.",
            field="torch_dtype",
            remedy="Use bfloat16, float16 or float32.",
        )
    return text

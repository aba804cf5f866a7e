"""Causal language models without a row in our family table: transformers computes the blocks, we attend.

Transformers looks its attention up by name. Under our name it finds a function that hands queries, keys and values of
every layer to the caller's ``attend``, so that such a model runs on the same scheduler and the same paged cache as our
own decoder: a flat batch of one, explicit positions, no cache of its own.

That is right only for models in which tokens influence each other through attention alone. Nobody's word is taken for
it: at load a probe sends a few tokens through and checks what arrives and what comes out (see :func:`_probe`).
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from engine.capacity import ModelSpec
from engine.errors import ConfigError, ModelLoadError
from engine.layers.linear import Linear
from engine.models.checkpoint import Checkpoint
from engine.models.config_fields import MOST, MOST_LAYERS, bad_field, shown
from engine.models.decoder import Attend
from engine.models.families import unsupported

ATTENTION_NAME = "headroom"
"""Under which transformers finds :func:`_attention`."""

_PROBE_TOKENS = 6
_TOLERANCE = {torch.float32: 1e-3}
_TOLERANCE_HALF = 0.1  # roundings of a whole model in 16 bits; what is looked for is of the order of 1
_HARMLESS_OPTIONS = frozenset({"dropout", "position_ids", "cache_position", "use_cache", "is_causal"})
_ATTENTION_KINDS = frozenset({"full_attention", "sliding_attention"})


@dataclasses.dataclass(frozen=True, slots=True)
class _Call:
    """What one attention layer asks for.

    Attributes:
        module: the layer, which has a ``layer_idx``.
        query: [T, num_heads, head_dim]; key, value: [T, num_kv_heads, head_dim].
        scale: factor on the scores, or None for head_dim^-0.5.
        window: positions that a query sees, itself included; None for all.
        options: everything else that the layer passed and that is not None.
    """

    module: Any
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float | None
    window: int | None
    options: Mapping[str, Any]


_Answer = Callable[[_Call], torch.Tensor]
"""→ [T, num_heads, head_dim]"""


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    headroom: _Answer,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """In the form that transformers calls: [1, heads, T, head_dim] in, [1, T, heads, head_dim] out.

    ``headroom`` comes from the model's own call through its keyword arguments: no state between calls or engines.
    """
    present = {name: value for name, value in options.items() if value is not None and value is not False}
    if options.get("is_causal") is False:
        present["is_causal"] = False
    if attention_mask is not None:
        present["attention_mask"] = attention_mask
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return headroom(_Call(module, query, key, value, scaling, sliding_window, present)).unsqueeze(0), None


class TransformersDecoder:
    """A transformers model with the face of :class:`engine.models.decoder.Decoder`.

    Args:
        model: a causal LM in evaluation mode, loaded with ``attn_implementation=ATTENTION_NAME``.

    Raises:
        ModelLoadError: if it cannot be computed exactly on a paged cache, and why.
    """

    swaps_weights = False
    """transformers names and fuses the tensors its own way, so no layer can be traced back to the checkpoint."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._base = getattr(model, model.base_model_prefix)
        self._head = _head_of(model)
        self._device = model.get_input_embeddings().weight.device
        calls, hidden_size = _probe(self)
        first = calls[0]
        self.num_layers = len(calls)
        self.num_heads, self.head_dim = first.query.shape[1:]
        self.num_kv_heads = int(first.key.shape[1])
        self.hidden_size = hidden_size
        self.vocab_size = int(model.get_input_embeddings().weight.shape[0])
        self.layer_windows = [call.window for call in calls]
        self._scales = [self.head_dim**-0.5 if call.scale is None else float(call.scale) for call in calls]

    def __call__(self, token_ids: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        """As :meth:`engine.models.decoder.Decoder.forward`."""
        return self._run(
            token_ids, positions, lambda call: attend(call.module.layer_idx, call.query, call.key, call.value)
        )

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, hidden_size] → [R, vocab_size], with whatever the model does to its logits."""
        logits: torch.Tensor = self._head(inputs_embeds=hidden.unsqueeze(0), use_cache=False).logits[0]
        return logits

    def attention_scale(self, layer_index: int) -> float:
        """Factor on the attention scores of a layer."""
        return self._scales[layer_index]

    def linears(self) -> Iterator[tuple[str, Linear, tuple[str, ...]]]:
        """None is swappable."""
        return iter(())

    def tables(self) -> Iterator[tuple[str, Linear, tuple[str, ...]]]:
        """As :meth:`engine.models.decoder.Decoder.tables`: none is swappable either."""
        return iter(())

    def num_parameters(self) -> int:
        """Numbers in all weights, tied ones once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def resident_bytes(self) -> int:
        """Bytes of all weights and constants; tied ones are counted once."""
        held = (*self.model.parameters(), *self.model.buffers())
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in held}.values())

    def describe_path(self) -> str:
        """What computes the model, for the page and the record."""
        return f"fallback: transformers {type(self.model).__name__}, attention and cache by Headroom"

    def _run(self, token_ids: torch.Tensor, positions: torch.Tensor, answer: _Answer) -> torch.Tensor:
        outputs = self._base(
            input_ids=token_ids.unsqueeze(0), position_ids=positions.unsqueeze(0), use_cache=False, headroom=answer
        )
        hidden: torch.Tensor = outputs.last_hidden_state[0]
        return hidden


def load_transformers_decoder(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, check_memory: Callable[[int], None]
) -> TransformersDecoder:
    """Load a folder of safetensors through transformers.

    Args:
        check_memory: called with the number of parameters before any weight is read; raises if they do not fit.

    Raises:
        ModelLoadError: naming why the model cannot be run.
    """
    from transformers import AttentionInterface, AutoModelForCausalLM

    config = _read_config(checkpoint)
    model_class = _causal_class(checkpoint, config)
    _refuse_other_mixers(checkpoint, config)
    AttentionInterface.register(ATTENTION_NAME, _attention)
    check_memory(_count_parameters(checkpoint, config, model_class))
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            str(checkpoint.path),
            dtype=dtype,
            attn_implementation=ATTENTION_NAME,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # transformers raises whatever its parts raise
        raise _refused(checkpoint, f"transformers cannot load it ({_first_line(error)})") from error
    if missing := sorted(report["missing_keys"]):
        raise _refused(checkpoint, f"the checkpoint lacks the tensor {missing[0]!r}")
    return TransformersDecoder(model.to(device).eval())


def fields_known(config: Any) -> frozenset[str]:
    """Names of the fields that a transformers configuration class has, whatever a file added to this one."""
    try:
        return frozenset(type(config)().to_dict())
    except Exception:  # some classes cannot be made without arguments: then every field counts as known
        return frozenset(config.to_dict())


def context_of(config: Any) -> int:
    """Tokens that the model itself can hold; of LongRoPE only the original context is served, see ``rope_config``.

    Raises:
        ModelLoadError: if its configuration does not say.
    """
    text = config.get_text_config(decoder=True)
    stated = getattr(text, "max_position_embeddings", None) or getattr(text, "seq_length", None)
    if not isinstance(stated, int):
        raise ModelLoadError(
            "is missing, so the model's context length is unknown.",
            field="max_position_embeddings",
            remedy="Add it to config.json.",
        )
    fields = getattr(text, "rope_parameters", None) or {}
    nested = [part for part in fields.values() if isinstance(part, Mapping)] or [fields]
    limits = [
        int(part.get("original_max_position_embeddings", stated))
        for part in nested
        if part.get("rope_type") in ("longrope", "su")
    ]
    return min([stated, *limits])


def spec_of(decoder: TransformersDecoder, checkpoint: Checkpoint) -> ModelSpec:
    """The shape that the capacity functions want: as they read the configuration, if that agrees with the probe; else
    that of a Llama-like model with the layers, heads and windows that were probed.

    Cache and activations are sized by it. Weights are not: what the engine holds is counted on the model itself.
    """
    try:
        spec = ModelSpec.from_hf_config(checkpoint.config)
    except ConfigError:
        return _probed_spec(decoder, checkpoint)
    read = (spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.head_dim)
    probed = (decoder.num_layers, decoder.num_heads, decoder.num_kv_heads, decoder.head_dim)
    return spec if read == probed else _probed_spec(decoder, checkpoint)


def _probed_spec(decoder: TransformersDecoder, checkpoint: Checkpoint) -> ModelSpec:
    config = decoder.model.config.get_text_config(decoder=True)
    widths = (getattr(config, name, None) for name in ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"))
    windows = decoder.layer_windows
    like = {
        "architectures": ["MistralForCausalLM"],
        "num_hidden_layers": decoder.num_layers,
        "hidden_size": decoder.hidden_size,
        "num_attention_heads": decoder.num_heads,
        "num_key_value_heads": decoder.num_kv_heads,
        "head_dim": decoder.head_dim,
        "intermediate_size": next((width for width in widths if isinstance(width, int)), 4 * decoder.hidden_size),
        "vocab_size": decoder.vocab_size,
        "tie_word_embeddings": bool(getattr(config, "tie_word_embeddings", False)),
        "max_position_embeddings": context_of(decoder.model.config),
        "sliding_window": max((window for window in windows if window is not None), default=None),
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in windows],
        "torch_dtype": str(next(decoder.model.parameters()).dtype).removeprefix("torch."),
    }
    name = str(checkpoint.config.get("_name_or_path") or checkpoint.path.name)
    spec = ModelSpec.from_hf_config(like, name)
    return dataclasses.replace(spec, architecture=type(decoder.model).__name__, model_type=str(config.model_type))


def _count_parameters(checkpoint: Checkpoint, config: Any, model_class: Any) -> int:
    """Of the whole model, which is made without memory for it."""
    try:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in model_class(copy.deepcopy(config)).parameters())
    except Exception as error:  # whatever a class makes of values that it does not check
        raise _refused(checkpoint, f"transformers cannot build it ({_first_line(error)})") from error


def _refuse_absurd_sizes(config: Mapping[str, Any]) -> None:
    """No number of a configuration may be one that transformers would allocate or loop by for ever."""
    for field, value in config.items():
        if isinstance(value, Mapping):
            _refuse_absurd_sizes(value)
        elif isinstance(value, float) and not math.isfinite(value):
            raise bad_field(str(field)[:100], f"{value} is not a number to compute with")
        elif isinstance(value, int) and not -MOST <= value <= MOST:
            raise bad_field(str(field)[:100], f"{shown(value)} is beyond the limit of {MOST:,}")
        elif "layer" in str(field) and isinstance(value, int) and value > MOST_LAYERS:
            raise bad_field(str(field)[:100], f"{value:,} is more than the limit of {MOST_LAYERS:,} layers")


def _read_config(checkpoint: Checkpoint) -> Any:
    from transformers import AutoConfig

    try:
        _refuse_absurd_sizes(checkpoint.config)
    except RecursionError:
        raise _refused(checkpoint, "its config.json is nested too deeply") from None
    try:
        return AutoConfig.from_pretrained(str(checkpoint.path), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        if checkpoint.config.get("auto_map"):
            raise _refused(checkpoint, "it needs code of its own, which is never executed here") from error
        raise _refused(checkpoint, f"transformers cannot read its config.json ({_first_line(error)})") from error


def _causal_class(checkpoint: Checkpoint, config: Any) -> Any:
    """transformers' class for it, if that is the one the checkpoint was saved from and it calls attention by name."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    stated = checkpoint.config.get("architectures") or []
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model_class is None or (stated and model_class.__name__ not in stated):
        raise _refused(checkpoint, f"transformers has no causal LM of that name for model_type {config.model_type!r}")
    if not model_class._supports_attention_backend:
        raise _refused(checkpoint, "its attention in transformers cannot be replaced")
    return model_class


def _refuse_other_mixers(checkpoint: Checkpoint, config: Any) -> None:
    kinds = getattr(config.get_text_config(decoder=True), "layer_types", None) or ()
    if other := sorted(set(kinds) - _ATTENTION_KINDS):
        raise _refused(checkpoint, f"it has layers of the kind {', '.join(other)}, for which there is no paged cache")


def _head_of(model: Any) -> Any:
    """The model with its body replaced by one that gives back what it gets: what remains makes logits of hidden
    states, exactly as the whole model does (scales, soft caps, biases)."""
    head = copy.copy(model)
    head._modules = {**model._modules, model.base_model_prefix: _Body()}
    return head


class _Body(nn.Module):
    """Gives its input back as the last hidden state."""

    @property
    def decoder(self) -> _Body:
        """For models whose head calls the decoder inside the body (OPT)."""
        return self

    def forward(self, *_: Any, inputs_embeds: torch.Tensor, **__: Any) -> _BodyOutput:
        return _BodyOutput(inputs_embeds)


class _BodyOutput:
    """What a body returns, whatever its family's class for that: a last hidden state, and None for all the rest."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> torch.Tensor | None:
        return self.last_hidden_state if index == 0 else None

    def __getattr__(self, name: str) -> None:
        return None


@torch.inference_mode()
def _probe(decoder: TransformersDecoder) -> tuple[list[_Call], int]:
    """What every layer calls attention with, and the width of the hidden states; refuses what is not exact.

    A short text is computed alone and then with the tokens of another one in between, attention kept apart. If its
    hidden states differ, then tokens see each other outside attention, or the positions given are not those used.
    """
    model, vocabulary = decoder.model, decoder.model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    text, other = torch.randint(0, vocabulary, (2, _PROBE_TOKENS), generator=generator).to(decoder._device)
    places = torch.arange(_PROBE_TOKENS, device=decoder._device)
    calls: list[_Call] = []

    def record(call: _Call) -> torch.Tensor:
        _check_call(model, call)
        calls.append(call)
        return _dense(call, [places])

    try:
        alone = decoder._run(text, places, record)
        _check_layers(model, calls)
        mixed, twice = torch.stack((text, other), dim=1).flatten(), places.repeat_interleave(2)
        interleaved = decoder._run(mixed, twice, lambda call: _dense(call, [2 * places, 2 * places + 1]))[::2]
        whole = model(
            input_ids=text.unsqueeze(0),
            position_ids=places.unsqueeze(0),
            use_cache=False,
            headroom=lambda call: _dense(call, [places]),
        ).logits[0]
        logits = decoder.logits(alone)
    except (TypeError, ValueError, AttributeError, RuntimeError, KeyError) as error:
        raise _inexact(model, f"it cannot be called with flat tokens and positions ({_first_line(error)})") from error
    if not _alike(alone, interleaved):
        raise _inexact(model, "its tokens influence each other outside attention, or it ignores the positions given")
    if not _alike(whole, logits):
        raise _inexact(model, "its logits depend on more than the last hidden state")
    return calls, int(alone.shape[-1])


def _dense(call: _Call, sequences: list[torch.Tensor]) -> torch.Tensor:
    """Causal attention within each sequence, given by its rows; the probe's texts are shorter than any window."""
    output = torch.empty_like(call.query)
    for rows in sequences:
        query, key, value = (part[rows].transpose(0, 1).unsqueeze(0) for part in (call.query, call.key, call.value))
        attended = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=call.scale, enable_gqa=query.shape[1] != key.shape[1]
        )
        output[rows] = attended[0].transpose(0, 1)
    return output


def _check_call(model: Any, call: _Call) -> None:
    """One call is causal attention with nothing that a backend would not know."""
    if call.key.shape != call.value.shape or call.key.shape[-1] != call.query.shape[-1]:
        raise _inexact(model, "its queries, keys and values differ in width")
    if other := sorted(call.options.keys() - _HARMLESS_OPTIONS):
        raise _inexact(model, f"its attention needs {', '.join(other)}, which the backends do not have")
    if not call.options.get("is_causal", getattr(call.module, "is_causal", True)):
        raise _inexact(model, "its attention sees later tokens")


def _check_layers(model: Any, calls: list[_Call]) -> None:
    """Every layer attends once, in order, and all in one shape."""
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    if [getattr(call.module, "layer_idx", None) for call in calls] != list(range(layers)):
        raise _inexact(model, f"{len(calls)} attention calls for {layers} layers: not every layer attends once")
    if len({(call.query.shape, call.key.shape) for call in calls}) > 1:
        raise _inexact(model, "its layers differ in shape")


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    tolerance = _TOLERANCE.get(a.dtype, _TOLERANCE_HALF)
    return bool((a.float() - b.float()).norm() <= tolerance * a.float().norm())


def _inexact(model: Any, reason: str) -> ModelLoadError:
    return unsupported("architectures", type(model).__name__, reason)


def _refused(checkpoint: Checkpoint, reason: str) -> ModelLoadError:
    names = checkpoint.config.get("architectures") or [checkpoint.config.get("model_type")]
    return unsupported("architectures", ", ".join(map(str, names)), reason)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

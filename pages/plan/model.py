"""Which model is planned for: one of the catalog, an uploaded configuration, or a shape entered by hand."""

from __future__ import annotations

import json
from typing import Any

import streamlit as st

from engine.capacity import ModelSpec, model_names, model_spec, parameter_count
from engine.capacity.model.families import FAMILIES
from engine.errors import ConfigError, HeadroomError
from pages.plan.fields import DEFAULTS, key, widget
from pages.plan.shape import entered_shape
from pages.shared.messages import show_error

UPLOAD = "Another model: upload its config.json"
SHAPE = "Another model: enter its shape"
_LARGEST_UPLOAD_MB = 1


def read_config(data: bytes, name: str, quantization: bytes | None = None) -> ModelSpec:
    """The model that an uploaded ``config.json`` describes, with the ``hf_quant_config.json`` next to it, if any.

    Raises:
        ConfigError: naming what is wrong and the remedy.
    """
    scheme = None if quantization is None else _json(quantization, "hf_quant_config.json", "hf_quant_config.json")
    return ModelSpec.from_hf_config(_json(data, name, "config.json"), name.removesuffix(".json"), scheme)


def _json(data: bytes, name: str, field: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{name} is not JSON ({str(error)[:80]}).",
            field=field,
            remedy="Download the file again from the model's repository, and upload it unchanged.",
        ) from None


def chosen_model() -> ModelSpec | None:
    """Draw the choice of a model; None (with the error shown) where none is given or it cannot be read."""
    names = sorted(model_names(), key=str.lower)
    chosen = st.selectbox(
        "Model",
        [*names, UPLOAD, SHAPE],
        index=names.index(DEFAULTS["model"]),
        help="Real configurations of published models. Type to search. Instruct and chat versions have the same sizes.",
        **widget("model"),
    )
    try:
        own = {UPLOAD: _uploaded, SHAPE: entered_shape}.get(str(chosen))
        spec = model_spec(str(chosen)) if own is None else own()
    except HeadroomError as error:
        show_error(error)
        return None
    if spec is not None:
        st.caption(_describe(spec))
    return spec


def _uploaded() -> ModelSpec | None:
    file = st.file_uploader(
        "config.json (Hugging Face)",
        type="json",
        max_upload_size=_LARGEST_UPLOAD_MB,
        help="The file next to the weights in the model's repository. It is read here and goes nowhere else.",
        key=key("config"),
    )
    if file is None:
        st.caption(
            f"Families known: {', '.join(sorted({family.model_type for family in FAMILIES}))}. Of any other, enter the "
            "shape."
        )
        return None
    quantization_file = st.file_uploader(
        "hf_quant_config.json (if the repository has one)",
        type="json",
        max_upload_size=_LARGEST_UPLOAD_MB,
        help="NVIDIA ModelOpt writes how a checkpoint is quantized into this file.",
        key=key("quantization"),
    )
    return read_config(file.getvalue(), file.name, None if quantization_file is None else quantization_file.getvalue())


def _describe(spec: ModelSpec) -> str:
    shared = "" if spec.group_queries == 1 else f" sharing {spec.num_kv_heads:,} key/value heads"
    if spec.is_latent:
        shared = f" sharing one latent of {spec.head_dim:,}"
    count = parameter_count(spec)
    active = f", {size_text(count.active)} active" if spec.is_mixture else ""
    window = "" if spec.sliding_window is None else f", sliding window of {spec.sliding_window:,} tokens"
    return (
        f"{size_text(count.total)} parameters{active}, {spec.num_layers:,} layers, {spec.num_heads:,} heads"
        f"{shared}, context up to {spec.max_position:,} tokens{window}"
    )


def size_text(parameters: int) -> str:
    """A number of parameters in words: ``"70.55 billion"``."""
    return f"{parameters / 1e9:,.2f} billion" if parameters >= 1e9 else f"{parameters / 1e6:,.1f} million"

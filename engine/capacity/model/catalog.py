"""The bundled catalog: real configurations of models that people deploy, as their repositories publish them."""

from __future__ import annotations

import functools
import importlib.resources
import json
from typing import Any

from engine.capacity.model.spec import ModelSpec
from engine.errors import ConfigError


@functools.cache
def model_names() -> tuple[str, ...]:
    """Names of the catalog's models, sorted, e.g. ``"Llama-3.1-8B"``."""
    files = (importlib.resources.files("engine.capacity") / "data" / "models").iterdir()
    return tuple(sorted(path.name.removesuffix(".json") for path in files if path.name.endswith(".json")))


@functools.cache
def _configs_by_key() -> dict[str, str]:
    return {_key(name): name for name in model_names()}


def model_config(name: str) -> dict[str, Any]:
    """The ``config.json`` of a catalog model.

    Args:
        name: case, punctuation, an owner before a slash and endings such as ``-Instruct`` or ``-hf`` do not matter.

    Raises:
        ConfigError: if there is no such model; the message lists near misses.
    """
    stored = _configs_by_key().get(_key(name))
    if stored is None:
        raise _unknown(name)
    file = importlib.resources.files("engine.capacity") / "data" / "models" / f"{stored}.json"
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return config | {"_name_or_path": stored}


@functools.cache
def model_spec(name: str) -> ModelSpec:
    """The spec of a catalog model.

    >>> model_spec("meta-llama/Llama-3.1-8B-Instruct").num_layers
    32

    Raises:
        ConfigError: if there is no such model.
    """
    return ModelSpec.from_hf_config(model_config(name))


_ENDINGS = ("instruct", "chat", "hf", "base", "it")


def _key(name: str) -> str:
    parts = name.rsplit("/", 1)[-1].lower().replace("_", "-").split("-")
    while len(parts) > 1 and parts[-1] in _ENDINGS:
        parts.pop()
    if parts[:2] == ["meta", "llama"]:
        parts = parts[1:]
    return "-".join(parts)


def _unknown(name: str) -> ConfigError:
    import difflib

    close = difflib.get_close_matches(_key(name), _configs_by_key(), n=3)
    known = ", ".join(_configs_by_key()[key] for key in close) if close else ", ".join(model_names())
    lead = "Did you mean" if close else "Choose one of"
    return ConfigError(
        f"{name[:80]!r} is not in the catalog.",
        field="model",
        remedy=f"{lead}: {known}{'?' if close else '.'} Or give the path of a config.json.",
    )

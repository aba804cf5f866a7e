"""Checkpoints: weights and configuration on disk, which can be read again at any time.

Every checkpoint answers with Hugging Face tensor names and layouts, whatever its file format, and with norm weights as
they multiply (also where a file holds w for a factor of 1 + w), so that one decoder serves all. Nothing is kept in
memory between reads: going back from quantized weights re-reads, bit for bit.

Each file format has its own: :mod:`engine.models.safetensors_checkpoint`, :mod:`engine.models.gguf_checkpoint`.
"""

from __future__ import annotations

import abc
import functools
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from engine.errors import ModelLoadError
from engine.models.families import Family

_LONGEST_JSON = 256 << 20
_NEARLY_ALL = 0.99  # the rest are norms and biases


class Checkpoint(abc.ABC):
    """One model on disk.

    Attributes:
        path: the file or folder.
        source: ``"safetensors"`` or ``"gguf"``.
        config: the configuration with the field names of a Hugging Face ``config.json``.
        family: the row of the family table it belongs to; None if our decoder has none for it.
        rope_factors: float32 [head_dim / 2] by which rotary frequencies are divided, or None.
        warnings: what the files state besides the configuration and is not followed, a sentence each.
    """

    path: Path
    source: str
    config: dict[str, Any]
    family: Family | None
    rope_factors: torch.Tensor | None = None
    warnings: tuple[str, ...] = ()

    def __init__(self, files: list[Path]) -> None:
        self._files = files
        self._stamps = self._current_stamps()

    @abc.abstractmethod
    def names(self) -> frozenset[str]:
        """All tensor names, as Hugging Face has them."""

    @abc.abstractmethod
    def tensor(self, name: str) -> torch.Tensor:
        """A fresh copy of a tensor on the CPU, in its stored float dtype (float32 if stored quantized).

        Raises:
            ModelLoadError: if it is not there or cannot be read.
        """

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from the file's header where it has one.

        Raises:
            ModelLoadError: if it is not there.
        """
        return tuple(self.tensor(name).shape)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows ``start`` … ``stop`` - 1 of what :meth:`tensor` gives; nothing else is read where the file allows it."""
        return self.tensor(name)[start:stop]

    @functools.cached_property
    def stored_elements(self) -> Mapping[str, int]:
        """``{dtype as the file names it: elements}``, from the headers; empty for weights that are in no file."""
        return {}

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 (hex) that identifies the content; quick when the files are unchanged since the last call."""

    def unused(self, used: Collection[str]) -> set[str]:
        """Tensors that are there and not among the ``used`` names."""
        return set(self.names()) - set(used)

    def check_unchanged(self) -> None:
        """Raises ModelLoadError if a file has changed since this checkpoint was opened."""
        if self._current_stamps() != self._stamps:
            raise ModelLoadError(
                f"{self.path} has changed on disk since it was loaded.",
                field="model",
                remedy="Load the model again.",
            )

    def _current_stamps(self) -> list[tuple[int, int]] | None:
        try:
            return [(status.st_size, status.st_mtime_ns) for status in (path.stat() for path in self._files)]
        except OSError:
            return None


def stored_as(checkpoint: Checkpoint) -> str:
    """What its weights are stored as, which is what a loss of quality is counted from.

    ``"BF16 (safetensors)"``, ``"mostly Q4_1 (79 %, GGUF)"`` by share of the elements, ``"quantized by gptq
    (safetensors)"``, ``"in no file"``.
    """
    container = {"gguf": "GGUF"}.get(checkpoint.source, checkpoint.source)
    method = (checkpoint.config.get("quantization_config") or {}).get("quant_method")
    if method:
        return f"quantized by {method} ({container})"
    counts = checkpoint.stored_elements
    if not counts:
        return "in no file"
    dtype = max(counts, key=lambda name: counts[name])
    share = counts[dtype] / sum(counts.values())
    return f"{dtype} ({container})" if share >= _NEARLY_ALL else f"mostly {dtype} ({100 * share:.0f} %, {container})"


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON object from a file of a model folder.

    Raises:
        ModelLoadError: if it is missing, not readable or not a JSON object.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe or a device would be waited for
            raise ValueError("it is not a regular file")
        if path.stat().st_size > _LONGEST_JSON:
            raise ValueError(f"more than {_LONGEST_JSON >> 20} MiB")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise incomplete(path.parent, f"has no {what}") from None
    except (OSError, ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:300]
        raise ModelLoadError(
            f"{path} is not valid JSON ({reason}).", field=what, remedy="Correct the file or download it again."
        ) from None
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} is not a JSON object.", field=what, remedy="Correct it or download it again.")
    return value


def incomplete(path: Path, what: str) -> ModelLoadError:
    """The error for a file or folder that is not all of a model; ``what`` is said of it, e.g. ``"lacks …"``."""
    return ModelLoadError(
        f"{path} {what}.",
        field="model",
        remedy="Give a folder with config.json, tokenizer files and *.safetensors, or a complete .gguf file.",
    )

"""The structure of a decoder's layers without their weights: what a compiled layer depends on, and nothing else.

Layers of equal structure share one compiled program, which takes the weights as inputs: thirty equal layers compile in
the time of one, weights are never copied, and swapping them needs no new program unless their format changes.

The structure is the pickle of the layer with every tensor replaced by its number, shape, strides and dtype. So nothing
here knows a family or a weight format: whatever a layer consists of is part of its structure.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from engine.models.decoder import Decoder
from engine.quantization.formats import WeightFormat

# What a module or weight format knows of itself and does not compute with: its place in the stack (which reaches the
# callback from outside, as the operator's `where`), the checkpoint's names for it, its quantization error's bound.
_DESCRIPTIVE = ("index", "sources", "_step")
MAX_KINDS = 8  # each is compiled for every shape: a model of more would take an hour and gain little
_PROBES = (3, 5)  # two numbers of tokens: a dimension that follows them is the token dimension


@dataclasses.dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor without its values; ``shape`` holds -1 where the number of tokens stands."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def empty(self, device: torch.device, num_tokens: int = 0) -> torch.Tensor:
        """A tensor of this kind, values undefined."""
        if -1 in self.shape:
            shape = [num_tokens if size == -1 else size for size in self.shape]
            return torch.empty(shape, dtype=self.dtype, device=device)
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)


@dataclasses.dataclass(frozen=True, slots=True)
class LayerKind:
    """What equal layers have in common.

    Attributes:
        structure: see the module.
        weights: specification of each weight, in the order of :func:`take_apart`.
        arguments: the positional arguments of the layer's forward as a tree, see :func:`argument_tree`.
    """

    structure: bytes
    weights: tuple[TensorSpec, ...]
    arguments: tuple[Any, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class DecoderBlueprint:
    """All layers of a decoder.

    Attributes:
        kinds: the different ones.
        layers: kind of each layer, in order.
        weights: weights of each layer, the live tensors.
    """

    kinds: tuple[LayerKind, ...]
    layers: tuple[int, ...]
    weights: tuple[tuple[torch.Tensor, ...], ...]

    def digest(self, *more: str) -> str:
        """Hex SHA-256 over all kinds and whatever else the compiled programs depend on."""
        digest = hashlib.sha256()
        for part in (*more, *(repr((kind.weights, kind.arguments)) for kind in self.kinds)):
            digest.update(part.encode() + b"\0")
        for kind in self.kinds:
            digest.update(hashlib.sha256(kind.structure).digest())
        return digest.hexdigest()


def draw(decoder: Decoder, device: torch.device) -> DecoderBlueprint:
    """Describe the layers as they are now. Runs embedding and final norm on a few tokens, but no layer.

    Raises:
        TypeError, pickle.PicklingError: if a layer holds what cannot be described.
        ValueError: if there are more different layers than :data:`MAX_KINDS`.
    """
    trees = [_argument_trees(decoder, count, device) for count in _PROBES]
    kinds: dict[LayerKind, int] = {}
    layers, weights = [], []
    for layer, few, more in zip(decoder.layers, *trees, strict=True):
        structure, tensors = take_apart(layer)
        kind = LayerKind(structure, tuple(_spec(tensor) for tensor in tensors), _mark_tokens(few, more))
        layers.append(kinds.setdefault(kind, len(kinds)))
        weights.append(tuple(tensors))
    if len(kinds) > MAX_KINDS:
        raise ValueError(f"the layers are of {len(kinds)} different kinds, more than {MAX_KINDS} are not compiled")
    return DecoderBlueprint(tuple(kinds), tuple(layers), tuple(weights))


# -- a layer -----------------------------------------------------------------------------------------------


def take_apart(layer: nn.Module) -> tuple[bytes, list[torch.Tensor]]:
    """A layer's structure and its tensors, each once, in a fixed order."""
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    pickler.dump(layer)
    return buffer.getvalue(), pickler.tensors


def put_together(structure: bytes, tensors: Sequence[torch.Tensor]) -> nn.Module:
    """The layer of that structure around these tensors."""
    layer: nn.Module = _Unpickler(io.BytesIO(structure), tensors).load()
    return layer


class _Pickler(pickle.Pickler):
    """Writes numbers in place of tensors. Without memo, so that equal layers give equal bytes, shared parts or not."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self.fast = True
        self.tensors: list[torch.Tensor] = []
        self._numbers: dict[int, int] = {}

    def reducer_override(self, item: Any) -> Any:
        if not isinstance(item, nn.Module | WeightFormat):
            return NotImplemented
        reduced: Any = item.__reduce_ex__(5)
        make, arguments, state = reduced[:3]
        return make, arguments, state | {name: None for name in _DESCRIPTIVE if name in state}

    def persistent_id(self, item: Any) -> Any:
        if not isinstance(item, torch.Tensor):
            return None
        if id(item) not in self._numbers:
            self._numbers[id(item)] = len(self.tensors)
            self.tensors.append(item.detach())
        return self._numbers[id(item)]


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: Sequence[torch.Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, pid: int) -> torch.Tensor:
        return self._tensors[pid]


# -- its arguments -----------------------------------------------------------------------------------------


def argument_tree(arguments: Any) -> Any:
    """Positional arguments with specifications for tensors, ``"attend"`` for the callback, constants as they are."""
    if isinstance(arguments, torch.Tensor):
        return _spec(arguments)
    if isinstance(arguments, tuple | list):
        return tuple(argument_tree(item) for item in arguments)
    if callable(arguments):
        return "attend"
    if arguments is None or isinstance(arguments, bool | int | float):
        return arguments
    raise TypeError(f"a layer takes a {type(arguments).__name__}, which a compiled program cannot take")


def argument_tensors(arguments: Sequence[Any]) -> list[torch.Tensor]:
    """The tensors among a layer's arguments, in order."""
    tensors: list[torch.Tensor] = []
    for item in arguments:
        if isinstance(item, torch.Tensor):
            tensors.append(item)
        elif isinstance(item, tuple | list):
            tensors.extend(argument_tensors(item))
    return tensors


def tree_specs(tree: Any) -> Iterator[TensorSpec]:
    """The specifications in a tree of arguments, in the order of :func:`argument_tensors`."""
    if isinstance(tree, TensorSpec):
        yield tree
    elif isinstance(tree, tuple):
        for item in tree:
            yield from tree_specs(item)


def fill_tree(tree: Any, tensors: Iterator[torch.Tensor], attend: Callable[..., torch.Tensor]) -> Any:
    """The arguments again: the next of ``tensors`` for each specification, ``attend`` for the callback."""
    if isinstance(tree, TensorSpec):
        return next(tensors)
    if isinstance(tree, tuple):
        return tuple(fill_tree(item, tensors, attend) for item in tree)
    return attend if tree == "attend" else tree


def _argument_trees(decoder: Decoder, num_tokens: int, device: torch.device) -> list[Any]:
    """With what arguments the decoder calls each layer for that many tokens."""
    trees: list[Any] = []

    def record(layer: nn.Module, *arguments: Any) -> torch.Tensor:
        trees.append(argument_tree(arguments))
        hidden: torch.Tensor = arguments[0]
        return hidden

    with torch.inference_mode():
        tokens = torch.zeros(num_tokens, dtype=torch.int64, device=device)
        decoder(tokens, tokens, lambda layer, query, key, value: query, run_layer=record)
    return trees


def _mark_tokens(few: Any, more: Any) -> Any:
    """The tree with -1 for every dimension that differs between two numbers of tokens."""
    if isinstance(few, TensorSpec):
        shape = tuple(a if a == b else -1 for a, b in zip(few.shape, more.shape, strict=True))
        return TensorSpec(shape, () if -1 in shape else few.stride, few.dtype)
    if isinstance(few, tuple):
        return tuple(_mark_tokens(a, b) for a, b in zip(few, more, strict=True))
    return few


def _spec(tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(tuple(tensor.shape), tensor.stride(), tensor.dtype)

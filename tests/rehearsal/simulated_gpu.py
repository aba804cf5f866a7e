"""GPUs that are not there: tensors say ``cuda:1`` and hold real numbers on the CPU.

torch's ``FakeTensorMode`` has shapes and no numbers, so an engine on it meets no token that it chose itself. Here every
tensor of a simulated GPU wraps one of the CPU and lies about its device; an operator runs on what is wrapped. So the
engine serves real requests, its tokens can be compared with those of the engine on the CPU, and what a GPU would have
refused or waited for is seen on the way:

* tensors of two devices in one operator raise; so do operators that torch's CUDA has no kernel for, as far as a short
  list knows, and what ``FakeTensorMode`` objects to: it is asked about every new combination of operator, dtypes and
  layouts, and its answer (shapes, dtypes, device) must be what came out;
* a **wait** is whatever makes the host stand still until the GPU has caught up: a number read back, a size that only
  the device knows, a copy to the host, or one from the host that is not asynchronous;
* a **copy** is an asynchronous one from pinned memory; the memory must not change before the next wait;
* fresh memory is filled with NaN, or with large numbers, so that what no kernel wrote shows;
* while a graph is captured, waits and copies from the host raise (:class:`CaptureError`).

What it does not see: time, races between streams, numerics of CUDA's own kernels, memory that runs out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

ROOT = Path(__file__).parents[2]
_ROOMS = (str(ROOT / "engine"), str(ROOT / "kernels"))

#: Operators whose result, or its size, the host waits for.
_WAITS = {
    "aten::_local_scalar_dense": "a number is read back",
    "aten::equal": "a number is read back",
    "aten::is_nonzero": "a number is read back",
    "aten::nonzero": "a size that only the device knows",
    "aten::argwhere": "a size that only the device knows",
    "aten::masked_select": "a size that only the device knows",
    "aten::bincount": "a size that only the device knows",
    "aten::_unique2": "a size that only the device knows",
    "aten::unique_dim": "a size that only the device knows",
    "aten::unique_consecutive": "a size that only the device knows",
}
_INDEXING = ("aten::index.Tensor", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_")
_COPIES = ("aten::copy_", "aten::_to_copy")
#: Run as a whole: which of their parts runs depends on the device.
_WHOLE = ("aten::scaled_dot_product_attention",)
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_int_mm")
#: What CUDA does with 8-bit floats; anything else may lack a kernel there.
_OF_8_BIT_FLOATS = {
    "aten::_to_copy", "aten::copy_", "aten::view", "aten::view.dtype", "aten::select.int", "aten::slice.Tensor",
    "aten::detach", "aten::alias", "aten::_unsafe_view", "aten::transpose.int", "aten::t", "aten::unsqueeze",
    "aten::clone", "aten::zero_", "aten::fill_.Scalar", "aten::as_strided", "aten::expand", "aten::permute",
    "aten::squeeze.dim", "aten::_reshape_alias", "aten::unbind.int", "aten::split.Tensor", "aten::split_with_sizes",
    "aten::empty.memory_format", "aten::empty_like", "aten::new_empty", "aten::empty_strided", "aten::zeros",
    "aten::new_zeros", "aten::zeros_like",
}  # fmt: skip


class GpuMistake(BaseException):
    """What a GPU would have refused, or what the rehearsal does not allow. No handler of the engine may swallow it."""


class CaptureError(RuntimeError):
    """What cannot be done while a graph is captured; an engine goes on without the graph."""


@dataclasses.dataclass(frozen=True, slots=True)
class Site:
    """Where in the engine something happened: the innermost function of ``engine/`` or ``kernels/``."""

    file: str
    function: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line} ({self.function})"


@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """Something that the ledger keeps.

    Attributes:
        kind: ``"wait"``, ``"copy"`` or ``"launch"``.
        what: a description; a launch's is the kernel's name.
    """

    kind: str
    what: str
    site: Site


def _site() -> Site:
    frame: Any = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_ROOMS):
            return Site(str(Path(name).relative_to(ROOT)), frame.f_code.co_name, frame.f_lineno)
        frame = frame.f_back
    return Site("tests", "outside of the engine", 0)


class SimulatedTensor(torch.Tensor):
    """A tensor of a simulated GPU.

    Attributes:
        inner: the tensor of the CPU that holds its numbers.
        simulation: whose it is.
    """

    inner: torch.Tensor
    simulation: Simulation
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device, simulation: Simulation) -> SimulatedTensor:
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
        )
        made.inner, made.simulation = inner, simulation
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """In a thread without the simulation; there is one for each tensor."""
        owner = next(x for x in tree_leaves((args, kwargs)) if isinstance(x, cls)).simulation
        return owner.perform(func, args, kwargs or {})

    def tolist(self) -> Any:
        if self.numel():
            self.simulation.wait("numbers are read back")
        return self.inner.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {self.device} tensor to numpy: copy it to host memory first")

    __array__ = numpy

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"SimulatedTensor({list(self.shape)}, {self.dtype}, {self.device})"


class Simulation(TorchDispatchMode):
    """Makes tensors of ``cuda`` devices, runs their operators, and keeps a ledger.

    Args:
        count: how many GPUs there are.

    Attributes:
        events: the ledger, in order.
        mistakes: every :class:`GpuMistake`, should one have been caught.
        made_on: indices of the GPUs that tensors were made on.
        capturing: a graph is being captured.
    """

    _checked: set[Any] = set()  # noqa: RUF012 - one for all simulations of the process

    def __init__(self, count: int = 2) -> None:
        super().__init__()
        self.count = count
        self.events: list[Event] = []
        self.mistakes: list[str] = []
        self.made_on: set[int] = set()
        self.capturing = False
        self._pinned: dict[int, torch.Tensor] = {}
        self._in_flight: list[tuple[torch.Tensor, torch.Tensor, Site]] = []

    # -- the ledger ----------------------------------------------------------------------------------------------------

    def fail(self, message: str) -> None:
        """Raises :class:`GpuMistake`, and remembers it in case it is caught."""
        self.mistakes.append(f"{_site()}: {message}")
        raise GpuMistake(f"{_site()}: {message}")

    def note(self, kind: str, what: str) -> None:
        """Write an event into the ledger."""
        if self.capturing and kind in ("wait", "copy"):
            raise CaptureError(f"{_site()}: {what}, while a graph is captured")
        self.events.append(Event(kind, what, _site()))

    def wait(self, what: str) -> None:
        """The host waits: whatever was on its way has arrived, unchanged."""
        self.note("wait", what)
        in_flight, self._in_flight = self._in_flight, []
        for memory, sent, site in in_flight:
            if not torch.equal(memory, sent):
                self.fail(f"pinned memory changed while the copy of {site} could still be reading it")

    def taken(self) -> list[Event]:
        """The events since the last call."""
        events, self.events = self.events, []
        return events

    # -- operators -----------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.perform(func, args, kwargs or {})

    def perform(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run an operator, on a simulated GPU or the host."""
        name = func.name()
        if name not in _WHOLE and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd"):
            with self:
                return func.decompose(*args, **kwargs)
        leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        device = self._device_of(func, leaves, kwargs)
        bare_args, bare_kwargs = tree_map(bare, (args, kwargs))
        if bare_kwargs.get("device") is not None and bare_kwargs["device"].type == "cuda":
            bare_kwargs["device"] = torch.device("cpu")
        pinned = bare_kwargs.pop("pin_memory", False)
        result = _as_on_a_gpu(func, bare_args, bare_kwargs)
        if device is None:
            if pinned:
                self._pinned[result.untyped_storage().data_ptr()] = result
            return result
        if pinned:
            self.fail("only tensors of the host can be pinned")
        if name.startswith(("aten::empty", "aten::new_empty")):
            _spoil(result)
        known = {id(x.inner): x for x in leaves if isinstance(x, SimulatedTensor)}
        wrapped = tree_map(lambda x: self._wrap(x, device, known), result)
        if name not in _WHOLE:
            self._check(func, args, kwargs, wrapped)
        return wrapped

    def _wrap(self, value: Any, device: torch.device, known: dict[int, SimulatedTensor]) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        assert device.index is not None
        self.made_on.add(device.index)
        if id(value) in known:
            return known[id(value)]
        with torch.inference_mode(False):  # a view of what was made outside of it must not be a tensor of inference
            return SimulatedTensor(value, device, self)

    def _device_of(self, func: Any, leaves: list[torch.Tensor], kwargs: dict[str, Any]) -> torch.device | None:
        """The simulated GPU that an operator's result is on, None for the host; copies and waits go to the ledger."""
        name, asked = func.name(), kwargs.get("device")
        ours = [x for x in leaves if isinstance(x, SimulatedTensor)]
        if asked is not None and asked.type == "cuda":
            asked = self._existing(asked)
        if not ours and (asked is None or asked.type != "cuda"):
            return None
        if name in _COPIES:
            return self._copy(name, leaves, asked, bool(kwargs.get("non_blocking")))
        device = ours[0].device if ours else asked
        self._check_devices(name, leaves, ours)
        self._check_types(name, ours)
        masked = [x for x in ours[1:] if x.dtype in (torch.bool, torch.uint8)] if name.startswith(_INDEXING) else []
        if name in _WAITS or (name == "aten::repeat_interleave.Tensor" and kwargs.get("output_size") is None):
            self.wait(f"{name}: {_WAITS.get(name, 'a size that only the device knows')}")
        elif masked and name == "aten::index.Tensor":
            self.wait("an index by a mask: a size that only the device knows")
        return None if name == "aten::_local_scalar_dense" else device

    def _existing(self, device: torch.device) -> torch.device:
        index = 0 if device.index is None else device.index
        if index >= self.count:
            raise RuntimeError("CUDA error: invalid device ordinal")
        return torch.device("cuda", index)

    def _check_devices(self, name: str, leaves: list[torch.Tensor], ours: list[SimulatedTensor]) -> None:
        devices = {x.device for x in ours}
        if len(devices) > 1:
            self.fail(f"{name} over {' and '.join(sorted(map(str, devices)))}")
        strangers = [x for x in leaves if not isinstance(x, SimulatedTensor) and x.dim()]
        if not strangers or not ours:
            return
        if not name.startswith(_INDEXING):
            self.fail(f"{name} over {ours[0].device} and the CPU")
        for index in strangers:
            self._from_host(index, non_blocking=False)

    def _check_types(self, name: str, ours: list[SimulatedTensor]) -> None:
        if name not in _OF_8_BIT_FLOATS and any(x.is_floating_point() and x.dtype.itemsize == 1 for x in ours):
            self.fail(f"{name} of 8-bit floats: CUDA may have no kernel for it")
        if name.startswith(_PRODUCTS) and any(not x.is_floating_point() for x in ours):
            self.fail(f"{name} of whole numbers: CUDA has no kernel for it")

    def _copy(
        self, name: str, leaves: list[torch.Tensor], asked: torch.device | None, non_blocking: bool
    ) -> torch.device | None:
        source = leaves[-1]
        target = leaves[0].device if name == "aten::copy_" else (asked or source.device)
        if source.device == target:
            return target
        if source.device.type == target.type == "cuda":
            self.fail(f"a copy from {source.device} to {target}")
        if target.type == "cpu":
            if source.numel():
                self.wait("a copy to the host")
            return None
        if source.dim() or name == "aten::_to_copy":
            self._from_host(source, non_blocking)
        return target

    def _from_host(self, source: torch.Tensor, non_blocking: bool) -> None:
        if not source.numel():
            return
        pinned = source.untyped_storage().data_ptr() in self._pinned
        if not pinned or not non_blocking:
            how = "pinned memory, but the host waits" if pinned else "memory that is not pinned"
            self.wait(f"a copy from the host: {how}")
            return
        self.note("copy", f"{source.nbytes} bytes from pinned memory")
        self._in_flight.append((source, source.clone(), _site()))

    # -- a second opinion ------------------------------------------------------------------------------------------

    def _check(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        """What torch itself says of the operator on a GPU, once for each combination."""
        flat, _ = tree_flatten((args, kwargs))
        key = (func, *map(_kind, flat))
        if key in Simulation._checked:
            return
        Simulation._checked.add(key)
        with torch.inference_mode(torch.is_inference_mode_enabled()), FakeTensorMode() as mode:
            fake_args, fake_kwargs = tree_map(lambda x: _fake(x, mode), (args, kwargs))
            try:
                expected = func(*fake_args, **fake_kwargs)
            except (DataDependentOutputException, DynamicOutputShapeException):
                known = (*_WAITS, "aten::repeat_interleave.Tensor", *_INDEXING)
                if not func.name().startswith(known):
                    self.fail(f"{func.name()} makes the host wait, which the simulation does not know of")
                return
            except UnsupportedOperatorException:
                return
            except Exception as error:
                self.fail(f"{func.name()}: {error}")
        for ours, theirs in zip(tree_leaves(result), tree_leaves(expected), strict=True):
            if isinstance(ours, torch.Tensor) and _facts(ours) != _facts(theirs):
                self.fail(f"{func.name()} gave {_facts(ours)}, on a GPU it gives {_facts(theirs)}")


def bare(value: Any) -> Any:
    """The CPU's tensor in a simulated one, also within tuples and dataclasses; everything else as it is."""
    if isinstance(value, SimulatedTensor):
        return value.inner
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(map(bare, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{f.name: bare(getattr(value, f.name)) for f in dataclasses.fields(value)})
    return value


def _as_on_a_gpu(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operator on the CPU, where that does what CUDA does and the CPU does not."""
    if func.name() == "aten::histc" and not args[0].is_floating_point():
        return func(args[0].double(), *args[1:], **kwargs).to(args[0].dtype)
    result = func(*args, **kwargs)
    if func.name() == "aten::native_layer_norm":  # mean and deviation are float32 there
        return result[0], result[1].float(), result[2].float()
    return result


def _spoil(fresh: torch.Tensor) -> None:
    if fresh.dtype.itemsize == 1:
        fresh.view(torch.uint8).fill_(0x7F)  # NaN of e4m3
    else:
        fresh.fill_(float("nan") if fresh.is_floating_point() else 2**28 + 7)


def _kind(value: Any) -> Any:
    """What a second opinion may depend on."""
    if isinstance(value, torch.Tensor):
        sizes = tuple(min(size, 2) for size in value.shape)
        return sizes, value.dtype, value.device.type, value.is_contiguous()
    return value if isinstance(value, torch.dtype | bool | None) else type(value)


def _fake(value: Any, mode: FakeTensorMode) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    with mode:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def _facts(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.dtype, tensor.device


@contextlib.contextmanager
def capturing(simulation: Simulation) -> Iterator[None]:
    """Inside, a graph is being captured."""
    simulation.capturing = True
    try:
        yield
    finally:
        simulation.capturing = False

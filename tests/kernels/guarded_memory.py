"""Interpreted kernels run on memory that ends, or begins, where the tensor does: who reads beyond it dies.

On a GPU a read beyond a tensor mostly finds other memory of the process and goes unnoticed, until it does not. Here
every storage that is given to a launch is copied into pages of its own, with pages behind (or before) it that nobody
may touch, and copied back afterwards. A breach is a segmentation fault, which pytest's fault handler shows with the
kernel's line.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
from typing import Any

import pytest
import torch
from triton.runtime.interpreter import GridExecutor

PAGE = mmap.PAGESIZE
#: Larger ones, as an engine's cache, are left where they are: they would be copied at each launch.
MOST_BYTES = 2**20
_PROT_NONE = 0
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def guarded(source: torch.UntypedStorage, at_end: bool) -> torch.UntypedStorage:
    """A copy of ``source`` whose last byte (else first) borders on memory that may not be touched."""
    size = source.nbytes()
    pages = -(-size // PAGE) * PAGE
    memory = mmap.mmap(-1, pages + PAGE)
    begin = pages - size if at_end else PAGE
    copy = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=begin).untyped_storage()
    copy.copy_(source)
    forbidden = copy.data_ptr() + (size if at_end else -PAGE)
    if _LIBC.mprotect(forbidden, PAGE, _PROT_NONE) != 0:
        raise OSError(ctypes.get_errno(), "mprotect failed")
    return copy


def guard_launches(patch: pytest.MonkeyPatch) -> None:
    """From now on each launch of an interpreted kernel gets guarded copies, in turn at their ends and beginnings."""
    ends = itertools.cycle((True, False))
    as_they_are = GridExecutor._init_args_hst

    def with_guards(launch: GridExecutor, arguments: Any, named: Any) -> Any:
        at_end, copies = next(ends), dict[int, torch.UntypedStorage]()

        def guard(argument: Any) -> Any:
            if not isinstance(argument, torch.Tensor):
                return argument
            storage = argument.untyped_storage()
            if not 0 < storage.nbytes() <= MOST_BYTES:
                return argument
            place = storage.data_ptr()
            if place not in copies:
                copies[place] = guarded(storage, at_end)
            view = argument.new_empty(0)
            return view.set_(copies[place], argument.storage_offset(), argument.shape, argument.stride())  # type: ignore[call-overload]

        found, found_named = as_they_are(launch, arguments, named)
        return [guard(x) for x in found], {name: guard(x) for name, x in found_named.items()}

    patch.setattr(GridExecutor, "_init_args_hst", with_guards)

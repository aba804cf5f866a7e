"""The guards around the memory of interpreted kernels (conftest.py) let nobody pass, and nothing else is stopped."""

import faulthandler
import multiprocessing
import signal

import pytest
import torch

from kernels.language import tl, triton


@triton.jit
def _copy_kernel(target_ptr, source_ptr, shift, size, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    tl.store(target_ptr + place, tl.load(source_ptr + shift + place, mask=place < size, other=0.0), mask=place < size)


def copy_twice(shift=0):
    """Once with guards at the ends, once at the beginnings."""
    targets, source = [torch.zeros(20), torch.zeros(20)], torch.arange(20.0)
    for target in targets:
        _copy_kernel[(1,)](target, source, shift, 20, BLOCK=32)
    return [torch.equal(target, source) for target in targets]


def die(shift):
    faulthandler.disable()  # its words are expected, and many
    copy_twice(shift)


def test_a_kernel_within_its_tensors_reads_and_writes_them():
    assert copy_twice() == [True, True]


@pytest.mark.parametrize("shift", [1, -1], ids=["behind", "before"])
def test_a_kernel_that_reads_one_element_beyond_a_tensor_dies(shift):
    process = multiprocessing.get_context("fork").Process(target=die, args=(shift,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGSEGV


@pytest.mark.parametrize("at", [slice(3, 17), slice(None, None, 2)], ids=["a part", "every other element"])
def test_views_keep_their_place_in_the_storage(at):
    target, source = torch.zeros(20), torch.arange(20.0)
    view = target[at]
    _copy_kernel[(1,)](view, source, 0, 1, BLOCK=32)
    _copy_kernel[(1,)](source, view, 0, 1, BLOCK=32)
    assert (target.nonzero().flatten().tolist(), float(source[0])) == ([], 0.0)
    _copy_kernel[(1,)](view, source, 5, 1, BLOCK=32)
    assert target.nonzero().flatten().tolist() == [at.start or 0]

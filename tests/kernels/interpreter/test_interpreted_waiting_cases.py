"""The GPU cases of the kernels that nothing calls yet, interpreted."""

import pytest
import torch

from tests.gpu.kernels import largest_error
from tests.gpu.waiting_cases import cases

pytestmark = pytest.mark.waiting


def test_every_case_of_a_kernel_that_waits_agrees_with_its_reference():
    found = {case.kernel: largest_error(case.run, case.reference) <= case.tolerance for case in made()}
    assert found == {"attention_mass": True, "verify": True}


def made():
    return cases(torch.device("cpu"), "tiny")

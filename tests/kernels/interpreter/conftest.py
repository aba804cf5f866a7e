"""Every kernel of this folder runs on memory with guards around it."""

from collections.abc import Iterator

import pytest

from tests.kernels.guarded_memory import guard_launches


@pytest.fixture(autouse=True, scope="session")
def _guards() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        guard_launches(patch)
        yield

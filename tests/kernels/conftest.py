"""What the tests of the native CPU kernels share."""

from __future__ import annotations

from collections.abc import Generator
from types import ModuleType

import pytest

from qgraph import kernels


@pytest.fixture(scope="session")
def native() -> ModuleType:
    """The module of native kernels; skips where there is none."""
    module = kernels.library()
    if module is None:
        pytest.skip("no native kernels: QGRAPH_KERNELS=/path/to/_native….so, or let them be built")
    return module


@pytest.fixture
def restored(native: ModuleType) -> Generator[ModuleType]:
    """The module, with its instruction set and threads put back after the test."""
    instruction_set, threads = native.instruction_set(), native.threads()
    yield native
    native.use(instruction_set)
    native.set_threads(threads)

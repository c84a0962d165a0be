"""What the tests of the native CPU kernels share."""

from __future__ import annotations

import tempfile
from collections.abc import Generator
from pathlib import Path
from shutil import which
from types import ModuleType

import pytest

from qgraph import kernels
from qgraph.kernels import process
from tests.kernels.fakes import Fake, compile_modules, fake_compiler


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


@pytest.fixture(scope="session")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if which("gcc") is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("modules")
    compile_modules(folder)
    return folder


@pytest.fixture
def fake(modules: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """A compiler that works, an empty cache, and a process that has not asked for kernels yet."""
    for name in ("compiler", "cache", "temporary"):
        (tmp_path / name).mkdir(mode=0o700)
    fake = fake_compiler(tmp_path / "compiler", modules)
    chosen = {"CXX": fake.command, "QGRAPH_CACHE": str(tmp_path / "cache"), "QGRAPH_KERNELS": "auto"}
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    for name in ("QGRAPH_ISA", "QGRAPH_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(process, "_PROCESS", process._Process())
    return fake

"""The kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from shutil import which

import pytest

from qgraph.kernels import build, toolchain

DRIVER = Path(__file__).with_name("driver.cpp")  # every kernel of the table, on arrays of its own; no MLX
# Not optimized: most of the time goes into compiling, and the more there is to check.
FLAGS = ("-std=c++20", "-g1", "-O0", "-ffp-contract=off", "-fno-strict-aliasing", "-fno-omit-frame-pointer")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.checkout,
    pytest.mark.skipif(sys.platform != "linux" or which("g++") is None, reason="needs g++ on Linux"),
]


def driver(folder: Path, name: str, *sanitizers: str) -> Path:
    """The driver with the kernels of one instruction set, as a program."""
    kernels = toolchain.named(name)
    if kernels not in toolchain.of_this_cpu():
        pytest.skip(f"this CPU has no {name}")
    common = ["g++", *FLAGS, *sanitizers, f"-I{toolchain.SOURCE}", f"-DQGRAPH_SETS=X({name})"]
    vectors = name.removesuffix("vnni")  # these are the same in both sets of AVX-512
    lanes = (*kernels.flags, f"-DQGRAPH_ISA={name}", f'-DQGRAPH_SIMD="simd/{vectors}.h"')
    files: list[tuple[Path, tuple[str, ...]]] = [
        (toolchain.SOURCE / "isa" / f"{name}.cpp", kernels.flags),
        (DRIVER.with_name("lanes.cpp"), lanes),
        *((file, ()) for file in (toolchain.SOURCE / "cpu.cpp", toolchain.SOURCE / "pool.cpp", DRIVER)),
    ]
    for file, flags in files:
        subprocess.run([*common, *flags, "-c", file, "-o", folder / f"{file.stem}.o"], check=True)
    objects = [str(folder / f"{file.stem}.o") for file, _ in files]
    subprocess.run(["g++", *sanitizers, *objects, "-lpthread", "-o", folder / "driver"], check=True)
    return folder / "driver"


def run(*command: str | Path, **variables: str) -> None:
    found = subprocess.run(
        command,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-8000:]


def file_of(library: str) -> str:
    """Where the compiler has a library."""
    command = ["g++", f"-print-file-name={library}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize("name", ["avx512vnni", "avx2", "neon", "portable"])
def test_no_address_or_undefined_behaviour_is_wrong(tmp_path, name):
    program = driver(tmp_path, name, "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    run(program, QGRAPH_THREADS="2")


def test_no_two_threads_race(tmp_path):
    program = driver(tmp_path, "portable", "-fsanitize=thread", "-O1")
    # Without random addresses: on some kernels ThreadSanitizer does not start with them.
    run(*(("setarch", "-R") if which("setarch") else ()), program, QGRAPH_THREADS="4")


def test_the_module_in_python_is_clean(tmp_path):
    """The tests of the products and of the threads once more, with MLX's arrays, in a module with checks."""
    best = toolchain.of_this_cpu()[:1]
    what, cxx = toolchain.recipe(best, ()), toolchain.Compiler(("g++",), "")
    module = build.build(
        tmp_path / f"_native{toolchain.SUFFIX}", cxx, what, extra=["-fsanitize=address", "-O0"]
    )
    # The C++ library too: without it, the checker does not find what throws exceptions.
    preloaded = [file_of("libasan.so"), file_of("libstdc++.so")]
    report = tmp_path / "report"
    variables = {
        "LD_PRELOAD": " ".join(preloaded),
        "ASAN_OPTIONS": f"detect_leaks=0:log_path={report}",
        "QGRAPH_KERNELS": str(module),
    }
    tests = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow", "tests/kernels")
    try:
        run(sys.executable, *tests, "--ignore=tests/kernels/test_build.py", **variables)
    except AssertionError as error:
        said = "".join(file.read_text() for file in tmp_path.glob("report.*"))
        raise AssertionError(f"{error}\n{said}") from None


def test_no_code_of_one_instruction_set_is_shared_with_another(tmp_path):
    """An inline function outside the set's namespace may be linked from any of the files that hold it.

    Compiled for AVX-512 it would then run on a CPU without, or in a file that is compiled without.
    """
    for kernels in toolchain.of_this_cpu()[:-1]:
        to = tmp_path / f"{kernels.name}.o"
        file = toolchain.SOURCE / "isa" / f"{kernels.name}.cpp"
        flags = (*toolchain.FLAGS, *kernels.flags, f"-I{toolchain.SOURCE}")
        subprocess.run(["g++", *flags, "-c", file, "-o", to], check=True)
        symbols = subprocess.run(
            ["nm", "-C", "--defined-only", to], check=True, capture_output=True, text=True
        )
        lines = [line.split(maxsplit=2) for line in symbols.stdout.splitlines()]
        shared = [
            name for _, kind, name in lines if kind in "WVu" and f"qgraph::{kernels.name}::" not in name
        ]
        assert shared == []

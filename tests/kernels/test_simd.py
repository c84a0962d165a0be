"""The vector functions of every instruction set: lanes.cpp, compiled and run; NEON under an emulator."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import qgraph.kernels

HERE = Path(__file__).parent
SOURCE = Path(qgraph.kernels.__file__).parent / "source"
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
FLAGS = {"avx512": AVX512, "avx2": ["-mavx2", "-mfma", "-mf16c"], "portable": [], "neon": []}
MAIN = """
#include <cstdio>
namespace qgraph::SET { void check_lanes(int& passed, int& failed); }
int main() {
  int passed = 0, failed = 0;
  qgraph::SET::check_lanes(passed, failed);
  std::printf("%d passed, %d failed\\n", passed, failed);
}
"""


@pytest.mark.parametrize("name", FLAGS)
def test_lanes(name, request, tmp_path):
    compiler, runner = "g++", []
    if name == "neon":
        compiler, runner = "aarch64-linux-gnu-g++", ["qemu-aarch64"]
    elif name not in request.getfixturevalue("native").instruction_sets():
        pytest.skip(f"this CPU has no {name}")
    if not all(map(shutil.which, [compiler, *runner])):
        pytest.skip(f"needs {' and '.join([compiler, *runner])}")
    (tmp_path / "main.cpp").write_text(MAIN)
    program = str(tmp_path / "lanes")
    options = [f"-DSET={name}", f"-DQGRAPH_ISA={name}", f'-DQGRAPH_SIMD="simd/{name}.h"', f"-I{SOURCE}"]
    options += ["-std=c++20", "-O1", "-static", "-ffp-contract=off", "-fno-strict-aliasing", *FLAGS[name]]
    files = [str(HERE / "lanes.cpp"), str(tmp_path / "main.cpp")]
    subprocess.run([compiler, *options, *files, "-o", program], check=True)
    said = subprocess.run([*runner, program], check=True, capture_output=True, text=True).stdout
    passed, failed = map(int, re.findall(r"\d+", said))
    assert passed > 10_000
    assert failed == 0, said

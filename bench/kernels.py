"""The native kernels alone, against what one thread of this CPU can do at most and against MLX.

    python bench/kernels.py

Quantized products of 4-bit weights in groups of 64, on one thread; the best of many calls. One row of
activations is set against the speed at which the same bytes can be read, many rows against the peak of fused
multiply-adds; both limits are measured here by limits.cpp (with g++ and -march=native).
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from time import perf_counter

import mlx.core as mx

from qgraph import kernels

SCHEME = {"group_size": 64, "bits": 4, "mode": "affine"}


def best(make, seconds=0.7):
    mx.eval(make())
    found, until = float("inf"), perf_counter() + seconds
    while perf_counter() < until:
        y = make()
        start = perf_counter()
        mx.eval(y)
        found = min(found, perf_counter() - start)
    return found


def limits(folder):
    program = Path(folder) / "limits"
    source = Path(__file__).with_name("limits.cpp")
    command = ["g++", "-O3", "-march=native", "-std=c++17", "-w", str(source), "-o", str(program)]
    subprocess.run(command, check=True)
    return lambda *arguments: float(
        subprocess.run([program, *map(str, arguments)], capture_output=True).stdout
    )


def main():
    library = kernels.library()
    if library is None:
        raise SystemExit("there are no native kernels: see `qgraph doctor`")
    library.set_threads(1)
    print(f"{library.instruction_set()}, 1 thread")
    with tempfile.TemporaryDirectory() as folder:
        limit = limits(folder)
        for n, k, rows in ((2048, 2048, 1), (151936, 1024, 1), (2048, 2048, 128), (3072, 1024, 512)):
            for dtype in (mx.float32, mx.bfloat16):
                w = mx.quantize(mx.random.normal((n, k)).astype(dtype), group_size=64, bits=4)
                x = mx.random.normal((rows, k)).astype(dtype)
                mx.eval(w, x)
                report(library, limit, w, x)


def report(library, limit, w, x):
    rows, (n, k) = x.shape[0], (w[0].shape[0], x.shape[1])
    size = sum(part.nbytes for part in w)
    peak = limit("read", size) if rows == 1 else limit("fma")
    row = f"{str(x.dtype).removeprefix('mlx.core.'):>9} {rows:>4} × {k} × {n:<7}"
    for mode in ("", "int8"):
        how = {**SCHEME, "transpose": True, "activations": mode}
        taken = best(lambda how=how: library.quantized_matmul(x, *w, None, **how))
        rate = size / taken / 1e9 if rows == 1 else 2 * rows * n * k / taken / 1e9
        unit = "GB/s" if rows == 1 else "GF/s"
        row += f"  {mode or 'exact'} {taken * 1e3:7.3f} ms {rate:6.1f} {unit} {100 * rate / peak:4.0f} %"
    print(f"{row}  of {peak:.1f}", flush=True)


if __name__ == "__main__":
    main()

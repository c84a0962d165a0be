"""The error of quantized products on a CPU: native kernels, MLX's own, and int8 activations.

    python bench/accuracy.py

Relative root-mean-square error against float64 on the dequantized weights (scales and biases as stored, in
the dtype of the activations), 4 bits in groups of 64, x and w normal. The rounding of the result counts.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from qgraph import kernels

M, N = 8, 256
SCHEME = {"group_size": 64, "bits": 4, "mode": "affine"}


def error(y, reference):
    y = np.array(y.astype(mx.float32)).astype(np.float64)
    return np.sqrt(np.square(y - reference).mean() / np.square(reference).mean())


def main():
    library = kernels.library()
    if library is None:
        raise SystemExit("there are no native kernels: see `qgraph doctor`")
    print(f"{'':>18}{'native':>12}{'MLX':>12}{'int8':>12}   {library.instruction_set()}")
    for dtype in (mx.float32, mx.bfloat16, mx.float16):
        for k in (1024, 4096, 16384):
            w = (mx.random.normal((N, k), key=mx.random.key(k)) * k**-0.5).astype(dtype)
            x = mx.random.normal((M, k), key=mx.random.key(k + 1)).astype(dtype)
            packed, scales, biases = mx.quantize(w, group_size=64, bits=4)
            wide = mx.dequantize(packed, scales.astype(mx.float32), biases.astype(mx.float32), 64, 4)
            reference = np.array(x.astype(mx.float32), np.float64) @ np.array(wide, np.float64).T
            arguments = (x, packed, scales, biases)
            found = (
                library.quantized_matmul(*arguments, None, transpose=True, **SCHEME),
                mx.quantized_matmul(*arguments, transpose=True, **SCHEME),
                library.quantized_matmul(*arguments, None, transpose=True, **SCHEME, activations="int8"),
            )
            name = str(dtype).removeprefix("mlx.core.")
            print(f"{name:>10} {k:>7}" + "".join(f"{error(y, reference):>12.1e}" for y in found))


if __name__ == "__main__":
    main()

"""A product of many rows with a packed weight on a CPU: the weight is unpacked tile by tile.

MLX's CPU kernel unpacks every weight again for every row of x. From some rows on it is faster to unpack a
tile once and to give it to the BLAS, turned so that its inner loops run along memory; the sums are of the
same terms in the same order. What is unpacked at any time is a few tiles, never the weight.
"""

from __future__ import annotations

from math import prod

import mlx.core as mx

from qgraph.ir.dtypes import F32
from qgraph.ir.types import TensorType

FUNCTION = "tiled_matmul"  # what it is called in programs
ROWS = 16  # of x: from here on it is faster
PRODUCTS = 2**20  # of numbers: below, the calls cost more than they gain
TILE = 2**18  # numbers of a tile
TILES = 64  # of one weight at most, so that a large one does not become thousands of calls


def gains(x: TensorType, w: TensorType) -> bool:
    """Whether tiles are faster for ``x @ w.T``, given that the kernel's result is f32."""
    if w.quantization is None or w.quantization.mode != "affine" or w.ndim != 2 or x.dtype is not F32:
        return False
    rows = prod(x.shape[:-1])
    return rows >= ROWS and rows * w.size >= PRODUCTS


def tiled_matmul(
    x: mx.array, packed: mx.array, scales: mx.array, biases: mx.array, *, group_size: int, bits: int
) -> mx.array:
    """``x @ w.T`` in f32 for a packed w of the shape (n, k)."""
    k, n = x.shape[-1], packed.shape[0]
    columns = mx.contiguous(mx.transpose(mx.reshape(x, (-1, k))))
    step = max(1, TILE // k, -(-n // TILES))
    scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    parts = [
        mx.dequantize(packed[i : i + step], scales[i : i + step], biases[i : i + step], group_size, bits)
        @ columns
        for i in range(0, n, step)
    ]
    out = parts[0] if len(parts) == 1 else mx.concatenate(parts, 0)
    return mx.reshape(mx.transpose(out), (*x.shape[:-1], n))

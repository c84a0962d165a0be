"""The NumPy model of every quantization scheme against `mx.quantize` and `mx.dequantize`."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from qgraph.ir.dtypes import F32
from qgraph.numeric import tolerance
from qgraph.ops.formats import E2M1, e2m1, e4m3, e8m0, round_to_grid
from qgraph.quant import Quantization

AFFINE = [Quantization(bits=b, group_size=g) for b in (1, 2, 3, 4, 5, 6, 8) for g in (32, 64, 128)]
FLOATING = [Quantization.of_mode(m) for m in ("mxfp4", "mxfp8", "nvfp4")]
RNG = np.random.default_rng(0)
DATA = {
    "normal": RNG.normal(size=(16, 256)),
    "positive": RNG.uniform(0.1, 1, size=(16, 256)),
    "negative": -RNG.uniform(0.1, 1, size=(16, 256)),
    "wide": RNG.normal(size=(16, 256)) * np.exp(4 * RNG.normal(size=(16, 256))),
    "ties": RNG.integers(-24, 25, size=(16, 256)) / 4,
    "powers": 2.0 ** RNG.integers(-20, 20, size=(16, 256)),
    "tiny": RNG.normal(size=(16, 256)) * 1e-30,
    "zeros": np.zeros((2, 256)),
    "constant": np.full((2, 256), -3.7),
}


def through_mlx(x, q, global_scale=None):
    arguments = (q.group_size, q.bits, q.mode)
    scale = {} if global_scale is None else {"global_scale": mx.array(global_scale, mx.float32)}
    packed, scales, *biases = mx.quantize(mx.array(x), *arguments, **scale)
    bias = biases[0] if biases else None
    return np.array(mx.dequantize(packed, scales, bias, *arguments, dtype=mx.float32, **scale))


def agree(x, q, global_scale=None):
    x = x.astype(np.float32)
    found, model = through_mlx(x, q, global_scale), round_to_grid(x.astype(np.float64), q, global_scale)
    largest = np.abs(x.reshape(*x.shape[:-1], -1, q.group_size)).max(-1, keepdims=True)
    magnitude = np.broadcast_to(largest, (*largest.shape[:-1], q.group_size)).reshape(x.shape)
    return tolerance(F32).allows(found, model, magnitude)


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("q", [*AFFINE, *FLOATING], ids=str)
def test_the_model_is_what_mlx_does(q, kind):
    assert np.all(agree(DATA[kind], q))


@pytest.mark.parametrize("kind", ["normal", "positive", "wide", "zeros"])
@pytest.mark.parametrize("scale", [3.0, "max"])
def test_the_model_is_what_mlx_does_with_a_global_scale(kind, scale):
    x = DATA[kind]
    near = agree(x, Quantization.of_mode("nvfp4"), float(np.abs(x).max() or 1) if scale == "max" else scale)
    # A number halfway between two of the grid goes either way.
    assert np.mean(near) > 0.99


@pytest.mark.parametrize("q", [*AFFINE, *FLOATING], ids=str)
def test_zero_and_the_largest_number_stay(q):
    x = RNG.normal(size=(4, 256))
    x[:, ::7] = 0
    out = round_to_grid(x, q)
    if q.bits > 1:
        small = np.abs(x).reshape(4, -1, q.group_size).max(-1).max() / 2**q.bits
        assert np.all(np.abs(out[:, ::7]) <= small)
    if q.mode == "affine":
        groups, moved = (y.reshape(4, -1, q.group_size) for y in (x.astype(np.float32), out))
        at = np.abs(groups).argmax(-1)[..., None]
        kept = tolerance(F32).allows(np.take_along_axis(moved, at, -1), np.take_along_axis(groups, at, -1))
        assert np.all(kept)


def test_the_grids_of_small_floats():
    grid = np.concatenate([-E2M1[::-1], E2M1])
    assert np.array_equal(e2m1(grid), grid)
    assert e2m1(np.array([100.0])) == 6
    codes = mx.arange(256).astype(mx.uint8)
    numbers = np.array(mx.from_fp8(codes, mx.float32), np.float64)
    numbers = numbers[np.isfinite(numbers)]
    assert np.array_equal(e4m3(numbers), numbers)
    x = RNG.normal(size=4096) * 100
    assert np.array_equal(
        e4m3(x.astype(np.float32)), np.array(mx.from_fp8(mx.to_fp8(mx.array(x)), mx.float32))
    )
    assert np.array_equal(e8m0(np.array([1.0, 1.01, 0.5, 3.0])), [1, 2, 0.5, 4])

"""research/mlx.md §5, cases 1–5, 26 and 39: packing, strides and dtypes."""

from __future__ import annotations

import itertools

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from qgraph.execute.reference import to_numpy
from qgraph.ir.dtypes import dtype_of
from tests.agree import assert_close, normal
from tests.conformance.oracle import (
    AFFINE,
    E2M1,
    MODES,
    SCHEMES,
    assert_product,
    by_hand,
    e4m3,
    kernel,
    largest_terms,
    of,
    quantized,
    raw,
)

PAIRS = [*itertools.product([mx.float32, mx.float16, mx.bfloat16], repeat=2)]


@pytest.mark.parametrize("scheme", AFFINE, ids=str)
def test_m01_no_number_moves_by_more_than_a_step_of_its_group(scheme):
    w, (_, bits, group) = normal(128, 512), scheme
    packed = qg.quantize(w, bits=bits, group_size=group)
    steps = np.repeat(np.abs(to_numpy(packed.scales)), group, axis=-1)
    excess = np.maximum(np.abs(to_numpy(w) - to_numpy(packed)) - steps, 0)
    assert_close(excess, np.zeros_like(excess), path="P1", magnitude=largest_terms(packed))
    assert_close(qg.dequantize(packed), by_hand(packed), path="P1", magnitude=largest_terms(packed))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_m02_zeros_stay_zero(scheme):
    mode, bits, group = scheme
    w = mx.zeros((256, 512))
    packed = qg.quantize(w, mode=mode, bits=bits, group_size=group)
    assert mx.array_equal(qg.dequantize(packed), w)
    x = normal(3, 512)
    assert mx.array_equal(qg.dot(x, packed.T), mx.zeros((3, 256)))
    half = mx.where(mx.arange(512) < 256, w, normal(256, 512))  # groups of zeros beside others
    packed = qg.quantize(half, mode=mode, bits=bits, group_size=group)
    assert mx.array_equal(qg.dequantize(packed)[:, :256], w[:, :256])


def on_the_grid(rows, group, scale=1.0):
    """Numbers of the 4-bit grid times `scale`, every group with the largest of them."""
    numbers = np.tile(E2M1, (rows, 4))[:, : 64 // group * group]
    return mx.array((numbers * scale).astype(np.float32))


@pytest.mark.parametrize(("mode", "group"), [("mxfp4", 32), ("nvfp4", 16)])
@pytest.mark.parametrize("scale", [1.0, 0.25, 8.0])
def test_m03_numbers_of_the_grid_are_exact(mode, group, scale):
    w = on_the_grid(4, group, scale)
    packed = qg.quantize(w, mode=mode)
    assert mx.array_equal(qg.dequantize(packed), w)
    assert mx.array_equal(qg.jit(lambda x, w: x @ w)(mx.eye(4), packed), w)


def test_m03_mxfp8_takes_the_nearest():
    w = on_the_grid(4, 32)
    packed = qg.quantize(w, mode="mxfp8")
    steps = np.repeat(np.exp2(np.array(packed.scales).astype(np.int64) - 127.0), 32, axis=-1)
    grid = e4m3([b for b in range(256) if b & 127 != 127])
    nearest = np.abs(to_numpy(w)[..., None] - steps[..., None] * grid).min(-1)
    found = np.abs(to_numpy(w) - to_numpy(packed))
    assert_close(found, nearest, path="elementwise", magnitude=np.abs(to_numpy(w)))


@pytest.mark.parametrize("largest", [6.0, 0.75, 1000.0])
def test_m03_nvfp4_with_a_global_scale(largest):
    """The largest magnitude as the global scale makes the grid exact, but for float32's rounding."""
    w = on_the_grid(4, 16, largest / 6)
    packed = qg.quantize(w, mode="nvfp4", global_scale=mx.array(largest))
    assert_close(qg.dequantize(packed), to_numpy(w), path="elementwise")
    for run in (qg.jit(lambda x, w: x @ w.T), lambda x, w: qg.dot(x, w.T)):
        assert_product(run(normal(3, 64), packed), normal(3, 64), packed)


def test_m04_nvfp4_rows_of_alternating_magnitude():
    sizes = np.where(np.arange(64) % 2, 2.0**-6, 2.0**5)[:, None]
    w = mx.array((E2M1 * sizes).astype(np.float32))
    packed = qg.quantize(w, mode="nvfp4")
    assert packed.shape == (64, 16)
    assert mx.array_equal(qg.dequantize(packed), w)
    assert_product(qg.dot(normal(3, 16), packed.T), normal(3, 16), packed)


LAYOUTS = {
    "every second row": lambda a: mx.repeat(a, 2, 0)[::2],
    "every second column": lambda a: mx.repeat(a, 2, -1)[..., ::2],
    "reversed rows": lambda a: mx.contiguous(a[::-1])[::-1],
    "reversed columns": lambda a: mx.contiguous(a[..., ::-1])[..., ::-1],
    "column-major": lambda a: mx.contiguous(a.swapaxes(-1, -2)).swapaxes(-1, -2),
    "behind an offset": lambda a: mx.concatenate([a, a])[a.shape[0] :],
    "within wider rows": lambda a: mx.concatenate([a, a], -1)[..., : a.shape[-1]],
    "plain": lambda a: a,
}
BROADCAST = {
    "rows": lambda a: mx.broadcast_to(a[:1], a.shape),
    "all": lambda a: mx.broadcast_to(a[:1, :1], a.shape),
}


@pytest.mark.parametrize("words", LAYOUTS)
@pytest.mark.parametrize("scales", LAYOUTS)
@pytest.mark.parametrize("scheme", MODES, ids=str)
def test_m05_strided_parts_equal_contiguous_ones(words, scales, scheme):
    w = of(scheme, 8, 128)
    parts, names = raw(w)
    change = (LAYOUTS[words], LAYOUTS[scales], LAYOUTS[scales])
    strided = [None if a is None else f(a) for f, a in zip(change, parts, strict=True)]
    v = qg.from_quantized(*strided, **names, dtype=mx.float32)
    assert_same_value(v, w)


@pytest.mark.parametrize("how", BROADCAST)
@pytest.mark.parametrize("scheme", MODES, ids=str)
def test_m05_broadcast_parts_equal_contiguous_ones(how, scheme):
    packed, scales, biases = raw(of(scheme, 8, 128))[0]
    _, names = raw(of(scheme, 8, 128))
    for parts in ((packed, scales, biases), (BROADCAST[how](packed), scales, biases)):
        repeated = [None if a is None else BROADCAST[how](a) for a in parts[1:]]
        copied = [None if a is None else mx.array(np.array(a)) for a in (parts[0], *repeated)]
        v = qg.from_quantized(parts[0], *repeated, **names, dtype=mx.float32)
        assert_same_value(v, qg.from_quantized(*copied, **names, dtype=mx.float32))


def assert_same_value(v, w):
    """Equal numbers, products both ways, and rows."""
    assert mx.array_equal(qg.dequantize(v), qg.dequantize(w))
    assert mx.array_equal(qg.take(v, mx.array([5, 0, 5]), axis=0), qg.dequantize(w)[mx.array([5, 0, 5])])
    assert_product(qg.dot(normal(4, 128), v.T), normal(4, 128), w)
    assert_product(qg.dot(normal(4, 8), v), normal(4, 8), w, transpose=False)


@pytest.mark.parametrize("layout", [*LAYOUTS, *BROADCAST])
@pytest.mark.parametrize("scheme", MODES, ids=str)
def test_m05_strided_and_repeated_activations(layout, scheme):
    change = (LAYOUTS | BROADCAST)[layout]
    w = of(scheme, 128, 128)
    for shape in ((4, 128), (2, 3, 128)):
        x = change(normal(*shape))
        for transpose in (True, False):
            f = qg.jit(strict=True)(lambda x, w, t=transpose: x @ (w.T if t else w))
            assert_product(f(x, w), x, w, transpose)
            assert_product(qg.dot(x, w.T if transpose else w), x, w, transpose)


@pytest.mark.parametrize(("x", "scales"), PAIRS)
@pytest.mark.parametrize("mode", ["affine", "mxfp4", "mxfp8", "nvfp4"])
def test_m26_the_dtype_and_the_numbers_for_every_pair_of_dtypes(mode, x, scales):
    xs, w = normal(3, 64, dtype=x), quantized(32, 64, mode=mode, dtype=scales)
    dense = xs @ qg.dequantize(w).T
    for found in (qg.jit(lambda x, w: x @ w.T)(xs, w), qg.dot(xs, w.T)):
        assert found.dtype == dense.dtype
        assert_product(found, xs, w)
    bare = qg.jit(qg.quantized_matmul)(xs, w)
    assert bare.dtype == kernel(xs, w).dtype
    assert_product(bare, xs, w)


@pytest.mark.parametrize(("x", "scales"), PAIRS)
@pytest.mark.parametrize("logical", [mx.float32, mx.float16, mx.bfloat16])
def test_m26_the_logical_dtype_decides_and_not_that_of_the_scales(logical, x, scales):
    """A weight that was cast keeps its scales; its product has the dtype of the dense one."""
    xs, w = normal(3, 64, dtype=x), quantized(32, 64, dtype=scales).astype(logical)
    for f, turn in ((lambda x, w: qg.dot(x, w.T), True), (lambda x, w: qg.dot(x[:, :32], w), False)):
        for run in (qg.jit(strict=True)(f), f):
            found = run(xs, w)
            assert found.dtype == (mx.zeros(1, x) + mx.zeros(1, logical)).dtype
            assert_product(found, xs if turn else xs[:, :32], w, turn)
    left = qg.dot(w, xs.T)
    assert left.dtype == (mx.zeros(1, x) + mx.zeros(1, logical)).dtype
    assert_product(left.T, xs, w)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("k", [512, 2048, 8192])
@pytest.mark.parametrize("scheme", MODES, ids=str)
def test_m39_sixteen_bits_on_a_cpu_round_once(dtype, k, scheme):
    """MLX's own kernel there is off by 2.9 to 8.9 per cent: it adds in 16 bit."""
    x, w = normal(2, k, dtype=dtype), of(scheme, 24, k, dtype=dtype)
    exact = to_numpy(x) @ to_numpy(w).T
    for found in (qg.jit(lambda x, w: x @ w.T)(x, w), qg.dot(x, w.T), qg.quantized_matmul(x, w)):
        assert found.dtype == dtype
        assert_product(found, x, w)
        rms = np.linalg.norm(to_numpy(found) - exact) / np.linalg.norm(exact)
        assert rms <= dtype_of(dtype).unit_roundoff / 3**0.5  # of errors spread evenly over ±u


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_m39_exact_sums_of_ones(dtype):
    w, ones = qg.quantize(mx.ones((8, 2048), dtype)), mx.ones((2, 2048), dtype)
    for found in (qg.jit(lambda x, w: x @ w.T)(ones, w), qg.dot(w, ones.T), qg.dot(ones[0], w.T)):
        assert mx.all(found == 2048).item()

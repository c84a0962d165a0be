"""research/mlx.md §5, cases 6–18: the grid of quantized products, each against float64."""

from __future__ import annotations

from itertools import product

import mlx.core as mx
import pytest

import qgraph as qg
from tests.agree import assert_close, magnitude_of, normal
from tests.conformance.oracle import GROUPS, MICROSCALED, MODES, assert_product, of, quantized

OF_BITS = [("affine", bits, group) for bits, group in product((2, 3, 4, 5, 6, 8), GROUPS)]


def check(x, w, transpose=True):
    """The product in a program that must not unpack the weight, scaled as in MLX's tests."""
    x = x * x.shape[-1] ** -0.5
    f = qg.jit(strict=True)(lambda x, w: x @ (qg.swapaxes(w, -1, -2) if transpose else w))
    assert_product(f(x, w), x, w, transpose, about=(x.shape, w, transpose))


def stacked(batch, *shape):
    """The shape of `batch` matrices; of one alone for 0."""
    return (batch, *shape) if batch else shape


@pytest.mark.parametrize(("bits", "group"), [*product((2, 4, 8), GROUPS)])
@pytest.mark.parametrize("transpose", [True, False])
def test_m06_the_grid_of_products(bits, group, transpose):
    for n, k in product((128, 256), repeat=2):
        w = of(("affine", bits, group), n, k)
        for rows in (8, 32, 33, 64):
            check(normal(rows, k if transpose else n), w, transpose)


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "n"), [(16, 32840), (32, 32840), (33, 32840), (33000, 64)])
def test_m07_many_rows_and_many_outputs(rows, n):
    check(normal(rows, 128), quantized(n, 128))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [*MODES, ("affine", 4, 128), ("affine", 8, 64)], ids=str)
def test_m08_stored_in_out_with_rows_around_the_tiles(scheme):
    w = of(scheme, 512, 1024)
    for rows in (1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129):
        check(normal(rows, 512), w, transpose=False)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "k", "rows"), [(2048, 2048, 100), (512, 2048, 256), (2048, 512, 256)])
def test_m09_shapes_of_transformers(n, k, rows):
    check(normal(rows, k), quantized(n, k))


@pytest.mark.slow
def test_m09_the_widest_shape_of_transformers():
    check(normal(100, 2048), quantized(11008, 2048))


@pytest.mark.parametrize("lead", [(2,), (2, 3), (1, 2, 3)])
@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("scheme", MODES, ids=str)
def test_m10_batched_activations(lead, transpose, scheme):
    check(normal(*lead, 4, 128), of(scheme, 128, 128), transpose)


@pytest.mark.parametrize("scheme", MODES, ids=str)
def test_m11_short_sums_and_rows_around_the_tiles(scheme):
    for k, rows in product((64, 128, 256), (8, 33, 65)):
        check(normal(rows, k), of(scheme, 128, k))


@pytest.mark.parametrize("shape", [(3, 256), (2, 1, 7, 256), (256,), (1, 256), (2, 1, 1, 7, 256)])
@pytest.mark.parametrize("scheme", MODES, ids=str)
def test_m12_activations_of_every_rank(shape, scheme):
    check(normal(*shape), of(scheme, 128, 256))
    check(normal(*shape), of(scheme, 256, 128), transpose=False)


@pytest.mark.parametrize("scheme", OF_BITS, ids=str)
def test_m13_one_row_by_a_weight_or_a_batch_of_weights(scheme):
    for n, k, batch in product((256, 512, 67), (64, 256), (0, 1, 3, 8)):
        if k >= scheme[2]:
            check(normal(*stacked(batch, 1, k)), of(scheme, *stacked(batch, n, k)))


@pytest.mark.parametrize("scheme", MICROSCALED, ids=str)
def test_m14_one_row_in_the_microscaled_modes(scheme):
    for n, batch in product((256, 512, 67, 5, 7), (0, 3)):
        check(normal(*stacked(batch, 1, 256)), of(scheme, *stacked(batch, n, 256)))


@pytest.mark.parametrize("n", [256, 67, 5, 1])
@pytest.mark.parametrize("k", [16, 48, 80])
def test_m14_nvfp4_with_an_odd_number_of_groups(n, k):
    w = quantized(n, k, mode="nvfp4")
    check(normal(1, k), w)
    check(normal(3, k), w)
    assert_product(qg.dot(normal(2, n), w), normal(2, n), w, transpose=False)
    assert mx.array_equal(qg.take(w, mx.array(0), axis=0), qg.dequantize(w)[0])


@pytest.mark.parametrize("scheme", MODES, ids=str)
def test_m15_a_few_rows(scheme):
    for rows, n, batch in product((2, 3, 4, 5, 6, 7, 9), (256, 67), (1, 3)):
        check(normal(batch, rows, 128), of(scheme, batch, n, 128))


@pytest.mark.parametrize(("rows", "k", "n"), [(2, 32, 10), (4, 32, 7), (3, 64, 5), (5, 64, 3), (1, 32, 3)])
def test_m16_tiny_products(rows, k, n):
    for mode, group in (("affine", 32), ("mxfp4", 32), ("mxfp8", 32), ("nvfp4", 16)):
        check(normal(rows, k), quantized(n, k, mode=mode, group_size=group))


@pytest.mark.parametrize("scheme", OF_BITS, ids=str)
def test_m17_one_row_by_a_weight_stored_in_out(scheme):
    for n, k, batch in product((32, 128, 256), (128, 256, 67), (0, 1, 3, 8)):
        if n >= scheme[2]:
            check(normal(*stacked(batch, 1, k)), of(scheme, *stacked(batch, k, n)), transpose=False)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", MODES, ids=str)
def test_m17_a_long_sum_and_few_rows(scheme):
    w = of(scheme, 16384, 128)
    for rows in (1, 2, 3):
        check(normal(rows, 16384), w, transpose=False)
    check(normal(2, 16384), of(scheme, 8, 16384))


@pytest.mark.parametrize("shape", [(8, 256), (1, 8, 256), (3, 8, 256), (33, 256), (3, 256), (99, 256)])
@pytest.mark.parametrize("scheme", MODES, ids=str)
def test_m18_small_and_odd_weights(shape, scheme):
    """A weight of rank 3 meets x of rank 2 here, which MLX's kernel gets wrong."""
    w = of(scheme, *shape)
    check(normal(129, 256), w)
    check(normal(3, shape[-2]), w, transpose=False)


@pytest.mark.parametrize("shape", [(8, 256), (3, 8, 256)])
def test_m18_small_and_odd_weights_on_the_left(shape):
    w, x = quantized(*shape), normal(256, 3)
    f = qg.jit(strict=True)(lambda w, x: w @ x)
    exact = qg.dequantize(w) @ x
    magnitude = magnitude_of(x.T, w).swapaxes(-1, -2)
    assert_close(f(w, x), exact, k=256, path="P2", magnitude=magnitude)

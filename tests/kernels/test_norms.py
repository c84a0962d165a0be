"""rms_norm, layer_norm and softmax: against float64, in every layout, dtype and instruction set."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph.ir.dtypes import F16
from qgraph.numeric import tolerance
from tests.agree import assert_close
from tests.kernels.layouts import DTYPES, LAYOUTS, everywhere, exactly, laid_out

EPS = 1e-5
COLUMNS = st.one_of(st.integers(1, 20), st.integers(21, 150), st.sampled_from([256, 1024, 1031]))
SHAPES = st.builds(lambda rows, n: (*rows, n), st.lists(st.integers(1, 4), max_size=6), COLUMNS)
DTYPE = st.sampled_from(DTYPES)


def random(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def rms_norm(x, w):
    """The exact result, and what its error is relative to."""
    y = x / np.sqrt(np.mean(x * x, -1, keepdims=True) + EPS) * w
    return y, np.abs(y)


def layer_norm(x, w, b):
    mean = np.mean(x, -1, keepdims=True)
    scale = 1 / np.sqrt(np.mean((x - mean) ** 2, -1, keepdims=True) + EPS)
    size = (np.abs(x) + np.mean(np.abs(x), -1, keepdims=True)) * scale * np.abs(w) + np.abs(b)
    return (x - mean) * scale * w + b, size


def softmax(x):
    low = x - np.max(x, -1, keepdims=True)
    y = np.exp(low) / np.sum(np.exp(low), -1, keepdims=True)
    return y, y * (1 + np.abs(low))


def check(native, call, expected, about=()):
    exact, size = expected
    k = exact.shape[-1]
    for name, found in everywhere(native, call):
        bound = size + _least(k, found.dtype)
        assert_close(found, exact, k=k, path="P2", magnitude=bound, about=(name, *about))


def _least(k, dtype):
    """The magnitude at which tolerances allow the rounding of a subnormal, half of the distance of two."""
    allowed = tolerance(F16, k, "P2")
    half = 2.0**-25 if dtype == mx.float16 else 2.0**-134
    return half * max(1 / allowed.terms, np.sqrt(k) / allowed.frobenius)


@settings(deadline=None, max_examples=60)
@given(SHAPES, DTYPE, DTYPE, st.sampled_from(LAYOUTS), st.booleans(), st.integers(0, 99))
def test_rms_norm(native, shape, dtype, weight_dtype, layout, weighted, seed):
    x = laid_out(random(seed, *shape), layout, dtype)
    w = laid_out(random(seed + 1, shape[-1]), "plain", weight_dtype) if weighted else None
    y = native.rms_norm(x, w, EPS)
    assert (y.shape, y.dtype) == (x.shape, mx.fast.rms_norm(x, w, EPS).dtype)
    expected = rms_norm(exactly(x), exactly(w) if weighted else 1.0)
    check(native, lambda: native.rms_norm(x, w, EPS), expected, (shape, layout))


@settings(deadline=None, max_examples=60)
@given(
    SHAPES, DTYPE, DTYPE, DTYPE, st.sampled_from(LAYOUTS), st.booleans(), st.booleans(), st.integers(0, 99)
)
def test_layer_norm(native, shape, dtype, weight_dtype, bias_dtype, layout, weighted, biased, seed):
    x = laid_out(random(seed, *shape) + 1, layout, dtype)
    w = laid_out(random(seed + 1, shape[-1]), "plain", weight_dtype) if weighted else None
    b = laid_out(random(seed + 2, shape[-1]), "plain", bias_dtype) if biased else None
    y = native.layer_norm(x, w, b, EPS)
    assert (y.shape, y.dtype) == (x.shape, mx.fast.layer_norm(x, w, b, EPS).dtype)
    bias = b if weighted or b is None else b.astype(dtype)
    parameters = (exactly(w) if weighted else 1.0, exactly(bias) if biased else 0.0)
    check(
        native, lambda: native.layer_norm(x, w, b, EPS), layer_norm(exactly(x), *parameters), (shape, layout)
    )


@settings(deadline=None, max_examples=60)
@given(SHAPES, DTYPE, st.sampled_from(LAYOUTS), st.sampled_from([1.0, 20.0]), st.integers(0, 99))
def test_softmax(native, shape, dtype, layout, spread, seed):
    x = laid_out(random(seed, *shape) * spread, layout, dtype)
    y = native.softmax(x)
    assert (y.shape, y.dtype) == (x.shape, dtype)
    check(native, lambda: native.softmax(x), softmax(exactly(x)), (shape, layout))


@pytest.mark.parametrize("shape", [(1, 151936), (300, 257), (3, 40000)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_rows_and_many_rows(native, shape, dtype):
    x = laid_out(random(3, *shape), "plain", dtype)
    w = laid_out(random(4, shape[-1]), "plain", dtype)
    check(native, lambda: native.rms_norm(x, w, EPS), rms_norm(exactly(x), exactly(w)))
    check(native, lambda: native.layer_norm(x, w, w, EPS), layer_norm(exactly(x), exactly(w), exactly(w)))
    check(native, lambda: native.softmax(x), softmax(exactly(x)))


def test_more_axes_than_a_kernel_counts(native):
    x = laid_out(random(5, 2, 3, 2, 3, 2, 3, 9), "sliced")
    check(native, lambda: native.softmax(x), softmax(exactly(x)))


def test_parameters_that_are_views(native):
    x, w, b = (laid_out(random(i, *shape), "strided") for i, shape in enumerate([(3, 33), (33,), (33,)]))
    check(native, lambda: native.layer_norm(x, w, b, EPS), layer_norm(exactly(x), exactly(w), exactly(b)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax_of_infinities_and_nans(native, dtype):
    inf, nan = np.inf, np.nan
    rows = [[-inf] * 3, [0, inf, 1], [nan, 1, 2], [1, 2, nan], [-inf, 0, 0], [0, -inf, -inf], [-200, 0, -1e4]]
    wide = np.array([row * 7 for row in rows], np.float32)
    for values in (np.array(rows, np.float32), wide):
        x = mx.array(values).astype(dtype)
        with np.errstate(invalid="ignore"):
            exact = softmax(exactly(x))[0]
        for name, found in everywhere(native, lambda x=x: native.softmax(x)):
            assert_close(found, exact, k=values.shape[1], path="P2", magnitude=1.0, about=name)


def test_norms_keep_a_nan_and_an_infinity_to_their_row(native):
    values = random(6, 3, 37)
    values[0, 5], values[1, 36] = np.nan, np.inf
    for norm in (lambda x: native.rms_norm(x, None, EPS), lambda x: native.layer_norm(x, None, None, EPS)):
        for _, y in everywhere(native, lambda norm=norm: norm(mx.array(values))):
            found = exactly(y)
            assert np.isnan([*found[0], found[1, 36]]).all()
            assert np.isfinite(found[2]).all()


def test_the_result_may_lie_where_x_lay(native):
    def chain(x):
        return native.softmax(native.layer_norm(native.rms_norm(x + 1, None, EPS), None, None, EPS) * 2)

    x = mx.array(random(7, 5, 70))
    y = rms_norm(exactly(x + 1), 1.0)[0]
    exact = softmax(layer_norm(y, 1.0, 0.0)[0] * 2)[0]
    for name, found in everywhere(native, lambda: chain(x)):
        assert_close(found, exact, about=name)
    assert_close(x, random(7, 5, 70))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 4)])
def test_nothing_to_do(native, shape):
    x, w = mx.zeros(shape), mx.zeros(shape[-1:])
    for y in (native.rms_norm(x, w, EPS), native.layer_norm(x, w, w, EPS), native.softmax(x)):
        mx.eval(y)
        assert y.shape == shape


def test_gradients_are_those_of_mlx(native):
    x, w, b, c = (mx.array(random(i, *shape)) for i, shape in enumerate([(3, 17), (17,), (17,), (3, 17)]))
    pairs = [
        (lambda x, w, b: native.rms_norm(x, w, EPS), lambda x, w, b: mx.fast.rms_norm(x, w, EPS)),
        (lambda x, w, b: native.layer_norm(x, w, b, EPS), lambda x, w, b: mx.fast.layer_norm(x, w, b, EPS)),
        (lambda x, w, b: native.softmax(x * w + b), lambda x, w, b: mx.softmax(x * w + b, -1)),
    ]
    for pair in pairs:
        for transform, tangents in ((mx.vjp, [c]), (mx.jvp, [c, w * 2, b * 3])):
            found, expected = (transform(f, [x, w, b], tangents)[1] for f in pair)
            for p, q in zip(found, expected, strict=True):
                assert_close(p, exactly(q))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_have_the_dtypes_of_what_they_are_of(native, dtype):
    x, w = mx.array(random(1, 3, 17)).astype(dtype), mx.array(random(2, 17)).astype(mx.float16)
    dx, dw = mx.grad(lambda x, w: native.rms_norm(x, w, EPS).astype(mx.float32).sum(), argnums=[0, 1])(x, w)
    assert (dx.dtype, dw.dtype) == (dtype, mx.float16)


def test_vmap_and_compile(native):
    x, w = mx.array(random(1, 4, 3, 17)), mx.array(random(2, 17))
    exact = rms_norm(exactly(x), exactly(w))[0]
    assert_close(mx.vmap(lambda x: native.rms_norm(x, w, EPS))(x), exact)
    assert_close(mx.vmap(lambda x: native.rms_norm(x, w, EPS), in_axes=1, out_axes=1)(x), exact)
    ws = mx.array(random(3, 4, 17))
    exact = rms_norm(exactly(x), exactly(ws)[:, None])[0]
    assert_close(mx.vmap(lambda x, w: native.rms_norm(x, w, EPS))(x, ws), exact)
    assert_close(mx.vmap(native.softmax)(x), softmax(exactly(x))[0])
    double = mx.compile(lambda x: native.softmax(x) + native.softmax(x) + native.rms_norm(x, None, EPS))
    assert_close(double(x), 2 * softmax(exactly(x))[0] + rms_norm(exactly(x), 1.0)[0])
    shapeless = mx.compile(lambda x: native.softmax(x), shapeless=True)
    for rows in (2, 3):
        assert_close(shapeless(x[0, :rows]), softmax(exactly(x[0, :rows]))[0])


def test_compile_tells_norms_apart(native):
    x = mx.array(random(1, 3, 17))
    f = mx.compile(lambda x: native.rms_norm(x, None, EPS) - native.rms_norm(x, None, 1.0))
    exact = exactly(x)
    other = exact / np.sqrt(np.mean(exact**2, -1, keepdims=True) + 1)
    assert_close(f(x), rms_norm(exact, 1.0)[0] - other)


def test_what_is_refused(native):
    x, w = mx.zeros((3, 5)), mx.zeros(4)
    with pytest.raises(ValueError, match="the weight must have one axis of 5 numbers"):
        native.rms_norm(x, w, EPS)
    with pytest.raises(ValueError, match="the bias must have one axis of 5 numbers"):
        native.layer_norm(x, None, w, EPS)
    with pytest.raises(ValueError, match="x has no axis"):
        native.softmax(mx.array(1.0))
    with pytest.raises(ValueError, match="dtype"):
        native.softmax(mx.zeros((2, 2), mx.int32))

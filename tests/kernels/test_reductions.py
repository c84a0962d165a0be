"""max, argmax and logsumexp of rows: against NumPy, in every layout, dtype and instruction set."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.agree import assert_close
from tests.kernels.layouts import DTYPES, LAYOUTS, exactly, laid_out

COLUMNS = st.one_of(st.integers(1, 40), st.integers(41, 300), st.sampled_from([256, 1024, 4099]))
SHAPES = st.builds(lambda rows, n: (*rows, n), st.lists(st.integers(1, 4), max_size=5), COLUMNS)


def everywhere(native, build):
    """`build()` on every instruction set, with one thread and with two."""
    instruction_set, threads = native.instruction_set(), native.threads()
    try:
        for name in native.instruction_sets():
            native.use(name)
            for count in (1, 2):
                native.set_threads(count)
                found = build()
                mx.eval(found)
                yield name, found
    finally:
        native.use(instruction_set)
        native.set_threads(threads)


def logsumexp(x):
    top = np.max(x, -1, keepdims=True)
    top = np.where(np.isfinite(top), top, 0)
    with np.errstate(divide="ignore"):
        return np.log(np.sum(np.exp(x - top), -1)) + top[..., 0]


@settings(deadline=None, max_examples=60)
@given(SHAPES, st.sampled_from(DTYPES), st.sampled_from(LAYOUTS), st.booleans(), st.integers(0, 99))
def test_reductions(native, shape, dtype, layout, keepdims, seed):
    # Few values, so that the largest comes several times.
    values = np.random.default_rng(seed).integers(-9, 9, shape).astype(np.float32) / 2
    x = laid_out(values, layout).astype(dtype)
    exact, size = exactly(x), np.abs(exactly(x)).max(-1, keepdims=keepdims) + np.log(shape[-1]) + 1
    total = logsumexp(exact)[..., None] if keepdims else logsumexp(exact)
    for _, found in everywhere(native, lambda: native.max(x, keepdims)):
        assert found.dtype == dtype
        assert np.array_equal(exactly(found), exact.max(-1, keepdims=keepdims))
    for _, found in everywhere(native, lambda: native.argmax(x, keepdims)):
        assert found.dtype == mx.uint32
        assert np.array_equal(np.array(found), exact.argmax(-1, keepdims=keepdims))
    for name, found in everywhere(native, lambda: native.logsumexp(x, keepdims)):
        assert found.dtype == dtype
        assert_close(found, total, k=shape[-1], path="P2", magnitude=size, about=name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("times", [1, 100])
def test_infinities_and_nans(native, dtype, times):
    inf, nan = np.inf, np.nan
    rows = [
        [-inf] * 3,
        [0, inf, 1],
        [nan, 1, 2],
        [1, 2, nan],
        [-inf, 0, -0.0],
        [inf, nan, inf],
        [-1e4, -2e4, -inf],
    ]
    x = mx.array(np.array([row * times for row in rows], np.float32)).astype(dtype)
    exact = exactly(x)
    for _, found in everywhere(native, lambda: native.max(x)):
        assert np.array_equal(exactly(found), exact.max(-1), equal_nan=True)
    for _, found in everywhere(native, lambda: native.argmax(x)):
        assert np.array_equal(np.array(found), exact.argmax(-1))
        assert np.array_equal(np.array(found), np.array(mx.argmax(x, -1)))
    with np.errstate(invalid="ignore"):
        sums = logsumexp(exact)
    for _, found in everywhere(native, lambda: native.logsumexp(x)):
        assert_close(found, sums, k=3 * times, path="P2", magnitude=np.where(np.isfinite(sums), abs(sums), 1))


@pytest.mark.parametrize("place", [0, 1, 255, 256, 4095, 4096, 151_934, 151_935])
def test_the_first_of_many_places(native, place):
    values = np.zeros(151_936, np.float32)
    values[[place, -1]] = 1, 1
    for _, found in everywhere(native, lambda: native.argmax(mx.array(values))):
        assert found.item() == place


def test_no_rows_and_no_numbers(native):
    assert native.max(mx.zeros((0, 5))).shape == (0,)
    assert native.argmax(mx.zeros((3, 0, 5)), True).shape == (3, 0, 1)
    for call in (native.max, native.argmax, native.logsumexp):
        with pytest.raises(ValueError, match="no numbers"):
            call(mx.zeros((2, 0)))
        with pytest.raises(ValueError, match="no axis"):
            call(mx.array(1.0))


def test_gradients_vmap_and_compile_are_those_of_mlx(native):
    x = mx.array(np.random.default_rng(1).standard_normal((3, 4, 17), np.float32))
    for ours, theirs in ((native.max, mx.max), (native.logsumexp, mx.logsumexp)):
        found, wanted = (
            mx.grad(lambda x, f=f: (f(x) ** 2).sum())(x) for f in (ours, lambda x, g=theirs: g(x, -1))
        )
        assert_close(found, exactly(wanted))
        assert_close(mx.vmap(ours, in_axes=1)(x), exactly(theirs(mx.swapaxes(x, 0, 1), -1)))
        f = mx.compile(lambda x, o=ours: o(x) - o(x, True)[..., 0] * 3, shapeless=True)
        for rows in (2, 3):
            assert_close(f(x[:rows]), -2 * exactly(theirs(x[:rows], -1)))

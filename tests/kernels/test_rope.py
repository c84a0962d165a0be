"""Rope: against float64 at MLX's angles, in every layout, dtype and instruction set."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.agree import assert_close
from tests.kernels.layouts import DTYPES, LAYOUTS, bits, everywhere, exactly, laid_out

OFFSET_DTYPES = (mx.int32, mx.uint32, mx.int64, mx.int16, mx.uint8)
FAR = 900_000  # a position in a long context: angles of 1e6 need an exact reduction


def random(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def angles(length, dims, base, scale, offset, freqs):
    """(batch, length, dims / 2): in f32, by the steps and the exponential of MLX's rope on a CPU."""
    half = dims // 2
    step = float(np.float32(np.float32(math.log(np.float32(base or 1))) / np.float32(half)))
    speeds = mx.exp(mx.arange(0, -half, -1, dtype=mx.float32) * step) if freqs is None else 1 / freqs
    start = mx.array(offset).reshape(-1, 1)
    positions = (mx.arange(length, dtype=mx.float32) + start) * mx.array(scale, mx.float32)
    return exactly(positions[..., None] * speeds)


def turned(x, dims, theta, traditional):
    """x turned in float64, and what its error is relative to."""
    half = dims // 2
    pairs = (slice(0, dims, 2), slice(1, dims, 2)) if traditional else (slice(0, half), slice(half, dims))
    theta = theta.reshape(theta.shape[0], *[1] * (x.ndim - 3), *theta.shape[1:])
    a, b = x[..., pairs[0]], x[..., pairs[1]]
    y, size = x.copy(), np.abs(x)
    y[..., pairs[0]], y[..., pairs[1]] = (
        a * np.cos(theta) - b * np.sin(theta),
        a * np.sin(theta) + b * np.cos(theta),
    )
    size[..., pairs[0]] = size[..., pairs[1]] = np.abs(a) + np.abs(b)
    return y, size


def check(native, x, dims, about=(), traditional=False, base=10000.0, scale=1.0, offset=0, freqs=None):
    def call():
        return native.rope(
            x, dims, traditional=traditional, base=base, scale=scale, offset=offset, freqs=freqs
        )

    theta = angles(x.shape[-2], dims, base, scale, offset, freqs)
    exact, size = turned(exactly(x), dims, theta, traditional)
    for name, y in everywhere(native, call):
        assert (y.shape, y.dtype) == (x.shape, x.dtype)
        assert_close(y, exact, path="elementwise", magnitude=size, about=(name, *about))


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_rope(native, data):
    middle = data.draw(st.lists(st.integers(1, 5), max_size=3), "axes of heads")
    batch, length = data.draw(st.integers(1, 4), "batch"), data.draw(st.integers(1, 9), "length")
    dims = 2 * data.draw(st.one_of(st.integers(1, 20), st.sampled_from([32, 40, 64])), "dims / 2")
    columns = dims + data.draw(st.sampled_from([0, 0, 1, 5, 64]), "features beyond")
    layout, dtype = data.draw(st.sampled_from(LAYOUTS)), data.draw(st.sampled_from(DTYPES))
    x = laid_out(random(data.draw(st.integers(0, 99)), batch, *middle, length, columns), layout, dtype)
    offset = data.draw(st.one_of(st.integers(0, 1000), st.just(FAR), st.just(-3)), "offset")
    kind = data.draw(st.sampled_from(["int", "()", "(1,)", "(batch,)"]), "kind of offset")
    if kind != "int":
        numbers = [abs(offset) % 100 + 7 * i for i in range(batch if kind == "(batch,)" else 1)]
        offset = mx.array(numbers if kind != "()" else numbers[0], data.draw(st.sampled_from(OFFSET_DTYPES)))
    how = {"traditional": data.draw(st.booleans()), "scale": data.draw(st.sampled_from([1.0, 0.25, 1.7]))}
    if data.draw(st.booleans(), "by frequencies"):
        how |= {"base": None, "freqs": mx.array(np.abs(random(5, dims // 2)) * 100 + 1)}
    else:
        how |= {"base": data.draw(st.sampled_from([10000.0, 1e6, 500000.0]))}
    check(native, x, dims, (x.shape, dims, layout, offset, how), offset=offset, **how)


@pytest.mark.parametrize("layout", ["plain", "heads-last"])
@pytest.mark.parametrize("traditional", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8, 200, 64), (3, 200, 2, 64), (40, 9, 1, 64)])
def test_as_large_as_in_a_model(native, shape, dtype, traditional, layout):
    batch, heads, length, dims = shape
    if layout == "plain":
        x = laid_out(random(1, *shape), "plain", dtype)
    else:
        x = laid_out(random(1, batch, length, heads, dims), "plain", dtype).transpose(0, 2, 1, 3)
    each = mx.arange(batch) * 11
    for offset in (5, each):
        check(native, x, dims, traditional=traditional, offset=offset)


def test_the_bits_are_near_those_of_mlx_far_out(native):
    x = mx.array(random(2, 1, 2, 50, 64))
    expected = mx.fast.rope(x, 64, traditional=False, base=1e6, scale=1.0, offset=FAR)
    for name, y in everywhere(
        native, lambda: native.rope(x, 64, traditional=False, base=1e6, scale=1.0, offset=FAR)
    ):
        assert_close(y, exactly(expected), path="elementwise", magnitude=4.0, about=name)


def rope(native, x, **how):
    return native.rope(x, x.shape[-1], **{"traditional": False, "base": 1e4, "scale": 1.0, "offset": 3} | how)


def test_the_result_lies_as_x_does_and_mlx_reads_it_rightly(native):
    stored = mx.array(random(3, 2, 5, 3, 8))  # (batch, length, heads, features)
    x = stored.transpose(0, 2, 1, 3)
    y = rope(native, x)
    mx.eval(y)
    back = y.transpose(0, 2, 1, 3)
    exact = turned(exactly(x), 8, angles(5, 8, 1e4, 1.0, 3, None), False)[0]
    for found, expected in (
        (y + 0, exact),
        (back.reshape(2, 5, 24), exact.transpose(0, 2, 1, 3).reshape(2, 5, 24)),
        (y[:, 1:, ::2], exact[:, 1:, ::2]),
        (mx.concatenate([y, y], 2), np.concatenate([exact, exact], 2)),
        (y.reshape(6, 5, 8) @ mx.eye(8), exact.reshape(6, 5, 8)),
    ):
        assert_close(found, expected)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_result_may_lie_where_x_lay(native, transposed):
    x = mx.array(random(4, 2, 5, 3, 10))
    mx.eval(x)

    def call():
        y = (x + 1).transpose(0, 2, 1, 3) if transposed else x + 1
        return native.rope(y, 6, traditional=False, base=1e4, scale=1.0, offset=3)

    source = exactly(x + 1)
    source = source.transpose(0, 2, 1, 3) if transposed else source
    exact = turned(source, 6, angles(source.shape[2], 6, 1e4, 1.0, 3, None), False)[0]
    for name, y in everywhere(native, call):
        assert_close(y, exact, about=name)
    assert bits(x) == random(4, 2, 5, 3, 10).tobytes()


def test_gradient_and_jvp(native):
    x, c = mx.array(random(5, 2, 3, 4, 8)), mx.array(random(6, 2, 3, 4, 8))
    for how in ({}, {"offset": mx.array([4, 9])}, {"base": None, "freqs": mx.array([1.0, 5.0, 30.0, 100.0])}):
        for traditional in (False, True):
            given = {"traditional": traditional, "base": 1e4, "scale": 0.5, "offset": 3, **how}

            def ours(x, given=given):
                return native.rope(x, 8, **given)

            def theirs(x, given=given):
                return mx.fast.rope(x, 8, **given)

            for transform in (mx.vjp, mx.jvp):
                found, expected = (transform(f, [x], [c])[1][0] for f in (ours, theirs))
                assert_close(found, exactly(expected))
    half = x.astype(mx.bfloat16)
    assert mx.grad(lambda x: rope(native, x).sum())(half).dtype == mx.bfloat16


def test_vmap_and_compile(native):
    x = mx.array(random(7, 4, 2, 3, 5, 8))
    exact = turned(exactly(x), 8, angles(5, 8, 1e4, 1.0, 3, None), False)[0]
    assert_close(mx.vmap(lambda x: rope(native, x))(x), exact)
    # The offset of a compiled function is an argument; two ropes that differ are not taken for one.
    f = mx.compile(lambda x, n: rope(native, x[0], offset=n) - rope(native, x[0], traditional=True, offset=n))
    for n in (3, 8):
        theta = angles(5, 8, 1e4, 1.0, n, None)
        expected = (turned(exactly(x[0]), 8, theta, t)[0] for t in (False, True))
        assert_close(f(x, mx.array(n)), np.subtract(*expected))


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 3, 0, 4)])
def test_nothing_to_do(native, shape):
    y = rope(native, mx.zeros(shape))
    mx.eval(y)
    assert y.shape == shape


def test_what_is_refused(native):
    x = mx.zeros((2, 3, 4, 8))
    for how, words in (
        ({"dims": 3}, "dims must be even"),
        ({"dims": 10}, "dims must be even"),
        ({"base": None}, "either a base or frequencies"),
        ({"freqs": mx.ones(4)}, "either a base or frequencies"),
        ({"base": None, "freqs": mx.ones(3)}, "dims / 2 frequencies, 4"),
        ({"offset": mx.array([1, 2, 3])}, "one for each of 2 batches"),
        ({"offset": mx.array(1.0)}, "the offset is no integer"),
        ({"x": mx.zeros((3, 8))}, "fewer than 3 axes"),
        ({"x": x.astype(mx.int32)}, "dtype"),
    ):
        given = {"x": x, "dims": 8, "traditional": False, "base": 1e4, "scale": 1.0, "offset": 0, **how}
        with pytest.raises(ValueError, match=words):
            native.rope(given.pop("x"), given.pop("dims"), **given)

"""rms_norm and layer_norm from code that spells them out, and code that only looks like them."""

from __future__ import annotations

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qgraph as qg
from tests.agree import normal
from tests.passes.raise_fast.raised import raised, reasons, same_as_mlx

DTYPES = [mx.float32, mx.bfloat16, mx.float16]
EPS = 1e-3


def wide(x):
    return qg.astype(x, mx.float32)


def mean(x, **kwargs):
    return qg.mean(x, axis=-1, **{"keepdims": True, **kwargs})


def centred(x):
    return x - mean(x)


RMS = {
    "rsqrt": lambda x, w: x * qg.rsqrt(mean(x * x) + EPS) * w,
    "sqrt": lambda x, w: w * (x / qg.sqrt(EPS + mean(qg.square(x)))),
    "one over sqrt": lambda x, w: x * (1 / qg.sqrt(mean(x**2) + EPS)) * w,
    "reciprocal": lambda x, w: qg.reciprocal(qg.sqrt(mean(x**2) + EPS)) * x * w,
    "power": lambda x, w: (mean(x * x) + EPS) ** -0.5 * x * w,
    "sum over n": lambda x, w: x * qg.rsqrt(qg.sum(x * x, axis=-1, keepdims=True) / x.shape[-1] + EPS) * w,
    "sum times 1/n": lambda x, w: x * qg.rsqrt(qg.sum(x * x, -1, True) * (1 / x.shape[-1]) + EPS) * w,
    "axis put back": lambda x, w: x * qg.rsqrt(mean(x * x, keepdims=False) + EPS)[..., None] * w,
    "weight first": lambda x, w: w * qg.astype(wide(x) * qg.rsqrt(mean(wide(x) ** 2) + EPS), x.dtype),
    "weight of more axes": lambda x, w: x * qg.rsqrt(mean(x * x) + EPS) * w[None],
    "cast last": lambda x, w: qg.astype(wide(x) * qg.rsqrt(mean(wide(x) ** 2) + EPS) * wide(w), x.dtype),
    "gemma": lambda x, w: qg.astype(wide(x) * qg.rsqrt(mean(wide(x) ** 2) + EPS) * (1 + wide(w)), x.dtype),
    "statistics in f32": lambda x, w: x * qg.astype(qg.rsqrt(mean(wide(x) ** 2) + EPS), x.dtype) * w,
}
LAYER = {
    "var": lambda x, w, b: centred(x) * qg.rsqrt(qg.var(x, axis=-1, keepdims=True) + EPS) * w + b,
    "mean of squares": lambda x, w, b: b + w * (centred(x) / qg.sqrt(mean(centred(x) ** 2) + EPS)),
    "in f32": lambda x, w, b: (
        w * qg.astype(centred(wide(x)) * qg.rsqrt(qg.var(wide(x), axis=-1, keepdims=True) + EPS), x.dtype) + b
    ),
    "sums": lambda x, w, b: (
        (lambda c: c * qg.rsqrt(qg.sum(c * c, -1, True) / x.shape[-1] + EPS))(
            x - qg.sum(x, axis=-1, keepdims=True) / x.shape[-1]
        )
        * w
        + b
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spelling", RMS)
def test_every_spelling_of_rms_norm_is_one_op(spelling, dtype):
    counts = raised(RMS[spelling], normal(2, 3, 96, dtype=dtype), normal(96, dtype=dtype))
    assert counts["rms_norm"] == 1
    assert not set(counts) & {"rsqrt", "sqrt", "multiply", "divide", "mean", "sum", "square", "power"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spelling", LAYER)
def test_every_spelling_of_layer_norm_is_one_op(spelling, dtype):
    args = (normal(2, 3, 96, dtype=dtype) + 1, normal(96, dtype=dtype), normal(96, seed=3, dtype=dtype))
    counts = raised(LAYER[spelling], *args)
    assert counts["layer_norm"] == 1
    assert not set(counts) & {"rsqrt", "sqrt", "multiply", "divide", "mean", "sum", "var", "subtract", "add"}


@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    dtype=st.sampled_from(DTYPES),
    spelling=st.sampled_from(sorted(RMS)),
    weighted=st.booleans(),
)
def test_rms_norm_of_any_shape(shape, dtype, spelling, weighted):
    w = normal(shape[-1], dtype=dtype) if weighted else mx.array(1.0, dtype)
    if spelling == "weight of more axes" and (len(shape) == 1 or not weighted):
        return
    counts = raised(RMS[spelling], normal(*shape, dtype=dtype), w)
    assert counts["rms_norm"] == 1


@given(shape=st.lists(st.integers(1, 5), min_size=1, max_size=4), dtype=st.sampled_from(DTYPES))
def test_layer_norm_of_any_shape(shape, dtype):
    w, b = normal(shape[-1], dtype=dtype), normal(shape[-1], seed=9, dtype=dtype)
    assert raised(LAYER["var"], normal(*shape, dtype=dtype), w, b)["layer_norm"] == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(8,), (1, 96), (2, 3, 96), (2, 1, 3, 8)])
def test_what_mlx_writes_for_its_norms_is_raised_and_runs_bit_by_bit_the_same(shape, dtype):
    x, w, b = (normal(*s, seed=i, dtype=dtype) for i, s in enumerate((shape, shape[-1:], shape[-1:])))
    norms = [
        (lambda x, w, b: mx.fast.rms_norm(x, w, EPS), {"rms_norm": 1}),
        (lambda x, w, b: mx.fast.rms_norm(x, None, EPS), {"rms_norm": 1}),
        (lambda x, w, b: mx.fast.layer_norm(x, w, b, EPS), {"layer_norm": 1}),
        (lambda x, w, b: mx.fast.layer_norm(x, w, None, EPS), {"layer_norm": 1}),
        (lambda x, w, b: mx.fast.layer_norm(x, None, b, EPS), {"layer_norm": 1}),
        (lambda x, w, b: mx.fast.layer_norm(x, None, None, EPS), {"layer_norm": 1}),
    ]
    for f, counts in norms:
        assert same_as_mlx(f, x, w, b) == counts


def test_a_weight_of_another_dtype_decides_the_dtype():
    def f(x, w):
        return mx.fast.rms_norm(x, w, EPS)

    assert same_as_mlx(f, normal(2, 8, dtype=mx.bfloat16), normal(8)) == {"rms_norm": 1}


NEAR = {
    "eps outside the root": (
        lambda x, w: x / (qg.sqrt(mean(x * x)) + EPS) * w,
        "",
    ),
    "mean over another axis": (
        lambda x, w: x * qg.rsqrt(qg.mean(x * x, axis=0, keepdims=True) + EPS) * w,
        "the mean is over axes (0,), not the last one",
    ),
    "mean over two axes": (
        lambda x, w: x * qg.rsqrt(qg.mean(x * x, axis=(0, 1), keepdims=True) + EPS) * w,
        "the mean is over axes (0, 1), not the last one",
    ),
    "another value divided": (
        lambda x, w: (x + 1) * qg.rsqrt(mean(x * x) + EPS) * w,
        "what is divided is not what was squared",
    ),
    "the mean of rows along the columns": (
        lambda x, w: x * qg.rsqrt(qg.mean(x * x, axis=-1) + EPS) * w,
        "the mean of a row does not meet that row",
    ),
    "divided by another number": (
        lambda x, w: x * qg.rsqrt(qg.sum(x * x, axis=-1, keepdims=True) / 7 + EPS) * w,
        "",
    ),
    "cubes": (lambda x, w: x * qg.rsqrt(mean(qg.abs(x) ** 3) + EPS) * w, ""),
    "the root of another power": (lambda x, w: x * (mean(x * x) + EPS) ** -0.25 * w, ""),
    "the unbiased variance": (
        lambda x, w: centred(x) * qg.rsqrt(qg.var(x, axis=-1, keepdims=True, ddof=1) + EPS) * w,
        "",
    ),
    "the variance of something else": (
        lambda x, w: centred(x) * qg.rsqrt(qg.var(x * 2, axis=-1, keepdims=True) + EPS) * w,
        "",
    ),
}


@pytest.mark.parametrize("name", NEAR)
def test_what_only_looks_like_a_norm_stays_and_says_why(name):
    f, reason = NEAR[name]
    x, w = normal(8, 8), normal(8)
    assert not set(raised(f, x, w)) & {"rms_norm", "layer_norm"}
    assert not reason or reason in reasons(f, x, w)


def test_a_weight_along_another_axis_is_no_weight():
    def f(x, w):
        return x * qg.rsqrt(mean(x * x) + EPS) * w

    assert raised(f, normal(8, 8), normal(8, 1)) == {"rms_norm": 1, "multiply": 1}
    assert raised(f, normal(4, 8), normal(4, 8)) == {"rms_norm": 1, "multiply": 1}


def test_an_eps_that_is_an_argument_is_no_number():
    def f(x, eps):
        return x * qg.rsqrt(mean(x * x) + eps)

    assert "rms_norm" not in raised(f, normal(4, 8), mx.array(EPS))


def test_centred_rows_whose_variance_is_their_mean_square_are_a_layer_norm_only_over_the_last_axis():
    def f(x):
        return (x - qg.mean(x, axis=0, keepdims=True)) * qg.rsqrt(qg.var(x, axis=0, keepdims=True) + EPS)

    assert "layer_norm" not in raised(f, normal(8, 8))
    assert "mean and variance are over axes (0,) and (0,), not the last one" in reasons(f, normal(8, 8))


def test_rows_that_are_used_with_and_without_the_weight_are_normed_once():
    def f(x, w):
        y = x * qg.rsqrt(mean(x * x) + EPS)
        return y, y * w

    assert raised(f, normal(4, 8), normal(8)) == {"rms_norm": 1, "multiply": 1}


def test_a_root_that_something_else_reads_is_not_computed_twice():
    def f(x):
        r = qg.rsqrt(mean(x * x) + EPS)
        return x * r, r + 1

    assert "rms_norm" not in raised(f, normal(4, 8))


def test_a_mean_that_something_else_reads_is_not_computed_twice():
    def f(x):
        m = mean(x * x)
        return x * qg.rsqrt(m + EPS), m

    assert "rms_norm" not in raised(f, normal(4, 8))
    assert any("has a foreign user: it is an output" in r for r in reasons(f, normal(4, 8)))


def test_in_16_bit_a_raised_norm_is_nearer_to_the_exact_one():
    f = RMS["rsqrt"]
    raised(f, normal(4, 4096, dtype=mx.bfloat16), normal(4096, dtype=mx.bfloat16))


def test_float64_stays_as_it_is_written():
    """The fused ops compute in float32."""
    counts = raised(RMS["rsqrt"], normal(4, 8, dtype=mx.float64), normal(8, dtype=mx.float64))
    assert "rms_norm" not in counts
    assert "there is no kernel for f64" in reasons(
        RMS["rsqrt"], normal(4, 8, dtype=mx.float64), normal(8, dtype=mx.float64)
    )


def test_one_row_of_activations_is_no_weight():
    """A gate beside a norm, where a step of decoding has one row."""

    def f(x, z):
        return x * qg.rsqrt(mean(x * x) + EPS) * qg.silu(z)

    args = (normal(1, 1, 8), normal(1, 1, 8, seed=4))
    assert raised(f, *args) == {"rms_norm": 1, "multiply": 1, "silu": 1}


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4), (2, 0)])
def test_rows_without_elements(shape):
    raised(RMS["rsqrt"], normal(*shape), normal(shape[-1]))

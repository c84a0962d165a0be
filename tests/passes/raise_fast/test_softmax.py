"""softmax from exponentials and their sum."""

from __future__ import annotations

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qgraph as qg
from tests.agree import normal
from tests.passes.raise_fast.raised import raised, reasons, same_as_mlx

DTYPES = [mx.float32, mx.bfloat16, mx.float16]


def shifted(x, axis):
    return qg.exp(x - qg.max(x, axis=axis, keepdims=True))


SPELLINGS = {
    "shifted": lambda x, a: shifted(x, a) / qg.sum(shifted(x, a), axis=a, keepdims=True),
    "not shifted": lambda x, a: qg.exp(x) / qg.sum(qg.exp(x), axis=a, keepdims=True),
    "times one over the sum": lambda x, a: (
        qg.exp(x) * qg.reciprocal(qg.sum(qg.exp(x), axis=a, keepdims=True))
    ),
    "less the logarithm": lambda x, a: qg.exp(x - qg.logsumexp(x, axis=a, keepdims=True)),
    "axis put back": lambda x, a: qg.exp(x) / qg.expand_dims(qg.sum(qg.exp(x), axis=a), a),
}


@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    dtype=st.sampled_from(DTYPES),
    spelling=st.sampled_from(sorted(SPELLINGS)),
    data=st.data(),
)
def test_every_spelling_over_any_axis_is_one_op(shape, dtype, spelling, data):
    axis = data.draw(st.integers(0, len(shape) - 1))

    def f(x):
        return SPELLINGS[spelling](x, axis)

    assert raised(f, normal(*shape, dtype=dtype)) == {"softmax": 1}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", [0, 1, (0, 2), None])
def test_what_mlx_writes_for_other_axes_than_the_last_is_raised(axis, dtype):
    x = normal(2, 3, 8, dtype=dtype)

    def f(x):
        return mx.softmax(x, axis=axis)

    assert raised(f, x, captured=True) == {"softmax": 1}
    if dtype == mx.float32:  # in 16 bit MLX sums in 16 bit, the op in f32
        assert same_as_mlx(f, x) == {"softmax": 1}


NEAR = {
    "one more in the sum": lambda x: qg.exp(x) / (qg.sum(qg.exp(x), axis=-1, keepdims=True) + 1),
    "the sum over another axis": lambda x: shifted(x, -1) / qg.sum(shifted(x, 0), axis=-1, keepdims=True),
    "the mean": lambda x: qg.exp(x) / qg.mean(qg.exp(x), axis=-1, keepdims=True),
    "upside down": lambda x: qg.sum(qg.exp(x), axis=-1, keepdims=True) / qg.exp(x),
    "the maximum of another value": lambda x: qg.exp(x - qg.logsumexp(x * 2, axis=-1, keepdims=True)),
    "sums of rows along the columns": lambda x: qg.exp(x) / qg.sum(qg.exp(x), axis=-1),
    "logarithms of rows along the columns": lambda x: qg.exp(x - qg.logsumexp(x, axis=-1)),
}


@pytest.mark.parametrize("name", NEAR)
def test_what_only_looks_like_a_softmax_stays(name):
    assert "softmax" not in raised(NEAR[name], normal(4, 4))


def test_sums_that_do_not_meet_their_rows_say_so():
    assert reasons(NEAR["sums of rows along the columns"], normal(4, 4)) == [
        "the sum of a row does not meet that row"
    ]


def test_exponentials_that_something_else_reads_are_not_computed_twice():
    def f(x):
        e = shifted(x, -1)
        return e / qg.sum(e, axis=-1, keepdims=True), e + 1

    assert "softmax" not in raised(f, normal(4, 8))


def test_a_shift_over_another_axis_stays_below_the_softmax():
    def f(x):
        return shifted(x, 0) / qg.sum(shifted(x, 0), axis=-1, keepdims=True)

    assert raised(f, normal(4, 8)) == {"max": 1, "subtract": 1, "softmax": 1}

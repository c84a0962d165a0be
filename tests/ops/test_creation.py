"""New and rearranged arrays against MLX, eagerly and in a trace."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from qgraph import DTypeError, ShapeError
from qgraph.ir.dtypes import F32
from tests.ops.cases import data

X = data(0, (2, 3), F32)
NEW = [
    ("arange", (5,), {}),
    ("arange", (1, 7, 2), {}),
    ("arange", (5, 0, -2), {"dtype": mx.float16}),
    ("arange", (0, 1, 0.3), {}),
    ("arange", (1.5,), {}),
    ("arange", (2**33, 2**33 + 2), {}),
    ("full", ((2, 3), 7), {}),
    ("full", ((2, 3), 0.5), {}),
    ("full", ((2, 3), 2), {"dtype": mx.bfloat16}),
    ("full", (4, True), {}),
    ("zeros", ((2, 3),), {}),
    ("zeros", (3, mx.int32), {}),
    ("ones", ((0, 2), mx.float16), {}),
    ("eye", (3,), {}),
    ("eye", (2, 3, 1), {"dtype": mx.int32}),
    ("identity", (3,), {}),
    ("tri", (3, 4, -1), {}),
    ("linspace", (0, 1, 5), {}),
    ("linspace", (0, 1, 5, False), {}),
]


@pytest.mark.parametrize(("name", "args", "kwargs"), NEW)
def test_new_arrays_are_those_of_mlx(name, args, kwargs):
    expected = getattr(mx, name)(*args, **kwargs)
    call = getattr(qg, name)
    traced = qg.jit(lambda x: (call(*args, **kwargs), x))(X)[0]
    for found in (call(*args, **kwargs), traced):
        assert found.dtype == expected.dtype
        assert mx.array_equal(found, expected)


REARRANGED = [
    ("pad", (1,), {}),
    ("pad", (((1, 0), (0, 2)),), {"mode": "edge"}),
    ("pad", ((1, 2),), {"constant_values": 5}),
    ("pad", ((1,),), {}),
    ("pad", ([(1, 1)],), {}),
    ("pad", (((2, 0), (0, 5)),), {"mode": "reflect"}),
    ("tile", (2,), {}),
    ("tile", ((2, 1, 1),), {}),
    ("tile", ((2, 3),), {}),
    ("tile", (0,), {}),
    ("repeat", (2,), {}),
    ("repeat", (3, 1), {}),
    ("repeat", (0, 0), {}),
    ("roll", (1,), {}),
    ("roll", (-4, 1), {}),
    ("roll", ((1, 2), (0, 1)), {}),
    ("roll", ((1, 2), 0), {}),
    ("roll", (1, (0, 1)), {}),
    ("unstack", (), {"axis": 1}),
    ("meshgrid", (mx.arange(4),), {}),
    ("meshgrid", (mx.arange(4), mx.arange(2)), {"indexing": "ij"}),
    ("meshgrid", (mx.arange(4), mx.arange(2)), {"sparse": True}),
    ("broadcast_arrays", (mx.arange(3), mx.zeros((4, 1, 1))), {}),
    ("atleast_1d", (), {}),
    ("atleast_3d", (), {}),
    ("tril", (1,), {}),
    ("triu", (-1,), {}),
    ("zeros_like", (), {}),
    ("ones_like", (), {}),
    ("full_like", (3,), {}),
    ("full_like", (3, mx.int32), {}),
]


@pytest.mark.parametrize(("name", "args", "kwargs"), REARRANGED)
def test_rearranged_arrays_are_those_of_mlx(name, args, kwargs):
    x = mx.arange(2.0) if name == "meshgrid" else X
    if name == "full_like":
        expected = mx.full(x.shape, args[0]).astype(args[1] if len(args) > 1 else x.dtype)
    else:
        expected = getattr(mx, name)(x, *args, **kwargs)
    call = getattr(qg, name)
    for found in (call(x, *args, **kwargs), qg.jit(lambda x: call(x, *args, **kwargs))(x)):
        pairs = (
            [(found, expected)] if isinstance(expected, mx.array) else list(zip(found, expected, strict=True))
        )
        for f, e in pairs:
            assert f.dtype == e.dtype
            assert mx.array_equal(f, e)


def test_one_program_makes_new_arrays_every_time():
    f = qg.jit(lambda x: x + qg.arange(3))
    assert f(mx.zeros(3)).tolist() == f(mx.zeros(3)).tolist() == [0, 1, 2]
    assert [str(v.op.name) for v in f.graph(mx.zeros(3)).inputs] == ["input"]  # not captured


@pytest.mark.parametrize(
    "value",
    [3, 2.5, True, [1, 2], [[1.0, 2.0]], np.float64(2), np.arange(3), np.ones(2, np.float16), 2**40, []],
)
def test_array_reads_what_mlx_reads(value):
    expected = mx.array(value)
    traced = qg.jit(lambda x: (qg.array(value), x))(X)[0]
    for found in (qg.array(value), traced):
        assert found.dtype == expected.dtype
        assert mx.array_equal(found, expected)
    assert qg.jit(lambda x: qg.array(x, mx.float16))(X).dtype == mx.float16


def test_what_decides_a_shape_must_be_known():
    with pytest.raises(DTypeError, match="Python numbers"):
        qg.jit(lambda x: qg.arange(x))(mx.array(3))
    with pytest.raises(ShapeError, match="step is 0"):
        qg.arange(0, 3, 0)
    with pytest.raises(ShapeError, match="negative"):
        qg.zeros((-1,))
    with pytest.raises(ShapeError, match="two axes"):
        qg.tril(mx.zeros(3))
    with pytest.raises(DTypeError, match=r"qg\.stack"):
        qg.jit(lambda x: qg.array([x[0], x[1]]))(mx.zeros(2))


def test_padding_must_make_sense():
    with pytest.raises(ShapeError, match="widths"):
        qg.pad(X, -1)
    with pytest.raises(ShapeError, match="rank 2"):
        qg.pad(X, [(1, 1)] * 3)
    with pytest.raises(DTypeError, match="no mode"):
        qg.pad(X, 1, mode="wrap")
    with pytest.raises(ShapeError, match="nothing to repeat"):
        qg.pad(mx.zeros((0, 2)), 1, mode="edge")


@pytest.mark.parametrize("name", ["sum", "prod", "mean", "var", "std", "all", "any", "logsumexp"])
def test_the_reduction_of_nothing_has_a_value(name):
    """MLX's CPU kernels read beyond an operand without elements, and may not return."""
    x = mx.zeros((3, 0, 4))
    value = {"sum": 0, "prod": 1, "all": True, "any": False, "logsumexp": -np.inf}.get(name, np.nan)
    out = getattr(qg, name)(x, (0, 1))
    assert out.shape == (4,)
    assert np.array_equal(np.array(out), np.full(4, value), equal_nan=True)


def test_the_extremes_of_nothing_are_refused():
    for name in ("max", "min", "argmax", "argmin"):
        with pytest.raises(ShapeError, match="elements"):
            getattr(qg, name)(mx.zeros((0, 3)), 0)

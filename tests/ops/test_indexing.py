"""Subscripts and updates against NumPy, and what is refused."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from qgraph import DTypeError, QGraphError, ShapeError
from qgraph.ops.indexing import getitem
from qgraph.ops.updates import At
from tests.agree import assert_close

N = np.arange(1, 25, dtype=np.float32).reshape(2, 3, 4)
X = mx.array(N)
ROWS, J = np.array([0, 1]), np.array([2, -3])
C = ROWS[:, None]
ALL = slice(None)
READS = [
    0,
    -1,
    ...,
    None,
    (0, None, -1, ..., None, 1),
    (ALL, slice(None, None, -1), slice(None, None, 2)),
    (ALL, slice(2, 0, -1), slice(3, None, -2)),
    slice(-10, None, -1),
    slice(5, None),
    (ROWS, J),
    (ROWS, ALL, J),
    (ALL, ROWS, J),
    (..., ROWS),
    (ROWS, None, J),
    (ROWS, None, 0, J),
    (0, ALL, ROWS),
    (0, ROWS),
    (ROWS, 0),
    (ROWS, ALL, 0),
    (ALL, 0, ROWS),
    (None, ROWS),
    (None, 0, ALL, ROWS),
    (ROWS, slice(1, None), J),
    (C, J),
    (C, ALL, J),
    (ALL, C, J),
    (0, ALL, C),
    (np.array(1), ALL, J),
    np.array(1),
    [0, 1],
    ([0, 1], [2, 0]),
    np.array([], np.int64),
    np.int64(1),
]


def in_mlx(index):
    """The same index with MLX arrays."""
    if isinstance(index, tuple):
        return tuple(in_mlx(i) for i in index)
    return mx.array(index.astype(np.int32)) if isinstance(index, np.ndarray) else index


@pytest.mark.parametrize("index", READS, ids=str)
def test_a_subscript_means_what_it_means_in_numpy(index):
    expected = N[index]
    for form in (index, in_mlx(index)):  # written out, and as arrays
        found = getitem(X, form)
        assert found.shape == expected.shape
        np.testing.assert_array_equal(np.array(found), expected)
        np.testing.assert_array_equal(np.array(qg.jit(lambda x, form=form: x[form])(X)), expected)


@pytest.mark.parametrize("kind", ["set", "add", "subtract", "multiply", "divide", "maximum", "minimum"])
@pytest.mark.parametrize(
    "index", [i for i in READS if "None" not in str(i).replace("slice(None", "")], ids=str
)
def test_an_update_means_what_it_means_in_numpy(kind, index):
    shape = N[index].shape
    for values in (np.float32(2.5), np.arange(1, 1 + np.prod(shape), dtype=np.float32).reshape(shape)):
        expected = N.copy()
        if kind == "set":
            expected[index] = values
        else:
            getattr(np, kind).at(expected, index, values)
        found = getattr(At(X)[in_mlx(index)], kind)(mx.array(values))
        assert_close(found, expected, path="elementwise")
    np.testing.assert_array_equal(np.array(X), N)  # a copy


def test_repeated_indices_all_count():
    at = At(mx.zeros(3))[mx.array([0, 0, 2])]
    assert at.add(1).tolist() == [2, 0, 1]
    assert at.subtract(mx.array([1.0, 2.0, 3.0])).tolist() == [-3, 0, -3]


def test_an_update_is_cast_to_the_dtype_of_the_array():
    assert At(mx.zeros(2, mx.int32))[0].set(1.75).dtype == mx.int32
    assert At(mx.zeros(2, mx.bfloat16))[0].add(mx.array(1.0)).dtype == mx.bfloat16


@pytest.mark.parametrize("kind", ["set", "add", "maximum"])
@pytest.mark.parametrize(
    "index", [(slice(1, None), J), (ROWS, ALL, J), (ROWS, slice(1, 3)), (ALL, ROWS, slice(1, 3))], ids=str
)
def test_updates_compose_with_the_transformations_of_mlx(kind, index):
    @qg.jit
    def f(x, v):
        return getattr(x.at[in_mlx(index)], kind)(v)

    v = mx.array(100.0)
    expected = N.copy()
    expected[index] = 100 if kind != "add" else N[index] + 100
    np.testing.assert_array_equal(np.array(f(X, v)), expected)
    np.testing.assert_array_equal(np.array(mx.compile(f)(X, v)), expected)
    np.testing.assert_array_equal(np.array(mx.vmap(f, (0, None))(mx.stack([X, X]), v)[1]), expected)
    to_x, to_v = mx.grad(lambda x, v: f(x, v).sum(), (0, 1))(X, v)
    kept = np.ones_like(N)
    kept[index] = kind == "add"
    np.testing.assert_array_equal(np.array(to_x), kept)
    assert to_v.item() == N[index].size


@pytest.mark.parametrize(
    ("index", "error", "text"),
    [
        (5, ShapeError, "index 5 is out of range for axis 0 of size 2"),
        ((0, 0, -5), ShapeError, "index -5 is out of range for axis 2 of size 4"),
        ((0, 0, 0, 0), ShapeError, "4 indices for an array of rank 3"),
        ((..., ...), ShapeError, "one ... only"),
        ([0, 7], ShapeError, "index 7 is out of range for axis 0"),
        (np.array([0, -3]), ShapeError, "index -3 is out of range"),
        (slice(0, 2, 0), ShapeError, "step 0"),
        (X > 3, DTypeError, "qg.where"),
        (True, DTypeError, "qg.where"),
        ([True, False], DTypeError, "qg.where"),
        (mx.array([0.5]), DTypeError, "f32, not integers"),
        (1.5, DTypeError, "float is not an index"),
        ("a", DTypeError, "str is not an index"),
        (slice(mx.array(0), 2), QGraphError, "qg.slice(a, start_indices, axes, slice_size)"),
    ],
    ids=str,
)
def test_what_has_no_meaning_is_refused(index, error, text):
    for use in (lambda x: x[index], lambda x: x.at[index].set(0)):
        with pytest.raises(error) as caught:
            qg.jit(use)(X)
        assert text in str(caught.value)


def test_an_update_must_fit():
    with pytest.raises(ShapeError, match=r"\(5,\) does not broadcast to \(3, 4\)|do not broadcast"):
        At(X)[0].set(mx.zeros(5))
    with pytest.raises(ShapeError, match="no index given"):
        At(X).set(0)
    with pytest.raises(ShapeError, match="no new axes"):
        At(X)[None].set(0)
    with pytest.raises(DTypeError, match="float"):
        At(mx.zeros(2, mx.int32))[0].divide(2)


def test_a_block_is_moved_until_it_fits():
    assert qg.slice(X, mx.array([100]), (2,), (2, 3, 3))[0, 0].tolist() == [2, 3, 4]
    assert qg.slice(X, mx.array([-7]), (2,), (2, 3, 3))[0, 0].tolist() == [1, 2, 3]
    assert qg.slice_update(X, 0, mx.array(100), (2,))[0, 0].tolist() == [1, 2, 3, 0]
    moved = qg.jit(lambda x, i: qg.slice(x, i, (0, 2), (1, 3, 2)))(X, mx.array([1, 9]))
    np.testing.assert_array_equal(np.array(moved), N[1:2, :, 2:4])


def test_a_block_must_be_smaller_than_the_array():
    with pytest.raises(ShapeError, match="a block of"):
        qg.slice(X, mx.array([0]), (0,), (3, 3, 4))
    with pytest.raises(ShapeError, match="one start per axis"):
        qg.slice(X, mx.array([0, 0]), (0,), (1, 3, 4))
    with pytest.raises(DTypeError, match="not integers"):
        qg.slice(X, mx.array([0.5]), (0,), (1, 3, 4))


def test_take_of_an_int_drops_the_axis():
    np.testing.assert_array_equal(np.array(qg.take(X, 1, axis=1)), N[:, 1])
    assert qg.take(X, [5, -1]).tolist() == [6, 24]
    with pytest.raises(ShapeError, match="out of range"):
        qg.take(X, [3], axis=1)


def test_take_of_a_packed_value_takes_from_its_numbers():
    w = qg.quantize(mx.random.normal((8, 64), key=mx.random.key(0)), bits=4, group_size=32)
    rows = qg.dequantize(w)
    assert mx.array_equal(qg.take(w, mx.array([3, 1]), axis=0), rows[mx.array([3, 1])])
    assert mx.array_equal(w[mx.array(2)], rows[2])
    assert mx.array_equal(qg.take(w, mx.array([3, 1]), axis=1), rows[:, mx.array([3, 1])])


def test_put_along_axis():
    expected = N.copy()
    np.put_along_axis(expected, np.array([[[1]], [[2]]]), 9.0, 1)
    found = qg.put_along_axis(X, mx.array([[[1]], [[2]]]), 9, axis=1)
    # MLX and NumPy broadcast the indices over the other axes
    np.testing.assert_array_equal(np.array(found), expected)
    assert qg.put_along_axis(X, [0, 1], [7, 8])[0, 0].tolist() == [7, 8, 3, 4]

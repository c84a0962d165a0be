"""Indices out of range: what they read and write, and that no other memory is touched."""

from __future__ import annotations

import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from qgraph.ir.dtypes import BOOL, C64, DType
from qgraph.ops.indexed import missing
from tests.agree import assert_close, normal

N = 5
NAN = float("nan")
TABLE = normal(N, 2, 3)
IDS = [0, N - 1, -1, -N, N, -N - 1, 100, -100]


def expected(table, ids, axis=0):
    """Slices one by one, NaN for what is not there: written without the reference."""
    table = np.moveaxis(np.array(table), axis, 0)
    rows = [table[i] if -len(table) <= i < len(table) else np.full_like(table[0], NAN) for i in ids]
    return np.moveaxis(np.stack(rows), 0, axis)


def both(f, *args):
    """What f gives at once, and what it gives jitted; equal."""
    at_once, jitted = f(*args), qg.jit(f)(*args)
    np.testing.assert_array_equal(np.array(at_once), np.array(jitted))
    return np.array(at_once)


@pytest.mark.parametrize("dtype", [mx.int8, mx.int16, mx.int32, mx.int64], ids=str)
def test_take_reads_nan(dtype):
    ids = mx.array(IDS, dtype)
    for axis in range(3):
        table = mx.moveaxis(TABLE, 0, axis)
        found = both(lambda t, i, axis=axis: qg.take(t, i, axis=axis), table, ids)
        np.testing.assert_array_equal(found, expected(table, IDS, axis))
    assert np.isnan(both(lambda t, i: qg.take(t, i, axis=0), TABLE, mx.array(N, dtype))).all()


@pytest.mark.parametrize("dtype", [mx.uint8, mx.uint16, mx.uint32, mx.uint64], ids=str)
def test_take_by_unsigned_indices(dtype):
    ids = [0, N - 1, N, 200]
    found = both(lambda t, i: qg.take(t, i, axis=0), TABLE, mx.array(ids, dtype))
    np.testing.assert_array_equal(found, expected(TABLE, ids))


@pytest.mark.parametrize("dtype", list(DType.all.values()), ids=str)
def test_every_dtype_has_a_number_for_it(dtype):
    table = mx.ones((3,), mx.float32).astype(dtype.mlx)
    with mx.stream(mx.cpu):
        found = qg.take(table, mx.array([1, 3]), axis=0)
        assert found.dtype == dtype.mlx
        one, none = np.array(found.astype(mx.float32)) if dtype.is_float else np.array(found)
    if dtype.is_float or dtype is C64:
        assert np.isnan(none)
    else:
        limits = (True, True) if dtype is BOOL else (np.iinfo(none.dtype).min, np.iinfo(none.dtype).max)
        assert none == (limits[0] or limits[1])
    assert one == 1
    assert missing(dtype) == none or np.isnan(none)


def test_what_was_read_out_of_range_is_out_of_range_as_an_index():
    def f(names, table, i):
        return qg.take(table, qg.take(names, i, axis=0), axis=0)

    for dtype in (mx.int32, mx.uint32):
        found = both(f, mx.array([2, 1, 0], dtype), normal(3), mx.array([0, 9]))
        assert found[0] == np.array(normal(3))[2]
        assert np.isnan(found[1])


def test_a_subscript_with_arrays():
    def f(t, i, j):
        return t[i, :, j] if hasattr(t, "_type") else qg.ops.indexing.getitem(t, (i, slice(None), j))

    i, j = mx.array([[0, 4, 9], [0, 1, 2]]), mx.array([0, 1, -4])
    found = both(f, TABLE, i, j)
    t = np.array(TABLE)
    for r in range(2):
        for c in range(3):
            a, b = int(i[r, c].item()), int(j[c].item())
            inside = -N <= a < N and -3 <= b < 3
            np.testing.assert_array_equal(found[r, c], t[a, :, b] if inside else np.full(2, NAN))


def test_take_along_axis():
    i = mx.array([[0, 1, 7], [-2, -3, 1]])[None]
    found = both(lambda t, i: qg.take_along_axis(t, i, axis=1), TABLE, i)
    t = np.array(TABLE)
    for (n, r, c), value in np.ndenumerate(found):
        k = int(i[0, r, c].item())
        assert value == t[n, k, c] if -2 <= k < 2 else np.isnan(value)


def test_products_with_chosen_matrices_count_from_the_end():
    a, b = normal(3, 4, 5), normal(2, 5, 6)
    lhs, rhs = mx.array([0, -1, 2, 3, 0]), mx.array([1, -2, -3, 0, 2])
    found = both(lambda a, b, i, j: qg.gather_mm(a, b, i, j), a, b, lhs, rhs)
    x, y = np.array(a), np.array(b)
    for k, (i, j) in enumerate(zip([0, 2, 2, None, 0], [1, 0, None, 0, None], strict=True)):
        if i is None or j is None:
            assert np.isnan(found[k]).all()
        else:
            assert_close(found[k], x[i] @ y[j], k=5, path="P2", magnitude=abs(x[i]) @ abs(y[j]))


@pytest.mark.parametrize("transpose", [True, False])
def test_experts_that_are_not_there(transpose):
    w, x = qg.quantize(normal(4, 32, 32), bits=4, group_size=32), normal(6, 1, 32)
    rhs = mx.array([3, 4, -1, -5, 0, 2**30])
    found = both(lambda x, w, i: qg.gather_qmm(x, w, rhs_indices=i, transpose=transpose), x, w, rhs)
    dense = np.array(qg.dequantize(w))
    dense = np.swapaxes(dense, -1, -2) if transpose else dense
    for k, expert in enumerate([3, None, 3, None, 0, None]):
        if expert is None:
            assert np.isnan(found[k]).all()
        else:
            row, matrix = np.array(x)[k], dense[expert]
            assert_close(found[k], row @ matrix, k=32, path="P2", magnitude=abs(row) @ abs(matrix))


def test_counting_from_the_end_gives_up_the_promise_of_an_order():
    def f(x, w, i):
        return qg.gather_mm(x, w, rhs_indices=i, sorted_indices=True)

    def promised(i):
        graph = qg.jit(f).optimized(normal(2, 1, 4), normal(3, 4, 4), i)
        return graph.find("gather_mm")[0].op.sorted_indices

    assert not promised(mx.array([-1, 0]))
    assert promised(mx.array([0, 1], mx.uint32))


def test_rows_of_a_packed_table():
    w = qg.quantize(normal(N, 64), bits=4, group_size=32)
    f = qg.jit(lambda w, i: qg.take(w, i, axis=0))
    found = np.array(f(w, mx.array(IDS)))
    np.testing.assert_array_equal(found, expected(qg.dequantize(w), IDS))
    np.testing.assert_array_equal(np.array(qg.quantized_take(w, mx.array(IDS))), found)
    assert "quantized_take" in f.optimized(w, mx.array(IDS)).histogram()


KINDS = {"set": None, "add": np.add, "subtract": np.subtract, "multiply": np.multiply, "divide": np.divide}
KINDS |= {"maximum": np.maximum, "minimum": np.minimum}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["rows", "middle", "pairs"])
def test_an_update_out_of_range_changes_nothing(kind, place):
    ids = [0, N, -1, -N - 1, 3, 10**6]
    v = normal(6, 2, 3, seed=3) if place == "rows" else normal(6, seed=3)

    def f(t, i, v):
        at = qg.ops.updates.At(t)
        if place == "rows":
            return getattr(at[i], kind)(v)
        if place == "middle":
            return getattr(at[i, 1, 2], kind)(v)
        return getattr(at[i, qg.ops.array([0, 0, 5, 1, -1, 0]), 1], kind)(v)

    found = both(f, TABLE, mx.array(ids), v)
    t, values = np.array(TABLE), np.array(v)
    for k, i in enumerate(ids):
        j = [0, 0, 5, 1, -1, 0][k]
        where = {"rows": (i,), "middle": (i, 1, 2), "pairs": (i, j, 1)}[place]
        if -N <= i < N and (place != "pairs" or -2 <= j < 2):
            t[where] = values[k] if kind == "set" else KINDS[kind](t[where], values[k])
    assert_close(found, t, path="elementwise")


def test_the_last_row_survives_indices_beyond_it():
    """A clip alone would write there."""
    t = mx.zeros((3, 1))
    found = both(
        lambda t, i, v: qg.ops.updates.At(t)[i].set(v), t, mx.array([2, 7]), mx.array([[1.0], [2.0]])
    )
    assert found.tolist() == [[0], [0], [1]]
    found = both(
        lambda t, i, v: qg.put_along_axis(t, i, v, axis=0), t, mx.array([[2], [7], [-9]]), normal(3, 1)
    )
    assert found[:2].tolist() == [[0], [0]]
    assert found[2, 0] == normal(3, 1)[0, 0].item()


@pytest.mark.parametrize("dtype", [mx.int8, mx.uint8, mx.int16, mx.uint32, mx.int64, mx.uint64], ids=str)
@pytest.mark.parametrize("start", [0, 3, 100])
def test_a_block_moves_until_it_fits_whatever_the_dtype_of_its_start(dtype, start):
    x, block = normal(300, 4), normal(2, 2, seed=5)
    i = mx.array([start, start], dtype)
    read = both(lambda x, i: qg.slice(x, i, (0, 1), (2, 2)), x, i)
    row, column = min(start, 298), min(start, 2)
    np.testing.assert_array_equal(read, np.array(x)[row : row + 2, column : column + 2])
    written = np.array(x)
    written[row : row + 2, column : column + 2] = np.array(block)
    np.testing.assert_array_equal(
        both(lambda x, b, i: qg.slice_update(x, b, i, (0, 1)), x, block, i), written
    )
    one = both(lambda x, i: qg.slice(x, i, (0,), (2, 4)), x, i[:1])
    np.testing.assert_array_equal(one, np.array(x)[row : row + 2])


def test_a_start_beyond_every_int32():
    x = normal(5)
    for start, first in ((2**63 + 5, 3), (2**40, 3), (-(2**40), 0)):
        i = mx.array([start - 2**64 if start >= 2**63 else start], mx.int64)
        i = i.view(mx.uint64) if start >= 2**63 else i
        np.testing.assert_array_equal(
            both(lambda x, i: qg.slice(x, i, (0,), (2,)), x, i), np.array(x)[first:][:2]
        )


def test_starts_beyond_what_a_float_counts():
    """Unsigned 64-bit starts next to signed limits would become float32, where 2^24 + 1 is 2^24."""
    place = 2**24 + 1
    x = mx.zeros((2, place + 2), mx.int8)
    x[1, place] = 7
    start = mx.array([1, place], mx.uint64)
    assert both(lambda x, i: qg.slice(x, i, (0, 1), (1, 1)), x, start).tolist() == [[7]]


def test_gradients_pass_a_guarded_take():
    ids = mx.array([1, 1, -1, 9])

    @qg.jit
    def f(t):
        return qg.where(qg.array([True, True, True, False])[:, None], qg.take(t, ids, axis=0), 0.0)

    t = normal(4, 2)
    found = mx.grad(lambda t: (f(t) * mx.array([[2.0], [3.0], [5.0], [7.0]])).sum())(t)
    assert found.tolist() == [[0, 0], [5, 5], [0, 0], [5, 5]]
    plain = qg.jit(lambda t, i: qg.take(t, i, axis=0))
    touched = mx.grad(lambda t: plain(t, ids)[:3].sum())(t)
    assert touched.tolist() == [[0, 0], [2, 2], [0, 0], [1, 1]]


def test_gradients_pass_a_guarded_update():
    ids, v = mx.array([0, 5, -1]), normal(3, 2)
    f = qg.jit(lambda t, v: t.at[ids].add(v))
    to_t, to_v = mx.grad(lambda t, v: f(t, v).sum(), (0, 1))(normal(4, 2), v)
    assert to_t.tolist() == [[1, 1]] * 4
    assert to_v.tolist() == [[1, 1], [0, 0], [1, 1]]


def test_guards_compose_with_vmap_and_compile():
    f = qg.jit(lambda t, i: qg.take(t, i, axis=0))
    t, ids = normal(3, 4), mx.array([[0, 9], [2, -4]])
    for g in (mx.vmap(f, (None, 0)), mx.compile(mx.vmap(f, (None, 0)))):
        found = np.array(g(t, ids))
        assert np.isnan(found[:, 1]).all()
        np.testing.assert_array_equal(found[:, 0], np.array(t)[[0, 2]])


FAR = """
import mlx.core as mx, numpy as np, qgraph as qg
from qgraph.ops.updates import At
t, w = mx.ones((7, 64)), qg.quantize(mx.ones((3, 64, 64)))
for dtype in (mx.int32, mx.uint32, mx.int64, mx.uint64):
    top = 2**31 - 1 if dtype.size == 4 else 2**62
    for far in (64, 10**4, 10**7, top, *([-65, -10**7, -top] if dtype in (mx.int32, mx.int64) else [])):
        i = mx.array([0, far], dtype)
        out = [
            qg.take(t, i, axis=0), qg.take(t, i, axis=1), qg.ops.indexing.getitem(t, (i, i)),
            qg.take_along_axis(t, i[:, None], axis=0),
            qg.gather_mm(t[None], mx.ones((3, 64, 2)), rhs_indices=i),
            qg.gather_qmm(t[None], w, rhs_indices=i), qg.gather_qmm(t[None], w, lhs_indices=i, rhs_indices=i),
            qg.take(w, i, axis=0), qg.take(w, i, axis=1),
        ]
        assert all(bool(mx.any(mx.isnan(x))) for x in out), far
        out = [
            At(t)[i].add(1.0), At(t)[i].set(2.0), At(t)[:, i].multiply(2.0), At(t)[i, i].maximum(9.0),
            qg.put_along_axis(t, i[:, None], mx.zeros((2, 64)), axis=0), qg.slice(t, i, (0, 1), (2, 2)),
            qg.slice_update(t, t[:2, :2], i, (0, 1)),
        ]
        assert all(bool(mx.all(mx.isfinite(x))) for x in out), far
print("alive")
"""


def test_indices_far_out_do_not_end_the_process():
    done = subprocess.run([sys.executable, "-c", FAR], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr[-2000:]

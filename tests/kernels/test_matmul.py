"""The dense product against float64: every layout, batch, dtype and instruction set."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qgraph.execute.reference import to_numpy
from tests.kernels.everywhere import everywhere, problem

DTYPES = (mx.float32, mx.bfloat16, mx.float16)
# Few rows and many, of one vector and of several, around the blocks of the kernels.
ROWS = (1, 2, 3, 4, 5, 7, 16, 17, 40)
SIZES = (1, 2, 7, 8, 15, 16, 17, 33, 64, 100, 300)
LAYOUTS = ("plain", "transposed", "every second", "slice", "one row for all")


def operand(rng, shape, layout, dtype):
    """Random data of order 1 as an array of this shape whose memory is laid out otherwise."""

    def random(shape):
        return mx.array(rng.normal(size=shape)).astype(dtype)

    *batch, rows, columns = shape
    match layout:
        case "transposed":
            return mx.swapaxes(random((*batch, columns, rows)), -1, -2)
        case "every second":
            return random((*batch, rows, 2 * columns))[..., 1::2]
        case "slice":
            return random((*batch, rows + 3, columns + 5))[..., 2 : rows + 2, 3 : columns + 3]
        case "one row for all":
            return mx.broadcast_to(random((*batch, 1, columns)), shape)
    return random(shape)


def check(found, a, b, about=None):
    """`found` is a @ b, within what float32 sums and one rounding allow."""
    a64, b64 = to_numpy(a), to_numpy(b)
    exact, magnitude = np.matmul(a64, b64), np.matmul(abs(a64), abs(b64))
    wrong = problem(found, exact, magnitude, a.shape[-1])
    assert not wrong, (wrong, about)


def check_everywhere(native, a, b):
    for name, found in everywhere(native, lambda: native.matmul(a, b)):
        check(found, a, b, (name, a.shape, b.shape))


@given(
    m=st.sampled_from(ROWS),
    k=st.sampled_from(SIZES),
    n=st.sampled_from(SIZES),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_matrices(native, m, k, n, layouts, dtype, seed):
    rng = np.random.default_rng(seed)
    a, b = (
        operand(rng, shape, layout, dtype) for shape, layout in zip(((m, k), (k, n)), layouts, strict=True)
    )
    check_everywhere(native, a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["plain", "transposed"])
@pytest.mark.parametrize("m", ROWS)
def test_rows_and_layouts(native, m, layout, dtype):
    """Each kernel of its own number of rows, with whole vectors and with remainders."""
    rng = np.random.default_rng(m)
    for k, n in ((48, 64), (37, 21)):
        check_everywhere(native, operand(rng, (m, k), "plain", dtype), operand(rng, (k, n), layout, dtype))


@given(
    batches=st.sampled_from(
        [((3,), ()), ((3,), (3,)), ((2, 3), ()), ((2, 1), (3,)), ((), (4,)), ((1,), (5,)), ((2, 3), (2, 3))]
    ),
    sizes=st.tuples(st.sampled_from((1, 3, 16)), st.sampled_from((1, 16, 64)), st.sampled_from((1, 9, 16))),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_batches(native, batches, sizes, layouts, dtype, seed):
    rng = np.random.default_rng(seed)
    m, k, n = sizes
    shapes = (*batches[0], m, k), (*batches[1], k, n)
    a, b = (operand(rng, shape, layout, dtype) for shape, layout in zip(shapes, layouts, strict=True))
    check_everywhere(native, a, b)


def test_batches_in_another_order(native):
    """Heads before positions, as a model's transpose gives them, and every second matrix of a stack."""
    rng = np.random.default_rng(0)
    a, b = (operand(rng, shape, "plain", mx.float32) for shape in ((2, 5, 3, 16), (2, 16, 3, 7)))
    check_everywhere(native, mx.swapaxes(a, 1, 2), mx.swapaxes(b, 1, 2))
    stack, w = (operand(rng, shape, "plain", mx.float32) for shape in ((6, 4, 16), (16, 9)))
    check_everywhere(native, stack[::2], w)
    check_everywhere(native, mx.swapaxes(stack, 0, 1), w)


@pytest.mark.parametrize(
    ("left", "right"), [((7,), (7,)), ((7,), (3, 7, 5)), ((3, 5, 7), (7,)), ((7,), (7, 5))]
)
def test_vectors(native, left, right):
    rng = np.random.default_rng(0)
    a, b = (mx.array(rng.normal(size=shape)).astype(mx.bfloat16) for shape in (left, right))
    assert native.matmul(a, b).shape == mx.matmul(a, b).shape
    check_everywhere(native, a, b)


@pytest.mark.parametrize(
    "shapes", [((300, 600), (600, 200)), ((3, 280, 1100), (3, 1100, 210)), ((1, 3000), (3000, 700))]
)
@pytest.mark.parametrize("turned", [False, True])
def test_large(native, shapes, turned):
    """Several panels, blocks of rows and tasks."""
    rng = np.random.default_rng(1)
    a = operand(rng, shapes[0], "transposed" if turned else "plain", mx.bfloat16)
    b = operand(rng, shapes[1], "transposed" if turned else "plain", mx.bfloat16)
    check_everywhere(native, a, b)


@pytest.mark.parametrize("m", [1, 4, 9, 40])
def test_exact(native, m):
    """Sums of small whole numbers and of one-hot rows have no rounding."""
    rng = np.random.default_rng(m)
    a, b = (mx.array(rng.integers(-8, 9, shape).astype(np.float32)) for shape in ((m, 70), (70, 50)))
    one_hot = mx.array(np.eye(70, dtype=np.float32)[rng.integers(0, 70, m)])
    for x in (a, one_hot):
        for dtype in DTYPES:
            exact = mx.array(to_numpy(x) @ to_numpy(b)).astype(dtype)
            for _, found in everywhere(native, lambda x=x, t=dtype: native.matmul(x.astype(t), b.astype(t))):
                assert mx.array_equal(found, exact)


def test_cancelling_sums_in_half_precision(native):
    """Sums are in float32: 1 + 2048 ones - 2048 is lost in either half format."""
    a = mx.ones((3, 4097), mx.bfloat16)
    b = mx.concatenate([mx.ones((2049, 1)), -mx.ones((2048, 1))]).astype(mx.bfloat16)
    for _, found in everywhere(native, lambda: native.matmul(a, b)):
        assert found.tolist() == [[1.0]] * 3


@pytest.mark.parametrize("m", [2, 40])
@pytest.mark.parametrize("layout", ["plain", "transposed"])
def test_nan_and_infinity_stay_in_their_row_and_column(native, m, layout):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(m, 33)), rng.normal(size=(33, 20))
    a[1, 5], b[3, 2] = np.nan, np.inf
    with np.errstate(invalid="ignore"):
        exact = a @ b
    b = mx.array(b.T).T if layout == "transposed" else mx.array(b)
    for dtype in DTYPES:
        for _, found in everywhere(native, lambda t=dtype: native.matmul(mx.array(a).astype(t), b.astype(t))):
            assert np.array_equal(np.isnan(to_numpy(found)), np.isnan(exact))
            assert np.array_equal(np.isinf(to_numpy(found)), np.isinf(exact))


@pytest.mark.parametrize(
    "shapes",
    [
        ((0, 4), (4, 3)),
        ((2, 4), (4, 0)),
        ((2, 0), (0, 3)),
        ((0, 2, 4), (4, 3)),
        ((3, 2, 0), (3, 0, 5)),
        ((0,), (0,)),
    ],
)
def test_empty(native, shapes):
    found = native.matmul(*map(mx.ones, shapes))
    assert np.array_equal(to_numpy(found), np.matmul(*map(np.ones, shapes)))


def test_dtypes_are_promoted(native):
    a, b = mx.ones((2, 3), mx.float16), mx.ones((3, 2), mx.bfloat16)
    for x, y in ((a, a.T), (a, b), (b, a.astype(mx.float32))):
        x = x.reshape(2, 3)
        y = y.reshape(3, 2)
        assert native.matmul(x, y).dtype == mx.matmul(x, y).dtype


@pytest.mark.parametrize("shapes", [((2, 3), (4, 5)), ((), (3,)), ((2, 2, 3), (3, 3, 4))])
def test_refused(native, shapes):
    with pytest.raises(ValueError, match=r"matmul|broadcast"):
        native.matmul(*map(mx.ones, shapes))
    with pytest.raises(ValueError, match="dtype"):
        native.matmul(mx.ones((2, 2), mx.int32), mx.ones((2, 2), mx.int32))


TRANSFORMED = [
    ((5, 7), (7, 3)),
    ((2, 5, 7), (7, 3)),
    ((2, 1, 5, 7), (3, 7, 4)),
    ((7,), (7, 3)),
    ((5, 7), (7,)),
    ((7,), (7,)),
]


@pytest.mark.parametrize(("left", "right"), TRANSFORMED)
def test_gradients(native, left, right):
    rng = np.random.default_rng(0)
    a, b = (mx.array(rng.normal(size=shape).astype(np.float32)) for shape in (left, right))
    weights = mx.array(rng.normal(size=mx.matmul(a, b).shape).astype(np.float32))

    def gradients(multiply):
        return mx.grad(lambda a, b: mx.sum(multiply(a, b) * weights), argnums=(0, 1))(a, b)

    for found, expected in zip(gradients(native.matmul), gradients(mx.matmul), strict=True):
        assert found.shape == expected.shape
        expected = to_numpy(expected)
        wrong = problem(found, expected, np.max(abs(expected)), a.size + b.size)
        assert not wrong
    (tangent,) = mx.jvp(native.matmul, [a, b], [a, b])[1]
    check(tangent / 2, a, b)


@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 0), (1, 1), (-1, 0)])
@pytest.mark.parametrize(
    ("left", "right"), [((5, 4, 6), (5, 6, 3)), ((5, 2, 4, 6), (5, 6, 3)), ((5, 6), (5, 6))]
)
def test_vmap(native, left, right, axes):
    rng = np.random.default_rng(0)
    operands = [mx.array(rng.normal(size=shape).astype(np.float32)) for shape in (left, right)]
    moved = [
        x[0] if axis is None else mx.moveaxis(x, 0, axis) for x, axis in zip(operands, axes, strict=True)
    ]
    found = mx.vmap(native.matmul, in_axes=axes)(*moved)
    each = [
        [x if axis is not None else mx.broadcast_to(x[:1], x.shape)][0]
        for x, axis in zip(operands, axes, strict=True)
    ]
    expected = mx.stack([mx.matmul(a, b) for a, b in zip(*each, strict=True)])
    assert found.shape == expected.shape
    wrong = problem(found, to_numpy(expected), 6, 6)
    assert not wrong


def test_equal_products_are_one_in_a_compiled_graph(native):
    a, b = mx.ones((2, 3)), mx.ones((3, 4))
    f = mx.compile(lambda a, b: native.matmul(a, b) + native.matmul(a, b))
    assert mx.array_equal(f(a, b), mx.full((2, 4), 6.0))

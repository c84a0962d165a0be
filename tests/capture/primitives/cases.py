"""For every primitive by name, a strategy that draws functions of MLX calls which emit it."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np
from hypothesis import strategies as st

from qgraph.ir.dtypes import BF16, BOOL, F16, F32, I8, I32, I64, U8, U32
from tests.capture.primitives.replay import Case
from tests.ops.cases import ANY, FLOATS, INTS, SIGNED, broadcasting, data, seeds, shapes

CASES: dict[str, st.SearchStrategy[Case]] = {}
Draw = Callable[..., object]


def case(*names: str):
    """Register ``strategy(draw, name)`` for some primitives."""

    def add(function):
        for name in names:
            CASES[name] = st.composite(function)(name)
        return function

    return add


def drawn(draw, shape=None, dtypes=FLOATS, **limits):
    """An array of order 1."""
    shape = draw(shapes(0)) if shape is None else shape
    return data(draw(seeds), shape, draw(st.sampled_from(dtypes)), **limits)


def places(draw, shape, n, dtypes=(I32, U32, I64, U8, I8)):
    """Indices in range; some count from the end."""
    dtype = draw(st.sampled_from(dtypes))
    low = 0 if dtype.name[0] == "u" else -n
    return data(draw(seeds), shape, dtype, low=low, high=n)


def axis_in(draw, x):
    return draw(st.integers(-x.ndim, x.ndim - 1))


# Elementwise


def unary(text: str, dtypes=FLOATS, **limits):
    """One case each for ``Primitive=function`` words."""
    for word in text.split():
        name, _, function = word.partition("=")
        CASES[name] = _unary(getattr(mx, function), dtypes, limits)


@st.composite
def _unary(draw, function, dtypes, limits):
    return Case(function, [drawn(draw, None, dtypes, **limits)], magnitude=4.0)


def binary(text: str, dtypes=FLOATS, second=None, **limits):
    """The same for functions of two arrays, which broadcast and promote."""
    for word in text.split():
        name, _, function = word.partition("=")
        CASES[name] = _binary(getattr(mx, function), dtypes, limits, second or limits)


@st.composite
def _binary(draw, function, dtypes, first, second):
    a, b = draw(broadcasting(2))
    x, y = drawn(draw, a, dtypes, **first), drawn(draw, b, dtypes, **second)
    if draw(st.integers(0, 3)) == 0:
        number = draw(st.sampled_from([1, 2] if dtypes[0].is_int else [2, 0.5]))
        return Case(lambda x: function(x, number), [x], magnitude=16.0)
    return Case(function, [x, y], magnitude=16.0)


unary("Abs=abs Negative=negative Sign=sign Square=square", (*FLOATS, *SIGNED))
unary("Ceil=ceil Floor=floor Round=round", grid=True)
unary("ArcCos=arccos ArcSin=arcsin ArcTanh=arctanh Erf=erf ErfInv=erfinv", low=-0.9, high=0.9)
unary("ArcCosh=arccosh Log1p=log1p", low=1.1, high=4)
unary("ArcSinh=arcsinh ArcTan=arctan Cos=cos Cosh=cosh Exp=exp Expm1=expm1", (*FLOATS, I32), low=-2, high=2)
unary("Sigmoid=sigmoid Sin=sin Sinh=sinh Tan=tan Tanh=tanh", (*FLOATS, I32), low=-1.3, high=1.3)
unary("LogicalNot=logical_not", ANY)
binary("Add=add Multiply=multiply Subtract=subtract", (*FLOATS, *INTS))
binary("Maximum=maximum Minimum=minimum", ANY, grid=True)
binary("Greater=greater GreaterEqual=greater_equal Less=less LessEqual=less_equal", ANY, grid=True)
binary("NotEqual=not_equal LogicalAnd=logical_and LogicalOr=logical_or", ANY, grid=True)
binary("ArcTan2=arctan2 LogAddExp=logaddexp")
binary("Divide=divide", (*FLOATS, I32), second={"low": 1, "high": 5})
binary(
    "DivMod=divmod FloorDivide=floor_divide Remainder=remainder", (F32, I32), {"low": 1, "high": 5}, grid=True
)
binary("Power=power", low=0.2, high=2.0)


@case("Sqrt")
def sqrt(draw, name):
    function = draw(st.sampled_from([mx.sqrt, mx.rsqrt]))
    return Case(function, [drawn(draw, low=0.5, high=9)], notes={"f": function.__name__}, magnitude=4.0)


@case("Log")
def log(draw, name):
    return Case(
        draw(st.sampled_from([mx.log, mx.log2, mx.log10])), [drawn(draw, low=1, high=9)], magnitude=4.0
    )


@case("Equal")
def equal(draw, name):
    a, b = draw(broadcasting(2))
    x, y = drawn(draw, a, ANY, grid=True), drawn(draw, b, ANY, grid=True)
    if draw(st.booleans()):
        holes = mx.where(drawn(draw, (3, 4), (BOOL,)), mx.nan, drawn(draw, (3, 4), (F32,)))
        other = holes if draw(st.booleans()) else mx.where(drawn(draw, (3, 4), (BOOL,)), mx.nan, holes)
        equal_nan = draw(st.booleans())
        return Case(lambda x, y: mx.array_equal(x, y, equal_nan=equal_nan), [holes, other])
    return Case(mx.equal, [x, y])


@case("BitwiseBinary")
def bitwise(draw, name):
    function = draw(
        st.sampled_from([mx.bitwise_and, mx.bitwise_or, mx.bitwise_xor, mx.left_shift, mx.right_shift])
    )
    a, b = draw(broadcasting(2))
    dtype = draw(st.sampled_from(INTS))
    return Case(
        function, [drawn(draw, s, (dtype,), low=0, high=5) for s in (a, b)], notes={"f": str(function)}
    )


@case("Select")
def select(draw, name):
    c, x, y = draw(broadcasting(3))
    return Case(
        mx.where, [drawn(draw, c, (BOOL,)), drawn(draw, x, (*FLOATS, I32)), drawn(draw, y, (*FLOATS, I32))]
    )


@case("AsType")
def cast(draw, name):
    x, dtype = drawn(draw, None, ANY, low=0, high=9, grid=True), draw(st.sampled_from(ANY))
    target = dtype.mlx if dtype.mlx != x.dtype else mx.float32 if dtype is not F32 else mx.int32
    return Case(lambda x: x.astype(target), [x])


@case("Real", "Imag", "Conjugate")
def part(draw, name):
    shape = draw(shapes(0))
    x, y = drawn(draw, shape, (F32,)), drawn(draw, shape, (F32,))
    function = getattr(mx, name.lower())
    return Case(lambda x, y: function(x + 1j * y), [x, y])


@case("Full")
def full(draw, name):
    shape = draw(shapes(1))
    value = drawn(draw, draw(broadcasting(1, shape))[0], (*FLOATS, I32))
    return Case(lambda v: mx.full(shape, v), [value])


@case("Depends")
def depends(draw, name):
    x, y = drawn(draw), drawn(draw)
    return Case(lambda x, y: mx.depends([x, x + 1], [mx.exp(y)]), [x, y])


@case("View")
def view(draw, name):
    x = drawn(draw, (*draw(shapes(0, 3)), 8), (F32, F16, BF16, I32, I8, U8))
    target = draw(st.sampled_from([mx.int8, mx.uint16, mx.int32, mx.uint32]))
    target = target if target != x.dtype else mx.uint8
    return Case(lambda x: mx.view(x, target), [x])


# Shapes


def parts_of(draw, n):
    """Two factors of a size."""
    a = draw(st.sampled_from([f for f in range(1, n + 1) if n % f == 0] or [1]))
    return (a, n // a)


@case("Transpose")
def transpose(draw, name):
    x = drawn(draw, draw(shapes(2)), ANY)
    axes = draw(st.permutations(range(x.ndim)))
    how = draw(st.sampled_from(["axes", "einsum"]))
    if how == "einsum" and x.ndim == 2 and x.dtype == mx.float32:
        return Case(lambda x: mx.einsum("ij,kj->ik", x, x), [x], k=max(1, x.shape[1]))
    return Case(lambda x: mx.transpose(x, axes) + 0, [x])


@case("Reshape", "Flatten", "Unflatten", "ExpandDims", "Squeeze")
def reshape(draw, name):
    x = drawn(draw, draw(shapes(2, 4)), ANY)
    i = draw(st.integers(0, x.ndim - 2))
    if name == "Reshape":
        shape = draw(st.permutations(x.shape))
        keep = -1 if 0 not in shape and draw(st.booleans()) else shape[0]
        return Case(lambda x: mx.reshape(x, (keep, *shape[1:], 1)), [x])
    if name == "Flatten":
        return Case(lambda x: mx.flatten(x, i, i + 1), [x])
    if name == "Unflatten":
        two = parts_of(draw, x.shape[i])
        return Case(lambda x: mx.unflatten(x, i, two if x.shape[i] else (1, 0)), [x])
    axes = tuple(sorted({i, draw(st.integers(0, x.ndim))}))
    if name == "ExpandDims":
        return Case(lambda x: mx.expand_dims(x, axes), [x])
    return Case(lambda x: mx.squeeze(mx.sum(x, axes[:1], keepdims=True), axes[:1]), [x], k=7, magnitude=20.0)


@case("Broadcast")
def broadcast(draw, name):
    small, full = draw(broadcasting(2))
    full = (2, *np.broadcast_shapes(small, full))
    return Case(lambda x: mx.broadcast_to(x, full), [drawn(draw, small, ANY)])


@case("Slice")
def slice_(draw, name):
    x = drawn(draw, draw(shapes(1)), ANY)
    end = [st.none() | st.integers(-n - 1, n + 1) for n in x.shape]
    index = tuple(slice(draw(e), draw(e), draw(st.sampled_from([1, 2, 3, -1, -2, None]))) for e in end)
    return Case(lambda x: x[(*index, None)], [x], notes={"index": index})


@case("Split")
def split(draw, name):
    x = drawn(draw, draw(shapes(1, empty=False)), ANY)
    axis = axis_in(draw, x)
    n = x.shape[axis]
    cuts = draw(st.sampled_from([n, sorted(draw(st.lists(st.integers(0, n), max_size=3)))]))
    if cuts == 1 or cuts == []:
        cuts = [0]
    return Case(lambda x: mx.split(x, cuts, axis), [x], notes={"cuts": cuts})


@case("Concatenate")
def concatenate(draw, name):
    shape = list(draw(shapes(1)))
    axis = draw(st.integers(0, len(shape) - 1))
    arrays = []
    for _ in range(draw(st.integers(2, 3))):
        shape[axis] = draw(st.integers(0, 3))
        arrays.append(drawn(draw, tuple(shape), FLOATS))
    return Case(lambda *x: mx.concatenate(list(x), axis), arrays)


@case("Pad")
def pad(draw, name):
    x = drawn(draw, draw(shapes(1)), (*FLOATS, I32))
    axes = draw(st.integers(1, x.ndim))
    width = [(draw(st.integers(0, 2)), draw(st.integers(0, 2))) for _ in range(axes)]
    width = [*[(0, 1)] * (x.ndim - axes), *width]
    return Case(lambda x: mx.pad(x, width, constant_values=2), [x], notes={"width": width})


@case("Arange")
def arange(draw, name):
    start, n = draw(st.integers(-9, 9)), draw(st.integers(0, 5))
    kind = draw(st.sampled_from(["int", "float", "typed"]))
    step = draw(st.sampled_from([0.1, 0.5, -0.3] if kind == "float" else [1, 2, -1, 3]))
    dtype = draw(st.sampled_from([mx.int64, mx.uint8, mx.float32, mx.bfloat16])) if kind == "typed" else None
    if str(dtype) == str(mx.uint8):
        start, step = abs(start), abs(step)
    stop = start + n * step + draw(st.sampled_from([0, step / 2 if kind != "int" else 0]))
    return Case(lambda x: [mx.arange(start, stop, step, dtype=dtype), x + 1], [drawn(draw, (), (F32,))])


@case("AsStrided")
def as_strided(draw, name):
    x = drawn(draw, (4, 6), (*FLOATS, I32))
    shape, strides = draw(st.sampled_from([((3, 2), (1, 2)), ((2, 3), (6, 1)), ((4,), (-2,)), ((), ())]))
    offset = draw(st.integers(6, 12))
    return Case(lambda x: mx.as_strided(x, shape, strides, offset), [x])

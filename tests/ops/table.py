"""The table of the sweep: for every op by name, a strategy that draws cases of it."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from hypothesis import strategies as st

from qgraph.ir.dtypes import BF16, BOOL, F16, F32, I32, U32, DType
from qgraph.kernels import library
from qgraph.ops.dispatch import type_of
from tests.ops import table_captured as table_captured
from tests.ops.cases import (
    ANY,
    FLOATS,
    INTS,
    SIGNED,
    Case,
    arrays,
    axis_of,
    broadcasting,
    data,
    indices,
    packed,
    seeds,
    shapes,
    turned,
)
from tests.ops.table_shapes import TABLE, entry

__all__ = ["TABLE"]  # the one table: `entry` adds to it here, in table_shapes and in table_captured


def unary(names, compare, dtypes=FLOATS, **limits):
    for name in names.split():

        @entry(name)
        def case(draw, kind):
            return Case(kind(), [draw(arrays(draw(shapes(0)), dtypes, **limits))], compare)


def binary(names, compare, dtypes=FLOATS, low=None, high=None, second=None, grid=False):
    for name in names.split():

        @entry(name)
        def case(draw, kind):
            a, b = draw(broadcasting(2))
            dtype = draw(st.sampled_from(dtypes))
            x = data(draw(seeds), a, dtype, low=low, high=high, grid=grid)
            other = second or (low, high)
            y = data(draw(seeds), b, dtype, low=other[0], high=other[1], grid=grid)
            return Case(kind(), [x, y], compare)


unary("negative abs sign square", "near", (*FLOATS, *SIGNED))
unary("floor ceil round", "exact", FLOATS, grid=True)
unary(
    "exp expm1 sin cos tan arctan sinh cosh tanh erf sigmoid silu gelu",
    "near",
    (*FLOATS, I32),
    low=-2,
    high=2,
)
unary("log log2 log10 log1p sqrt rsqrt reciprocal", "near", (*FLOATS, U32), low=1, high=9)
unary("arcsin arccos arctanh", "near", low=-0.9, high=0.9)
unary("arcsinh arccosh", "near", low=1.1, high=4)
unary("bitwise_invert", "exact", (*INTS, BOOL))
unary("relu logical_not", "exact", (*FLOATS, *SIGNED))
unary("isnan isinf isfinite", "exact", ANY)
binary("add subtract multiply", "near", (*FLOATS, *INTS))
binary("maximum minimum equal not_equal less less_equal greater greater_equal", "exact", ANY, grid=True)
binary("logical_and logical_or", "exact", ANY, grid=True)
binary("divide", "near", (*FLOATS, I32), second=(1, 5))
binary("floor_divide remainder", "exact", (*FLOATS, I32), grid=True, second=(1, 5))
binary("power", "near", FLOATS, low=0.2, high=2.0)
binary("logaddexp arctan2", "near", FLOATS)
binary("bitwise_and bitwise_or bitwise_xor", "exact", (*INTS, BOOL))
binary("left_shift right_shift", "exact", INTS, low=0, high=4)


@entry("where")
def where(draw, kind):
    c, x, y = draw(broadcasting(3))
    dtypes = draw(st.sampled_from([(F32, F32), (BF16, F32), (I32, F16), (I32, I32)]))
    return Case(kind(), [data(draw(seeds), s, d) for s, d in zip((c, x, y), (BOOL, *dtypes), strict=True)])


@entry("cast")
def cast(draw, kind):
    return Case(kind(draw(st.sampled_from(ANY))), [draw(arrays(dtypes=ANY, low=0, high=9, grid=True))])


CHAINS = [
    (("constant", (), (0.5,), (), F32), ("add", (0, 1)), ("multiply", (3, 2))),
    (("silu", (0,)), ("multiply", (2, 1))),
    (("less", (0, 1)), ("tanh", (1,)), ("where", (2, 0, 3))),
    (("cast", (0,), F32), ("logaddexp", (2, 1)), ("cast", (3,), BF16)),
]


@entry("elementwise")
def elementwise(draw, kind):
    a, b = (data(draw(seeds), shape, draw(st.sampled_from(FLOATS))) for shape in draw(broadcasting(2)))
    op = kind(draw(st.sampled_from(CHAINS)))
    kernel = op.native((type_of(a), type_of(b)), ()) if library() and draw(st.booleans()) else None
    return Case(kernel or op, [a, b], "near")


# Creation


@entry("arange")
def arange(draw, kind):
    start, step = draw(st.integers(-20, 20)), draw(st.sampled_from([-3, -1, 1, 2, 0.5]))
    dtype: DType = draw(st.sampled_from([F32, I32, BF16] if isinstance(step, int) else [F32]))
    return Case(kind(start, draw(st.integers(-20, 20)), step, dtype))


@entry("linspace")
def linspace(draw, kind):
    op = kind(draw(st.floats(-2, 2)), draw(st.floats(-2, 2)), draw(st.integers(0, 9)), draw(st.booleans()))
    return Case(op, [], "near")


@entry("eye", "tri")
def eye(draw, kind):
    n, m = draw(st.integers(0, 5)), draw(st.integers(0, 5))
    return Case(kind(n, m, draw(st.integers(-6, 6)), draw(st.sampled_from([F32, BF16, I32, BOOL]))))


# Products


@entry("dot")
def dot(draw, kind):
    a, b = draw(broadcasting(2, draw(shapes(0, 2))))
    m, k, n = (draw(st.sampled_from([1, 2, 3, 8, 17, 33, 0])) for _ in range(3))
    left, right = (*a, m, k), (*b, k, n)
    left = left[-1:] if not a and draw(st.booleans()) else left
    right = right[:1] if not b and draw(st.booleans()) else right
    operands = [data(draw(seeds), s, draw(st.sampled_from(FLOATS))) for s in (left, right)]
    return Case(kind(), operands, "sum", max(1, k))


@entry("quantized_matmul", "quantized_lora_matmul")
def quantized_matmul(draw, kind):
    transpose = draw(st.booleans())
    w = draw(packed(lead=(draw(st.sampled_from([1, 3, 8])) if transpose else 32,)))
    n, k = w.shape if transpose else w.shape[::-1]
    x = data(draw(seeds), (*draw(shapes(0, 2)), k), F32)
    if kind.name == "quantized_matmul":
        return Case(kind(transpose), [x, w], "sum", k)
    r = draw(st.integers(1, 4))
    rest = [data(draw(seeds), s, F32) for s in ((k, r), (r, n), ())]
    return Case(kind(transpose), [x, w, *rest], "sum", k)


@entry("quantized_take")
def quantized_take(draw, kind):
    w = draw(packed())
    axis = draw(st.integers(0, w.ndim - 2))
    return Case(kind(axis), [w, indices(draw(seeds), draw(shapes(0, 2)), w.shape[axis])], "sum", 1, 4.0)


@entry("dequantize")
def dequantize(draw, kind):
    w = draw(packed())
    return Case(kind(), [turned(w) if draw(st.booleans()) else w], "sum", 1, 4.0)


@entry("quantize")
def quantize(draw, kind):
    w = draw(packed())
    shape = (2, *w.shape)  # MLX packs 32 numbers at a time
    return Case(kind(w.quantization), [data(draw(seeds), shape, draw(st.sampled_from(FLOATS)))], "type")


@entry("gather_mm", "gather_qmm")
def gather_mm(draw, kind):
    lhs, rhs = draw(st.booleans()), draw(st.booleans())
    batch = draw(shapes(0, 2))
    stacks = [draw(st.sampled_from([(2,), (1, 3)])) if given else batch for given in (lhs, rhs)]
    m, n, k = draw(st.integers(0, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 9))
    extra = {}
    if kind.name == "gather_mm":
        b = data(draw(seeds), (*stacks[1], k, n), draw(st.sampled_from(FLOATS)))
    else:
        extra["transpose"] = draw(st.booleans())
        b = draw(packed(lead=(*(s or 1 for s in stacks[1]), n if extra["transpose"] else 32)))
        stacks = [stacks[0] if lhs else b.shape[:-2], b.shape[:-2]]
        batch = batch if rhs and lhs else b.shape[:-2]
        k = b.shape[-1] if extra["transpose"] else 32
    a = data(draw(seeds), (*stacks[0], m, k), F32)
    where = [
        indices(draw(seeds), batch, int(np.prod(s)), U32)
        for s, given in zip(stacks, (lhs, rhs), strict=True)
        if given
    ]
    return Case(kind(lhs, rhs, False, **extra), [a, b, *where], "sum", k)


# Networks


@entry("rms_norm", "layer_norm")
def norm(draw, kind):
    dtype = draw(st.sampled_from(FLOATS))
    shape = draw(shapes(1, 4))
    given = [draw(st.booleans()) for _ in range(1 if kind.name == "rms_norm" else 2)]
    rest = [data(draw(seeds), shape[-1:], draw(st.sampled_from([dtype, F32]))) for g in given if g]
    eps = draw(st.sampled_from([1e-5, 1e-2]))
    op = kind(eps) if kind.name == "rms_norm" else kind(eps, *given)
    # A row of one or two nearly equal numbers: the difference of the mean is a rounding error over sqrt(eps).
    return Case(op, [data(draw(seeds), shape, dtype), *rest], "sum", max(1, shape[-1]), 16.0 / eps**0.5)


@entry("rope")
def rope(draw, kind):
    shape = (*draw(shapes(2, 3)), draw(st.sampled_from([4, 6, 8])))
    dims = draw(st.sampled_from([2, 4, shape[-1]]))
    offset = draw(st.sampled_from([0, 3, None]))
    base = draw(st.sampled_from([10000.0, 100.0, None]))
    rest = []
    if offset is None:
        batch = draw(st.sampled_from([(), (1,), shape[:1]]))
        rest.append(data(draw(seeds), batch, I32, low=0, high=9))
    if base is None:
        rest.append(data(draw(seeds), (dims // 2,), F32, low=1.0, high=4.0))
    op = kind(dims, draw(st.booleans()), base, draw(st.sampled_from([1.0, 0.5])), offset)
    return Case(op, [data(draw(seeds), shape, draw(st.sampled_from(FLOATS))), *rest], "sum", 1, 16.0)


@entry("rope_angles")
def rope_angles(draw, kind):
    dims = draw(st.sampled_from([2, 4, 8]))
    offset = draw(st.sampled_from([0, 3, None]))
    base = draw(st.sampled_from([10000.0, 100.0, None]))
    rest = []
    if offset is None:
        batch = draw(st.sampled_from([(), (1,), (3,)]))
        rest.append(data(draw(seeds), batch, I32, low=0, high=9))
    if base is None:
        rest.append(data(draw(seeds), (dims // 2,), F32, low=1.0, high=4.0))
    op = kind(dims, base, draw(st.sampled_from([1.0, 0.5])), offset, draw(st.integers(1, 5)))
    return Case(op, rest, "sum", 1, 16.0)


@entry("scaled_dot_product_attention")
def attention(draw, kind):
    b, kv, groups, length, keys, d, dv = (draw(st.integers(1, 4)) for _ in range(7))
    h = kv * groups
    dtype = draw(st.sampled_from(FLOATS))
    mask = draw(st.sampled_from([None, "causal", "bool", "add"]))
    qkv = [data(draw(seeds), s, dtype) for s in ((b, h, length, d), (b, kv, keys, d), (b, kv, keys, dv))]
    rest = []
    if mask in ("bool", "add"):
        (shape,) = draw(broadcasting(1, (b, h, length, keys)))
        rest.append(data(draw(seeds), shape, BOOL if mask == "bool" else dtype))
    sinks = draw(st.booleans())
    if sinks:
        rest.append(data(draw(seeds), (h,), dtype))
    op = kind(0.5, "array" if mask in ("bool", "add") else mask, sinks)
    return Case(op, [*qkv, *rest], "sum", keys + d, 16.0)


# Random numbers: their reference is MLX itself, so they must be equal.


@entry("random_key", "random_split", "random_permutation")
def keys(draw, kind):
    if kind.name == "random_key":
        return Case(kind(draw(st.integers(0, 2**40))))
    return Case(kind(draw(st.integers(0, 5))), [mx.random.key(draw(st.integers(0, 99)))])


@entry("random_uniform", "random_truncated_normal", "random_randint", "random_gumbel")
def drawn(draw, kind):
    shape = draw(shapes(0, 3))
    whole = kind.name == "random_randint"
    dtype = draw(st.sampled_from([I32, U32] if whole else FLOATS))
    parts = draw(broadcasting(2, shape))
    limits = [
        mx.full(s, v).astype(mx.int32 if whole else dtype.mlx) for s, v in zip(parts, (0, 3), strict=True)
    ]
    limits = [] if kind.name in ("random_gumbel") else limits
    return Case(kind(shape, dtype), [mx.random.key(draw(st.integers(0, 99))), *limits])


@entry("random_normal")
def normal(draw, kind):
    shape, dtype = draw(shapes(0, 3)), draw(st.sampled_from(FLOATS))
    loc, scale = draw(st.booleans()), draw(st.booleans())
    rest = [data(draw(seeds), draw(broadcasting(1, shape))[0], dtype) for given in (loc, scale) if given]
    return Case(kind(shape, dtype, loc, scale), [mx.random.key(draw(st.integers(0, 99))), *rest])


@entry("random_bernoulli")
def bernoulli(draw, kind):
    shape = draw(shapes(0, 3))
    (p,) = draw(broadcasting(1, shape))
    return Case(
        kind(shape), [mx.random.key(draw(st.integers(0, 99))), data(draw(seeds), p, F32, low=0, high=1)]
    )


@entry("random_categorical")
def categorical(draw, kind):
    x = draw(arrays(draw(shapes(empty=False)), FLOATS))
    axis = axis_of(draw, x.shape)
    rest = tuple(n for i, n in enumerate(x.shape) if i != axis)
    how = draw(st.sampled_from([(None, None), (None, 3), ((2, *rest), None)]))
    return Case(kind(axis, *how), [mx.random.key(draw(st.integers(0, 99))), x])

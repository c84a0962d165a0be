"""The part of the table on shapes, reductions and indexing; `table` adds the other ops."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from hypothesis import strategies as st

from qgraph.ir.dtypes import BF16, BOOL, F32, I32, U32
from qgraph.ir.op import Op
from qgraph.ops.dispatch import type_of
from tests.ops.cases import (
    ANY,
    FLOATS,
    INDEX_DTYPES,
    INTS,
    Case,
    arrays,
    axes_of,
    axis_of,
    broadcasting,
    data,
    indices,
    seeds,
    shapes,
    sizes,
)

TABLE = {}
R = Op.registry


def entry(*names):
    """Register ``strategy(draw, op class)`` for some ops."""

    def add(function):
        for name in names:
            TABLE[name] = st.composite(function)(R[name])
        return function

    return add


# Shapes


@entry("transpose")
def transpose(draw, kind):
    x = draw(arrays(draw(shapes(0)), ANY))
    return Case(kind(tuple(draw(st.permutations(range(x.ndim))))), [x])


@entry("reshape")
def reshape(draw, kind):
    x = draw(arrays(draw(shapes(0)), ANY))
    order = draw(st.permutations(x.shape))
    new = (*order[:1], int(np.prod(order[1:3])), *order[3:]) if len(order) > 1 else (*order, 1)
    return Case(kind(new), [x])


@entry("broadcast_to")
def broadcast_to(draw, kind):
    small, full = draw(broadcasting(2))
    full = np.broadcast_shapes(small, full)
    return Case(kind(full), [data(draw(seeds), small, draw(st.sampled_from(ANY)))])


@entry("slice")
def slice_(draw, kind):
    x = draw(arrays(dtypes=ANY))
    ranges = [range(*draw(st.slices(n)).indices(n)) for n in x.shape]
    ranges = [(r.start, r.stop, r.step) if r else (0, 0, 1) for r in ranges]
    return Case(kind(*zip(*ranges, strict=True)), [x])


@entry("concatenate")
def concatenate(draw, kind):
    shape = draw(shapes())
    axis = axis_of(draw, shape)
    parts = [
        (*shape[:axis], draw(st.integers(0, 3)), *shape[axis + 1 :]) for _ in range(draw(st.integers(1, 3)))
    ]
    return Case(kind(axis), [data(draw(seeds), s, draw(st.sampled_from(FLOATS))) for s in parts])


@entry("pad")
def pad(draw, kind):
    x = draw(arrays(draw(shapes(empty=False)), (F32, I32, BF16)))
    width = tuple((draw(st.integers(0, 3)), draw(st.integers(0, 3))) for _ in x.shape)
    mode = draw(st.sampled_from(["constant", "edge", "reflect", "symmetric"]))
    value = [data(draw(seeds), (), type_of(x).dtype)] if mode == "constant" else []
    return Case(kind(width, mode), [x, *value])


@entry("contiguous")
def contiguous(draw, kind):
    return Case(kind(), [draw(arrays(dtypes=ANY)).T])


# Reductions


@entry("sum", "mean", "prod", "logsumexp", "var", "std")
def reduction(draw, kind):
    x = draw(arrays(draw(shapes()), (*FLOATS, *INTS, BOOL) if kind.name != "prod" else FLOATS))
    axes = axes_of(draw, x.shape)
    k = max(1, int(np.prod([x.shape[i] for i in axes])))
    extra = [draw(st.integers(0, 1))] if kind.name in ("var", "std") else []
    linear = kind.name in ("sum", "mean")
    # Elements up to 9 make sums of squares of terms up to 18².
    magnitude = None if linear else 9.0 if kind.name in ("logsumexp", "std") else 18.0**2
    return Case(kind(axes, draw(st.booleans()), *extra), [x], "sum", k, magnitude)


@entry("max", "min", "all", "any")
def order(draw, kind):
    x = draw(arrays(draw(shapes(empty=kind.name in ("all", "any"))), ANY))
    return Case(kind(axes_of(draw, x.shape), draw(st.booleans())), [x])


@entry("argmax", "argmin")
def position(draw, kind):
    x = draw(arrays(draw(shapes(empty=False)), ANY))
    axis = draw(st.sampled_from([None, *range(x.ndim)]))
    return Case(kind(axis, draw(st.booleans())), [x])


@entry("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp")
def cumulative(draw, kind):
    x = draw(arrays(dtypes=ANY if kind.name in ("cummax", "cummin") else (*FLOATS, I32, U32), low=0, high=2))
    axis = axis_of(draw, x.shape)
    op = kind(axis, draw(st.booleans()), draw(st.booleans()))
    return Case(op, [x], "sum", max(1, x.shape[axis]), 8.0)


@entry("softmax")
def softmax(draw, kind):
    x = draw(arrays(dtypes=FLOATS))
    return Case(kind(axes_of(draw, x.shape)), [x], "sum", max(1, x.size), 1.0)


@entry("sort", "argsort")
def sort(draw, kind):
    x = draw(arrays(dtypes=ANY))
    return Case(kind(axis_of(draw, x.shape)), [x], "exact" if kind.name == "sort" else "positions")


@entry("partition", "argpartition", "topk")
def partition(draw, kind):
    x = draw(arrays(draw(shapes(empty=False)), FLOATS))
    axis = axis_of(draw, x.shape)
    compare = "positions" if kind.name == "argpartition" else "sorted"
    return Case(kind(draw(st.integers(0, x.shape[axis] - 1)), axis), [x], compare)


# Indexing


@entry("take")
def take(draw, kind):
    x = draw(arrays(draw(shapes(empty=False)), ANY))
    axis = axis_of(draw, x.shape)
    where = indices(draw(seeds), draw(shapes(0, 2)), x.shape[axis], draw(INDEX_DTYPES))
    return Case(kind(axis), [x, where])


@entry("take_along_axis", "put_along_axis")
def along(draw, kind):
    x = draw(arrays(draw(shapes(empty=False)), (F32, BF16, I32)))
    axis = axis_of(draw, x.shape)
    shape = [1 if draw(st.booleans()) else n for n in x.shape]
    if kind.name == "take_along_axis":
        shape[axis] = draw(sizes)
        return Case(kind(axis), [x, indices(draw(seeds), shape, x.shape[axis])])
    shape[axis] = draw(st.integers(0, x.shape[axis]))  # no element twice: which one stays is undefined
    where = np.argsort(np.random.default_rng(draw(seeds)).random(x.shape), axis)
    where = where[tuple(slice(0, n) for n in shape)] + draw(st.sampled_from([0, 0, 1, -x.shape[axis], 99]))
    full = (*x.shape[:axis], shape[axis], *x.shape[axis + 1 :])
    (values,) = draw(broadcasting(1, full))
    return Case(
        kind(axis), [x, mx.array(where.astype(np.int32)), data(draw(seeds), values, type_of(x).dtype)]
    )


@entry("gather")
def gather(draw, kind):
    x = draw(arrays(draw(shapes(2, 4, empty=False)), ANY))
    axes = tuple(sorted(draw(st.permutations(range(x.ndim)))[: draw(st.integers(1, x.ndim))]))
    common = draw(broadcasting(len(axes), draw(shapes(0, 2))))
    parts = [
        indices(draw(seeds), s, x.shape[a], draw(INDEX_DTYPES)) for s, a in zip(common, axes, strict=True)
    ]
    return Case(kind(axes), [x, *parts])


@entry("dynamic_slice", "slice_update")
def block(draw, kind):
    x = draw(arrays(dtypes=(F32, BF16, I32)))
    axes = tuple(draw(st.permutations(range(x.ndim)))[: draw(st.integers(1, x.ndim))])
    block = tuple(draw(st.integers(0, n)) if i in axes else n for i, n in enumerate(x.shape))
    start = mx.array([draw(st.integers(-3, 9)) for _ in axes], mx.int32)
    if kind.name == "dynamic_slice":
        block = tuple(draw(st.integers(0, n)) for n in x.shape)
        return Case(kind(axes, block), [x, start])
    return Case(kind(axes), [x, data(draw(seeds), block, type_of(x).dtype), start])


@entry("index_update")
def index_update(draw, kind):
    x = draw(arrays(draw(shapes(empty=False)), (F32, BF16, I32), low=1, high=4, grid=True))
    dtype = type_of(x).dtype
    name = draw(st.sampled_from(["set", "add", "subtract", "multiply", "maximum", "minimum"]))
    first = draw(st.integers(0, x.ndim - 1))  # arrays stand side by side
    last = draw(st.integers(first, x.ndim - 1))
    common = draw(shapes(0, 2, empty=False)) if name != "set" else ()
    entries, parts = [], []
    for i, n in enumerate(x.shape[: draw(st.integers(1, x.ndim))]):
        if first <= i <= last and draw(st.integers(0, 4)):
            entries.append("array")
            parts.append(indices(draw(seeds), common, n))
        elif first <= i <= last:
            entries.append(draw(st.integers(0, n - 1)))
        else:
            r = range(*draw(st.slices(n)).indices(n))
            entries.append((r.start, r.stop, r.step) if r else (0, 0, 1))
    op = kind(name, tuple(entries))
    (values,) = draw(broadcasting(1, op.target(x.shape, [p.shape for p in parts])))
    return Case(op, [x, data(draw(seeds), values, dtype, low=1, high=4, grid=True), *parts], "near")

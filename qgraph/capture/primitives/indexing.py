"""Reading and writing by index.

MLX has one general gather and one general scatter: the axes of the indices come first in what is read or
written, then all axes of the array, those that are indexed with size 1 (or more: a window from there on).
"""

from __future__ import annotations

from collections.abc import Sequence

from qgraph.capture.primitives.elementwise import op
from qgraph.capture.primitives.shapes import ranges, reshaped, sliced
from qgraph.capture.primitives.table import Primitive, primitive
from qgraph.ir import Value
from qgraph.ir.op import Constant
from qgraph.ir.types import Shape, broadcast_shapes
from qgraph.ops.blocks import DynamicSlice, SliceUpdate
from qgraph.ops.creation import Arange
from qgraph.ops.indexing import Gather, Take, TakeAlongAxis
from qgraph.ops.shape import Broadcast, Transpose
from qgraph.ops.updates import IndexUpdate, PutAlongAxis

# By the number with which MLX encodes how an update acts.
UPDATES: tuple[str, ...] = ("maximum", "minimum", "add", "multiply", "set")


@primitive("Gather")
def gather(p: Primitive) -> Value:
    """[axes, sizes of what is read at each index]."""
    axes, sizes = tuple(p.arguments[0]), tuple(p.arguments[1])
    a, *indices = p.inputs
    a, indices = _windows(p, a, axes, sizes, indices)
    if not axes:
        return reshaped(p, a, p.outputs[0].shape)
    fixed = _fixed(a, axes, indices)
    if fixed is not None:
        whole = [(0, n, 1) for n in a.type.shape]
        whole[axes[0]] = (fixed, fixed + 1, 1)
        return reshaped(p, sliced(p, a, whole), p.outputs[0].shape)
    order = sorted(range(len(axes)), key=lambda k: axes[k])
    axes, indices = tuple(axes[k] for k in order), [indices[k] for k in order]
    if len(axes) == 1:
        found, at, count = p.add(Take(axes[0]), a, indices[0]), axes[0], indices[0].type.ndim
    else:
        op_ = Gather(axes)
        indices = unbroadcast(indices)
        found, at = p.add(op_, a, *indices), op_.position()
        count = len(broadcast_shapes(*(i.type.shape for i in indices)))
    found = _to_front(p, found, at, count)
    wide = sorted(axis for axis in axes if sizes[axis] > 1)
    if wide:  # their axes come with those of the indices: put them where the array has them
        rest = [i for i in range(a.type.ndim) if i not in axes]
        came, lead = [*wide, *rest], count - len(wide)
        found = _permuted(p, found, (*range(lead), *(lead + came.index(i) for i in sorted(came))))
    return reshaped(p, found, p.outputs[0].shape)


def _fixed(a: Value, axes: Shape, indices: Sequence[Value]) -> int | None:
    """The one index that a gather reads at, if it is known: then it is a slice, which may stay packed."""
    if len(axes) != 1 or indices[0].type.size != 1 or not isinstance(indices[0].op, Constant):
        return None
    index, size = int(indices[0].op.data[0]), a.type.shape[axes[0]]
    return index % size if -size <= index < size else None


def _to_front(p: Primitive, x: Value, at: int, count: int) -> Value:
    """`x` with `count` axes from `at` on moved to the front."""
    moved = (*range(at, at + count), *range(at), *range(at + count, x.type.ndim))
    return x if moved == tuple(range(x.type.ndim)) else p.add(Transpose(moved), x)


def _windows(
    p: Primitive, a: Value, axes: Shape, sizes: Shape, indices: Sequence[Value]
) -> tuple[Value, list[Value]]:
    """The array cut where not all of an axis is read; windows on indexed axes are more indices."""
    whole = [(0, n if i in axes else sizes[i], 1) for i, n in enumerate(a.type.shape)]
    a, wide = sliced(p, a, whole), [axis for axis in axes if sizes[axis] > 1]
    if not wide:
        return a, list(indices)
    rank = len(broadcast_shapes(*(i.type.shape for i in indices)))
    out: list[Value] = []
    for axis, index in zip(axes, indices, strict=True):
        shape = (*(1,) * (rank - index.type.ndim), *index.type.shape, *(1,) * len(wide))
        index = reshaped(p, index, shape)
        if axis in wide:
            steps = p.add(Arange(0, sizes[axis], 1, index.type.dtype))
            behind = [sizes[axis] if x == axis else 1 for x in sorted(wide)]
            index = p.add(op("add"), index, reshaped(p, steps, (*(1,) * rank, *behind)))
        out.append(index)
    return a, out


def unbroadcast(indices: Sequence[Value]) -> list[Value]:
    """Indices without the broadcasts that indexing does by itself."""
    shape = broadcast_shapes(*(i.type.shape for i in indices))
    out = list(indices)
    for k, index in enumerate(out):
        if isinstance(index.op, Broadcast):
            tried = [*out[:k], index.node.inputs[0], *out[k + 1 :]]
            if broadcast_shapes(*(i.type.shape for i in tried)) == shape:
                out = tried
    return out


@primitive("GatherAxis")
def gather_axis(p: Primitive) -> Value:
    """[axis]."""
    a, index = p.inputs
    return p.add(TakeAlongAxis(p.arguments[0]), a, index)


@primitive("Scatter")
def scatter(p: Primitive) -> Value:
    """[how, axes]; operands a, indices, update."""
    how, axes = UPDATES[int(p.arguments[0])], tuple(p.arguments[1])
    a, *indices, update = p.inputs
    common = broadcast_shapes(*(i.type.shape for i in indices)) if indices else ()
    sizes = update.type.shape[len(common) :]
    rest = [i for i in range(a.type.ndim) if i not in axes]
    wide = [i for i in sorted(axes) if sizes[i] > 1]
    _, indices = _windows(p, a, axes, tuple(sizes), indices)
    # The update's axes: those of the indices, of windows, then of the axes that are not indexed.
    first = len(common)
    moved = (*range(first), *(first + i for i in wide), *(first + i for i in rest))
    kept = [update.type.shape[k] for k in moved]
    if list(moved) != sorted(moved):
        update = _permuted(p, update, (*moved, *(first + i for i in axes if i not in wide)))
    update = reshaped(p, update, tuple(kept))
    order = (*axes, *rest)
    entries = (*("array" for _ in axes), *((0, sizes[i], 1) for i in rest))
    target = _permuted(p, a, order)
    out = p.add(IndexUpdate(how, entries), target, update, *indices)
    return _permuted(p, out, tuple(order.index(i) for i in range(len(order))))


def _permuted(p: Primitive, x: Value, order: Shape) -> Value:
    return x if order == tuple(range(len(order))) else p.add(Transpose(order), x)


@primitive("ScatterAxis")
def scatter_axis(p: Primitive) -> Value:
    """[sum or set, axis]; operands a, indices, update."""
    replaces, axis = p.arguments
    a, index, update = p.inputs
    if replaces:
        return p.add(PutAlongAxis(axis), a, index, update)
    shape = broadcast_shapes(index.type.shape, update.type.shape)
    where: list[Value] = []
    for i, n in enumerate(shape):
        steps = p.add(Arange(0, n, 1, index.type.dtype)) if i != axis else None
        ones = [n if k == i else 1 for k in range(len(shape))]
        where.append(index if steps is None else reshaped(p, steps, tuple(ones)))
    return p.add(IndexUpdate("add", ("array",) * len(shape)), a, update, *where)


@primitive("SliceUpdate")
def slice_update(p: Primitive) -> Value:
    """[how, start, stop, step]; operands a, update."""
    how, start, _, step = p.arguments
    a, update = p.inputs
    index = ranges(start, step, update.type.shape, a.type.shape)
    return p.add(IndexUpdate(UPDATES[int(how)], index), a, update)


@primitive("DynamicSlice")
def dynamic_slice(p: Primitive) -> Value:
    """[axes, sizes]; operands a, start."""
    axes, sizes = p.arguments
    return p.add(DynamicSlice(tuple(axes), tuple(sizes)), *p.inputs)


@primitive("DynamicSliceUpdate")
def dynamic_slice_update(p: Primitive) -> Value:
    """[axes]; operands a, update, start."""
    return p.add(SliceUpdate(tuple(p.arguments[0])), *p.inputs)

"""Primitives that arrange: views, slices, padding, concatenation; and numbers made from nothing.

MLX writes ``x @ w`` for a batch x and a matrix w as a product of matrices between two reshapes. Here it is
one `dot` again, which MLX computes in the same way: every rewrite has one form to know.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod

from qgraph.capture.primitives.table import Primitive, primitive
from qgraph.ir import Value
from qgraph.ir.op import Constant
from qgraph.ir.types import Shape
from qgraph.ops.arrange import Pad
from qgraph.ops.creation import Arange
from qgraph.ops.linear import AddMm, Dot
from qgraph.ops.shape import Broadcast, Concatenate, Reshape, Slice, Transpose


@primitive("Reshape", "Flatten", "Unflatten", "ExpandDims", "Squeeze")
def reshape(p: Primitive) -> Value:
    """The result's shape says it all; the arguments may hold a -1."""
    return reshaped(p, p.inputs[0], p.outputs[0].shape)


def reshaped(p: Primitive, x: Value, shape: Shape) -> Value:
    """`x` under another shape: of what x is a reshape of, so that no chains arise."""
    batched = _batched(p, x, shape)
    if batched is not None:
        return batched
    source = x.node.inputs[0] if isinstance(x.op, Reshape) else x
    if source.type.packing and not x.type.packing:
        source = x
    return source if source.type.shape == shape else p.add(Reshape(shape), source)


def _batched(p: Primitive, x: Value, shape: Shape) -> Value | None:
    """The product of a batch with one matrix, if `x` is that product with the rows of the batch merged."""
    if not isinstance(x.op, (Dot, AddMm)) or x.type.ndim != 2:
        return None
    *summand, a, b = x.node.inputs
    if not isinstance(a.op, Reshape) or a.type.ndim != 2:
        return None
    batch, rows = a.node.inputs[0], shape[:-1]
    if len(rows) < 2 or shape[-1:] != x.type.shape[1:] or batch.type.packing:
        return None
    if batch.type.shape != (*rows, *a.type.shape[1:]):  # it was a reshape, as heads are merged: two are one
        batch = p.add(Reshape((*rows, *a.type.shape[1:])), batch)
    if summand and summand[0].type.ndim > 1:
        return None
    return p.add(x.op, *summand, batch, b)


@primitive("Transpose")
def transpose(p: Primitive) -> Value:
    """[axes]; einsum leaves such that move nothing."""
    axes = tuple(p.arguments[0])
    return p.inputs[0] if axes == tuple(range(len(axes))) else p.add(Transpose(axes), p.inputs[0])


@primitive("Broadcast", "BroadcastAxes")
def broadcast(p: Primitive) -> Value:
    """[shape]."""
    x, shape = p.inputs[0], p.outputs[0].shape
    return x if x.type.shape == shape else p.add(Broadcast(shape), x)


@primitive("Slice")
def slice_(p: Primitive) -> Value:
    """[start, stop, step]; before the first element, MLX stops at -size - 1."""
    start, _, step = p.arguments
    return sliced(p, p.inputs[0], ranges(start, step, p.outputs[0].shape, p.inputs[0].type.shape))


def ranges(
    start: Sequence[int], step: Sequence[int], counts: Shape, shape: Shape
) -> tuple[tuple[int, int, int], ...]:
    """(start, stop, step) for every axis, from how many elements a slice takes."""
    found: list[tuple[int, int, int]] = []
    for first, by, count, size in zip(start, step, counts, shape, strict=True):
        stop = first + by * count
        found.append((first, max(stop, -1) if by < 0 else min(stop, size), by) if count else (0, 0, 1))
    return tuple(found)


def sliced(p: Primitive, x: Value, of: Sequence[tuple[int, int, int]]) -> Value:
    """A slice, or `x` where it takes everything."""
    if all(r == (0, n, 1) for r, n in zip(of, x.type.shape, strict=True)):
        return x
    start, stop, step = zip(*of, strict=True)
    return p.add(Slice(start, stop, step), x)


@primitive("Split")
def split(p: Primitive) -> Sequence[Value]:
    """[indices, axis]."""
    axis: int = p.arguments[1]
    x = p.inputs[0]
    whole = [(0, n, 1) for n in x.type.shape]
    indices: list[int] = [0, *p.arguments[0], x.type.shape[axis]]
    cuts = pairwise(indices)
    return [sliced(p, x, [*whole[:axis], (low, high, 1), *whole[axis + 1 :]]) for low, high in cuts]


@primitive("Concatenate")
def concatenate(p: Primitive) -> Value:
    """[axis]."""
    return p.add(Concatenate(p.arguments[0]), *p.inputs)


@primitive("Pad")
def pad(p: Primitive) -> Value:
    """[axes, before, after]; with a number. The other modes are slices that MLX writes out."""
    widths = {axis: (low, high) for axis, low, high in zip(*p.arguments, strict=True)}
    width = tuple(widths.get(axis, (0, 0)) for axis in range(p.inputs[0].type.ndim))
    return p.add(Pad(width, "constant"), *p.inputs) if any(map(any, width)) else p.inputs[0]


@primitive("Arange")
def arange(p: Primitive) -> Value:
    """[start, stop, step], as floats whatever the dtype."""
    dtype = p.outputs[0].dtype
    start, stop, step = (int(x) if dtype.is_int and x == int(x) else x for x in p.arguments)
    return p.add(Arange(start, stop, step, dtype))


@primitive("NumberOfElements")
def number_of_elements(p: Primitive) -> Value:
    """[axes, whether its inverse is meant, dtype]: known here."""
    axes: list[int] = p.arguments[0]
    inverted: bool = p.arguments[1]
    n = prod(p.inputs[0].type.shape[axis] for axis in axes)
    dtype = p.outputs[0].dtype
    number = (1.0 / n if n else float("inf")) if inverted else n
    return p.add(Constant((float(number) if dtype.is_float else int(number),), (), dtype))

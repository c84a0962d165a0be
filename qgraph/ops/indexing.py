"""Reading by index: take and its kin, and the subscript ``x[index]``.

Ints and slices become a static `slice` (a view); integer arrays become `take` or `gather`. Indices count
from the end when negative. An index out of range that is written in the code is an error. What an array of
indices holds is known only when the program runs: there, reading out of range gives NaN (for integers the
smallest number, without a sign the largest; for bool True), and writing out of range writes nothing. MLX
would read or write other memory; `qgraph.rewrite.guard` puts the meaning into the graph.
"""

from __future__ import annotations

import builtins
from dataclasses import dataclass
from math import prod
from operator import index as as_index
from typing import Any

import mlx.core as mx
import numpy as np

from qgraph._errors import DTypeError, QGraphError, ShapeError
from qgraph.ir.dtypes import I32, I64, DType
from qgraph.ir.op import Constant, Operand, Types
from qgraph.ir.types import Shape, TensorType, broadcast_shapes, normalize_axis
from qgraph.ops.dispatch import (
    Array,
    ArrayLike,
    apply,
    frontend,
    operand,
    shape_of,
    type_of,
)
from qgraph.ops.indexed import Indexed, check_indices, in_range, read
from qgraph.ops.shape import flatten, moveaxis, reshape, slice_ranges

LARGEST_CONSTANT = 1024  # elements of a written-out index that become part of the program

__all__ = ["getitem", "take", "take_along_axis"]


@dataclass(frozen=True)
class Take(Indexed):
    """Slices along `axis`, chosen by an array of indices."""

    name = "take"
    mlx = "mx.take({0}, {1}, axis={axis})"
    flops_per_element = 0
    axis: int = 0

    def infer(self, a: TensorType, indices: TensorType) -> TensorType:
        """The shape of the indices in place of the axis."""
        check_indices(self.name, indices)
        axis = normalize_axis(self.axis, a.ndim)
        if a.shape[axis] == 0 and indices.size:
            raise ShapeError(
                f"take: axis {axis} of {a.shape} is empty", fix="take from an axis with elements"
            )
        return TensorType((*a.shape[:axis], *indices.shape, *a.shape[axis + 1 :]), a.dtype)

    def indexed(self, inputs: Types) -> dict[int, tuple[int, int]]:
        """The indices, of the axis."""
        return {1: (self.axis, inputs[0].shape[self.axis])}

    def behind(self, inputs: Types) -> int:
        """The axes of a behind the one that is indexed."""
        return inputs[0].ndim - self.axis % inputs[0].ndim - 1

    def reference(self, a: Any, indices: Any) -> Any:
        """NumPy's take, where the index is in range."""
        safe, valid = in_range(indices, a.shape[self.axis])
        return read(np.take(a, safe, self.axis), valid, a.ndim - self.axis % a.ndim - 1)


@frontend
def take(a: ArrayLike, /, indices: ArrayLike, axis: int | None = None) -> Array:
    """Slices of `a` along `axis` (None: elements of a flattened), chosen by integer `indices`.

    Shape: that of the indices in place of the axis.  Out of range: NaN, for integers their smallest
    number (unsigned: the largest), for bool True.  Errors: DTypeError for indices that are not integers;
    ShapeError for a written-out index that is out of range.  Source: mlx.core.take.
    """
    a = operand(a)
    if axis is None:
        a, axis = flatten(a), 0
    axis = normalize_axis(axis, len(shape_of(a)))
    if isinstance(indices, int):
        return getitem(a, (*[builtins.slice(None)] * axis, indices))
    return apply(Take(axis), a, index_operand(indices, shape_of(a)[axis], axis))


@dataclass(frozen=True)
class TakeAlongAxis(Indexed):
    """One element for every index, from its own row along `axis`."""

    name = "take_along_axis"
    mlx = "mx.take_along_axis({0}, {1}, axis={axis})"
    flops_per_element = 0
    axis: int = -1

    def infer(self, a: TensorType, indices: TensorType) -> TensorType:
        """The indices' size on the axis; elsewhere both broadcast."""
        out = TensorType(self.shape_rule(a, indices), a.dtype)
        if out.size and not a.shape[self.axis]:
            message = f"{self.name}: axis {self.axis} of {a.shape} is empty"
            raise ShapeError(message, fix="take from an axis with elements")
        return out

    def shape_rule(self, a: TensorType, indices: TensorType) -> Shape:
        """The shape of the result."""
        check_indices(self.name, indices)
        axis = normalize_axis(self.axis, a.ndim)
        if indices.ndim != a.ndim:
            raise ShapeError(
                f"{self.name}: indices {indices.shape} for an array {a.shape}", fix="give both the same rank"
            )
        out = list(broadcast_shapes(_without(a.shape, axis), _without(indices.shape, axis)))
        out.insert(axis, indices.shape[axis])
        return tuple(out)

    def indexed(self, inputs: Types) -> dict[int, tuple[int, int]]:
        """The indices, of the axis."""
        return {1: (self.axis, inputs[0].shape[self.axis])}

    def behind(self, inputs: Types) -> int:
        """None: every element has an index of its own."""
        return 0

    def reference(self, a: Any, indices: Any) -> Any:
        """NumPy's take_along_axis, on broadcast arrays."""
        indices, valid = in_range(indices, a.shape[self.axis])
        rest = np.broadcast_shapes(_without(a.shape, self.axis), _without(indices.shape, self.axis))
        axis = self.axis % a.ndim
        a, indices = (np.broadcast_to(x, (*rest[:axis], x.shape[axis], *rest[axis:])) for x in (a, indices))
        return read(np.take_along_axis(a, indices, self.axis), valid, 0)


def _without(shape: Shape, axis: int) -> Shape:
    return tuple(s for i, s in enumerate(shape) if i != axis % len(shape))


@frontend
def take_along_axis(a: ArrayLike, /, indices: ArrayLike, axis: int | None = -1) -> Array:
    """Elements of `a` along `axis`, one for every index; None: of a flattened, with 1-D indices.

    Shape: the indices', broadcast with a's outside the axis.  Out of range: as `take`.
    Source: mlx.core.take_along_axis.
    """
    a = operand(a)
    if axis is None:
        a, axis = flatten(a), 0
    axis = normalize_axis(axis, len(shape_of(a)))
    return apply(TakeAlongAxis(axis), a, index_operand(indices, shape_of(a)[axis], axis))


@dataclass(frozen=True)
class Gather(Indexed):
    """``a[i, :, j]``: broadcast arrays of indices on the axes `axes`, all of the others.

    Shape as NumPy's: that of the indices stands at the first of the axes where they are neighbours, else
    in front.
    """

    name = "gather"
    flops_per_element = 0
    axes: tuple[int, ...] = ()

    def infer(self, a: TensorType, *indices: TensorType) -> TensorType:
        """The broadcast shape of the indices, and the other axes."""
        for t in indices:
            check_indices(self.name, t)
        if len(indices) != len(self.axes) or not all(0 <= x < a.ndim for x in self.axes):
            raise ShapeError(
                f"gather: {len(indices)} arrays of indices for the axes {self.axes} of {a.shape}"
            )
        common = broadcast_shapes(*(t.shape for t in indices))
        if prod(common) and any(a.shape[x] == 0 for x in self.axes):
            raise ShapeError(f"gather: an axis of {self.axes} of {a.shape} is empty")
        at = self.position()
        rest = [s for i, s in enumerate(a.shape) if i not in self.axes]
        return TensorType((*rest[:at], *common, *rest[at:]), a.dtype)

    def position(self) -> int:
        """The axis of the result at which the indices' axes begin."""
        neighbours = all(y - x == 1 for x, y in zip(self.axes, self.axes[1:], strict=False))
        return self.axes[0] if neighbours else 0

    def emit(self, operands: tuple[Any, ...], inputs: Types, outputs: Types) -> Operand:
        """A subscript."""
        names = dict(zip(self.axes, operands[1:], strict=True))
        return f"{operands[0]}[{', '.join(names.get(i, ':') for i in range(max(self.axes) + 1))}]"

    def indexed(self, inputs: Types) -> dict[int, tuple[int, int]]:
        """All operands but the first, of an axis each."""
        return {i: (axis, inputs[0].shape[axis]) for i, axis in enumerate(self.axes, 1)}

    def behind(self, inputs: Types) -> int:
        """The axes that are not indexed, from the indices' position on."""
        return inputs[0].ndim - len(self.axes) - self.position()

    def reference(self, a: Any, *indices: Any) -> Any:
        """NumPy's indexing by arrays, where all of them are in range."""
        if 0 in np.shape(a):  # NumPy refuses an index into an empty axis, even one that reads nothing
            at, common = self.position(), np.broadcast_shapes(*map(np.shape, indices))
            rest = [s for i, s in enumerate(np.shape(a)) if i not in self.axes]
            return np.zeros((*rest[:at], *common, *rest[at:]), a.dtype)
        pairs = [in_range(i, a.shape[x]) for i, x in zip(indices, self.axes, strict=True)]
        given = {x: safe for x, (safe, _) in zip(self.axes, pairs, strict=True)}
        found = a[tuple(given.get(i, builtins.slice(None)) for i in range(np.ndim(a)))]
        valid = np.logical_and.reduce(np.broadcast_arrays(*(v for _, v in pairs)))
        return read(found, valid, np.ndim(a) - len(self.axes) - self.position())


def index_operand(indices: ArrayLike, size: int | None = None, axis: int = 0) -> Any:
    """Indices as an operand; what is written out is checked against the axis and becomes a constant."""
    if isinstance(indices, (int, list, tuple, np.ndarray, np.integer)):
        if isinstance(indices, (list, tuple)) and any(_is_array(i) for i in indices):  # pyright: ignore[reportUnknownVariableType]
            raise DTypeError("a list of indices contains arrays", fix="join them with qg.stack")
        return _constant(np.asarray(indices), size, axis)
    out = operand(indices)
    check_indices("an index", type_of(out))
    return out


def _constant(indices: np.ndarray[Any, Any], size: int | None, axis: int) -> Any:
    if indices.size == 0:
        indices = indices.astype(np.int32)
    if indices.dtype.kind not in "iu":
        fix = "choose elements with qg.where(mask, x, y)" if indices.dtype.kind == "b" else "use integers"
        raise DTypeError(f"indices of dtype {indices.dtype}, not integers", fix=fix)
    if indices.size:
        low, high = int(indices.min()), int(indices.max())
        if size is not None and not -size <= low <= high < size:
            raise ShapeError(
                f"index {low if low < -size else high} is out of range for axis {axis} of size {size}",
                fix=f"use {-size}..{size - 1}" if size else "the axis is empty",
            )
        if size is not None:
            indices = indices % size  # some kernels do not count from the end
    dtype: DType = I32 if not indices.size or int(np.abs(indices).max()) < 2**31 else I64
    if indices.size > LARGEST_CONSTANT:
        return mx.array(indices, dtype.mlx)
    return apply(Constant(tuple(indices.ravel().tolist()), indices.shape, dtype))


def _is_array(x: Any) -> bool:
    return isinstance(x, (mx.array, np.ndarray)) or hasattr(x, "_type")


def _is(x: Any, kind: type) -> bool:
    return isinstance(x, kind)


class Subscript:
    """An index expression in normal form: one entry for every axis of the array.

    `entries`: an int, a normal (start, stop, step), or an array; None for a new axis.
    """

    def __init__(self, shape: Shape, index: Any) -> None:
        given: list[Any] = list(index) if isinstance(index, tuple) else [index]  # pyright: ignore[reportUnknownArgumentType]
        taken = sum(1 for i in given if i is not None and i is not Ellipsis)
        if taken > len(shape):
            raise ShapeError(f"{taken} indices for an array of rank {len(shape)}, {shape}", fix="drop some")
        dots = [k for k, i in enumerate(given) if i is Ellipsis]
        if len(dots) > 1:
            raise ShapeError("an index may contain one ... only", fix="write the other axes as ':'")
        fill = [builtins.slice(None)] * (len(shape) - taken)
        at = dots[0] if dots else len(given)
        given[at : at + len(dots)] = fill
        self.shape = shape
        self.entries: list[Any] = []
        axis = 0
        for i in given:
            self.entries.append(None if i is None else _entry(i, shape[axis], axis))
            axis += i is not None

    @property
    def arrays(self) -> list[Any]:
        """The arrays of indices."""
        return [e for e in self.entries if not isinstance(e, (int, tuple)) and e is not None]

    def ranges(self) -> list[tuple[int, int, int]]:
        """What every axis keeps: all, for one that an array indexes."""
        taken = [e for e in self.entries if e is not None]
        return [
            e if isinstance(e, tuple) else (e, e + 1, 1) if isinstance(e, int) else (0, n, 1)
            for e, n in zip(taken, self.shape, strict=True)
        ]

    def front(self) -> int:
        """The axis of the result at which the axes of the arrays of indices begin, as in NumPy.

        An int counts as an array there: ``x[0, :, i]`` has the indices in front.
        """
        advanced = [k for k, e in enumerate(self.entries) if e is not None and not isinstance(e, tuple)]
        return advanced[0] if advanced[-1] - advanced[0] == len(advanced) - 1 else 0


def _entry(i: Any, size: int, axis: int) -> Any:
    if isinstance(i, (bool, np.bool_)):
        raise DTypeError("a boolean is not an index", fix="choose elements with qg.where(mask, x, y)")
    if _is(i, builtins.slice):
        return _normal_slice(i, size)
    if _is_array(i) or _is(i, list):
        return index_operand(i, size, axis)
    try:
        n = as_index(i)
    except TypeError:
        raise DTypeError(
            f"{type(i).__name__} is not an index", fix="use ints, slices, None, ... or integer arrays"
        ) from None
    if not -size <= n < size:
        fix = f"use {-size}..{size - 1}" if size else "the axis is empty"
        raise ShapeError(f"index {n} is out of range for axis {axis} of size {size}", fix=fix)
    return n % size


def _normal_slice(s: builtins.slice, size: int) -> tuple[int, int, int]:
    parts: tuple[Any, ...] = (s.start, s.stop, s.step)
    if any(_is_array(p) and not isinstance(p, np.ndarray) for p in parts):
        raise QGraphError(
            "a slice with array bounds has no static size",
            fix="use qg.slice(a, start_indices, axes, slice_size): the start may be an array",
        )
    if s.step == 0:
        raise ShapeError("a slice with step 0", fix="use another step")
    r = range(*s.indices(size))
    return (r.start, r.stop, r.step) if r else (0, 0, 1)


def getitem(a: ArrayLike, index: Any) -> Array:
    """``a[index]``: ints, slices with any step, None, ``...`` and integer arrays.

    Shape: as NumPy's.  Errors: ShapeError for an int out of range; DTypeError for a boolean mask, whose
    result would have no static shape (use qg.where).  Source: mlx.core.array.__getitem__.
    """
    a = operand(a)
    s = Subscript(shape_of(a), index)
    out = slice_ranges(a, s.ranges())
    arrays = s.arrays
    kept = _kept_sizes(s, shape_of(out))
    out = reshape(out, kept)
    if not arrays:
        return out
    axes = [
        k for k, e in enumerate(e for e in s.entries if not isinstance(e, int)) if any(e is x for x in arrays)
    ]
    if len(arrays) == 1:
        natural, count = axes[0], len(shape_of(arrays[0]))
        out = apply(Take(axes[0]), out, arrays[0])
    else:
        op = Gather(tuple(axes))
        natural, count = op.position(), len(broadcast_shapes(*(shape_of(x) for x in arrays)))
        out = apply(op, out, *arrays)
    front = s.front()
    for k in range(count if front != natural else 0):
        out = moveaxis(out, natural + k, front + k)
    return out


def _kept_sizes(s: Subscript, sizes: Shape) -> list[int]:
    """The sizes after slicing, without the axes of ints and with the new ones."""
    left = iter(sizes)
    out: list[int] = []
    for e in s.entries:
        size = 1 if e is None else next(left)
        if not isinstance(e, int):
            out.append(size)
    return out

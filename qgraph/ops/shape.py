"""Shape ops: views first, each with the rule by which it keeps a value packed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any, ClassVar

import numpy as np

from qgraph._errors import ShapeError
from qgraph.ir.op import Op, Operand, Storage, Types
from qgraph.ir.types import Packing, Shape, TensorType, normalize_axis
from qgraph.ops import packed
from qgraph.ops.dispatch import Array, ArrayLike, apply, as_axes, frontend, operand, shape_of


class View(Op):
    """An op that only rearranges: it keeps the packing where `carry` allows."""

    view = True
    packed = True
    shape_rule: ClassVar[Callable[..., Shape]]  # the result's shape from the operands'

    def infer(self, *types: TensorType) -> TensorType:
        """`shape_rule` gives the shape, `carry` the packing."""
        shape = self.shape_rule(*(t.shape for t in types))
        carried = self.carry(*types) if types[0].packing else None
        return TensorType(shape, types[0].dtype, carried if isinstance(carried, Packing) else None)

    def emit(self, operands: tuple[Operand, ...], inputs: Types, outputs: Types) -> Operand:
        """The template for dense values, `emit_packed` for packed ones."""
        if outputs[0].packing is None:
            return super().emit(operands, inputs, outputs)
        return self.emit_packed(operands, inputs, outputs[0])

    def emit_packed(self, operands: tuple[Any, ...], inputs: Types, out: TensorType) -> Operand:
        """Source of the storage of a packed result; for views whose `carry` can keep one."""
        raise AssertionError(f"{self.name} never stays packed")


@dataclass(frozen=True)
class Transpose(View):
    """Reorder axes: out.shape[i] = x.shape[axes[i]]."""

    name = "transpose"
    mlx = "mx.transpose({0}, {axes})"
    axes: tuple[int, ...] = ()

    def shape_rule(self, x: Shape) -> Shape:
        if sorted(self.axes) != list(range(len(x))):
            fix = f"name each of the axes 0 to {len(x) - 1} once"
            raise ShapeError(f"transpose: {self.axes} is not a permutation of the axes of {x}", fix=fix)
        return tuple(x[a] for a in self.axes)

    def carry(self, x: TensorType) -> Packing | str:
        return packed.carry_transpose(x, self.axes)

    def emit_packed(self, operands: tuple[Any, ...], inputs: Types, out: TensorType) -> Operand:
        axes = packed.storage_permutation(inputs[0], out, self.axes)
        if axes == tuple(range(len(axes))):
            return operands[0]
        return packed.map_storage(operands[0], inputs[0], lambda e, _: f"mx.transpose({e}, {axes})")

    def reference(self, x: Any) -> Any:
        return np.transpose(x, self.axes)


@frontend
def transpose(a: ArrayLike, axes: Sequence[int] | None = None) -> Array:
    """Reorder axes; None reverses them.  Source: mlx.core.transpose."""
    a = operand(a)
    ndim = len(shape_of(a))
    order = tuple(range(ndim))[::-1] if axes is None else tuple(normalize_axis(x, ndim) for x in axes)
    return apply(Transpose(order), a) if order != tuple(range(ndim)) else a


permute_dims = transpose


def swapaxes(a: ArrayLike, axis1: int, axis2: int) -> Array:
    """Exchange two axes.  Source: mlx.core.swapaxes."""
    a = operand(a)
    axes = list(range(len(shape_of(a))))
    i, j = normalize_axis(axis1, len(axes)), normalize_axis(axis2, len(axes))
    axes[i], axes[j] = axes[j], axes[i]
    return transpose(a, axes)


def moveaxis(a: ArrayLike, source: int, destination: int) -> Array:
    """Move one axis.  Source: mlx.core.moveaxis."""
    a = operand(a)
    axes = list(range(len(shape_of(a))))
    axes.insert(normalize_axis(destination, len(axes)), axes.pop(normalize_axis(source, len(axes))))
    return transpose(a, axes)


@dataclass(frozen=True)
class Reshape(View):
    """The same elements in row-major order under another shape."""

    name = "reshape"
    mlx = "mx.reshape({0}, {shape})"
    shape: tuple[int, ...] = ()

    def shape_rule(self, x: Shape) -> Shape:
        if prod(x) != prod(self.shape):
            raise ShapeError(
                f"reshape: {x} has {prod(x)} elements, {self.shape} has {prod(self.shape)}",
                fix="keep the number of elements; one size may be -1, which is worked out",
            )
        return self.shape

    def carry(self, x: TensorType) -> Packing | str:
        return packed.carry_reshape(x, self.shape)

    def emit_packed(self, operands: tuple[Any, ...], inputs: Types, out: TensorType) -> Operand:
        return packed.map_storage(
            operands[0], inputs[0], lambda e, unit: packed.reshape_storage(e, unit, inputs[0], out)
        )

    def reference(self, x: Any) -> Any:
        return np.reshape(x, self.shape)


@frontend
def reshape(a: ArrayLike, shape: Sequence[int]) -> Array:
    """`a` under another shape; one size may be -1.  Source: mlx.core.reshape."""
    a = operand(a)
    old, new = shape_of(a), list(shape)
    if new.count(-1) > 1:
        raise ShapeError(f"reshape: {tuple(new)} has more than one -1", fix="leave one size to be worked out")
    if -1 in new:
        known = -prod(new)
        if not known or prod(old) % known:
            raise ShapeError(f"reshape: cannot work out -1 in {tuple(new)} for {old}")
        new[new.index(-1)] = prod(old) // known
    return a if tuple(new) == old else apply(Reshape(tuple(new)), a)


def flatten(a: ArrayLike, start_axis: int = 0, end_axis: int = -1) -> Array:
    """Merge the axes start_axis … end_axis.  Source: mlx.core.flatten."""
    a = operand(a)
    shape = shape_of(a) or (1,)
    i, j = normalize_axis(start_axis, len(shape)), normalize_axis(end_axis, len(shape))
    return reshape(a, (*shape[:i], prod(shape[i : j + 1]), *shape[j + 1 :]))


def unflatten(a: ArrayLike, axis: int, shape: Sequence[int]) -> Array:
    """Split one axis into `shape`.  Source: mlx.core.unflatten."""
    a = operand(a)
    old = shape_of(a)
    i, new = normalize_axis(axis, len(old)), list(shape)
    if -1 in new:
        new[new.index(-1)] = old[i] // max(1, -prod(new))
    return reshape(a, (*old[:i], *new, *old[i + 1 :]))


def expand_dims(a: ArrayLike, axis: int | Sequence[int]) -> Array:
    """Insert axes of size 1 at the positions `axis` of the result.  Source: mlx.core.expand_dims."""
    a = operand(a)
    given = (axis,) if isinstance(axis, int) else tuple(axis)
    sizes = list(shape_of(a))
    ndim = len(sizes) + len(given)
    for position in sorted(normalize_axis(x, ndim) for x in given):
        sizes.insert(position, 1)
    return reshape(a, sizes)


def squeeze(a: ArrayLike, axis: int | Sequence[int] | None = None) -> Array:
    """Drop axes of size 1; None drops all of them.  Source: mlx.core.squeeze."""
    a = operand(a)
    shape = shape_of(a)
    if axis is None:
        return reshape(a, [s for s in shape if s != 1])
    drop = as_axes(axis if isinstance(axis, int) else tuple(axis), len(shape))
    for i in drop:
        if shape[i] != 1:
            raise ShapeError(
                f"squeeze: axis {i} of {shape} has size {shape[i]}", fix="squeeze axes of size 1"
            )
    return reshape(a, [s for i, s in enumerate(shape) if i not in drop])


@dataclass(frozen=True)
class Broadcast(View):
    """Repeat axes of size 1 and new leading axes without copying."""

    name = "broadcast_to"
    mlx = "mx.broadcast_to({0}, {shape})"
    shape: tuple[int, ...] = ()

    def shape_rule(self, x: Shape) -> Shape:
        tail = self.shape[len(self.shape) - len(x) :]
        if len(x) > len(self.shape) or any(s not in (1, t) for s, t in zip(x, tail, strict=True)):
            raise ShapeError(f"broadcast_to: {x} does not broadcast to {self.shape}")
        return self.shape

    def carry(self, x: TensorType) -> Packing | str:
        return f"{self.name} repeats a packed value; its copies would be stored"

    def reference(self, x: Any) -> Any:
        return np.broadcast_to(x, self.shape)


@frontend
def broadcast_to(a: ArrayLike, shape: Sequence[int]) -> Array:
    """`a` repeated to `shape`.  Source: mlx.core.broadcast_to."""
    a = operand(a)
    return a if shape_of(a) == tuple(shape) else apply(Broadcast(tuple(shape)), a)


@dataclass(frozen=True)
class Slice(View):
    """``x[start:stop:step]`` on every axis; steps may be negative (stop -1 then means before the first)."""

    name = "slice"
    start: tuple[int, ...] = ()
    stop: tuple[int, ...] = ()
    step: tuple[int, ...] = ()

    def ranges(self) -> list[range]:
        """The indices that each axis keeps."""
        return [range(*r) for r in zip(self.start, self.stop, self.step, strict=True)]

    def shape_rule(self, x: Shape) -> Shape:
        if len(self.start) != len(x):
            raise ShapeError(f"slice: {len(self.start)} ranges for an array of shape {x}")
        for r, n in zip(self.ranges(), x, strict=True):
            if r and not 0 <= min(r[0], r[-1]) <= max(r[0], r[-1]) < n:
                raise ShapeError(f"slice: {r} leaves an axis of {x}", fix=f"stay within 0 … {n - 1}")
        return tuple(map(len, self.ranges()))

    def carry(self, x: TensorType) -> Packing | str:
        assert x.packing is not None
        if 0 in self.shape_rule(x.shape):
            return "the slice is empty"
        i = x.ndim + x.packing.axis
        return packed.carry_slice(x, (self.start[i], self.stop[i], self.step[i]))

    def indices(self, order: tuple[int, ...], t: TensorType, unit: int = 1) -> str:
        """The subscript in source, axes in `order`; `unit` elements of the last one per group."""
        parts: list[str] = []
        group = packed.group_of(t)
        for a in order:
            start, stop, step = self.start[a], self.stop[a], self.step[a]
            if group > 1 and a == order[-1]:
                start, stop = start // group * unit, stop // group * unit
            end = "" if step < 0 and stop < 0 else str(stop)
            parts.append(f"{start}:{end}" + (f":{step}" if step != 1 else ""))
        return ", ".join(parts)

    def emit(self, operands: tuple[Any, ...], inputs: Types, outputs: Types) -> Operand:
        """A subscript, of each component for a packed value."""
        t = inputs[0]
        if outputs[0].packing is None:
            return f"{operands[0]}[{self.indices(tuple(range(t.ndim)), t)}]"
        return packed.map_storage(
            operands[0], t, lambda e, unit: f"{e}[{self.indices(t.storage_axes, t, unit)}]"
        )

    def reference(self, x: Any) -> Any:
        return x[np.ix_(*self.ranges())] if self.start else x


@dataclass(frozen=True)
class Concatenate(View):
    """Join along an axis; all dtypes promote."""

    name = "concatenate"
    view = False
    axis: int = 0

    def infer(self, *types: TensorType) -> TensorType:
        from qgraph.ir.dtypes import promote

        carried = self.carry(*types)
        dtype = promote(*(t.dtype for t in types))
        shape = self.shape_rule(*(t.shape for t in types))
        return TensorType(shape, dtype, carried if isinstance(carried, Packing) else None)

    def shape_rule(self, *shapes: Shape) -> Shape:
        first = shapes[0]
        for s in shapes:
            if len(s) != len(first) or any(
                a != b for i, (a, b) in enumerate(zip(s, first, strict=False)) if i != self.axis
            ):
                raise ShapeError(f"concatenate: {s} and {first} differ outside axis {self.axis}")
        return (*first[: self.axis], sum(s[self.axis] for s in shapes), *first[self.axis + 1 :])

    def carry(self, *types: TensorType) -> Packing | str:
        if len({t.dtype for t in types}) > 1:
            return "the parts have different dtypes"
        return packed.carry_concatenate(types, self.axis)

    def emit(self, operands: tuple[Any, ...], inputs: Types, outputs: Types) -> Operand:
        """`mx.concatenate`, component by component for packed values."""
        if outputs[0].packing is None:
            return f"mx.concatenate([{', '.join(operands)}], {self.axis})"
        axis = outputs[0].storage_axes.index(self.axis)
        parts = zip(*(o.parts()[: len(packed.units(inputs[0]))] for o in operands), strict=True)
        return packed.storage_of(*(f"mx.concatenate([{', '.join(p)}], {axis})" for p in parts))

    def reference(self, *xs: Any) -> Any:
        return np.concatenate(xs, self.axis)


def concatenate(arrays: Sequence[ArrayLike], axis: int | None = 0) -> Array:
    """Join `arrays` along an axis; None joins them flattened.  Source: mlx.core.concatenate."""
    parts = [operand(a) for a in arrays]
    if not parts:
        raise ShapeError("concatenate: no arrays given", fix="pass a non-empty list of arrays")
    if axis is None:
        parts, axis = [flatten(p) for p in parts], 0
    return apply(Concatenate(normalize_axis(axis, len(shape_of(parts[0])))), *parts)


def stack(arrays: Sequence[ArrayLike], axis: int = 0) -> Array:
    """Join `arrays` of one shape along a new axis.  Source: mlx.core.stack."""
    return concatenate([expand_dims(a, axis) for a in arrays], axis)


def split(a: ArrayLike, indices_or_sections: int | Sequence[int], axis: int = 0) -> list[Array]:
    """Cut into equal sections, or before the given indices.  Source: mlx.core.split."""
    a = operand(a)
    shape = shape_of(a)
    i = normalize_axis(axis, len(shape))
    if isinstance(indices_or_sections, int):
        n = indices_or_sections
        if n < 1 or shape[i] % n:
            raise ShapeError(f"split: axis {i} of {shape} does not divide into {n} equal sections")
        cuts = [shape[i] // n * k for k in range(n + 1)]
    else:
        cuts = [0, *(min(c % shape[i] if c < 0 else c, shape[i]) for c in indices_or_sections), shape[i]]
    full = [(0, s, 1) for s in shape]
    return [slice_ranges(a, [*full[:i], (lo, max(lo, hi), 1), *full[i + 1 :]]) for lo, hi in pairwise(cuts)]


def slice_ranges(a: ArrayLike, ranges: Sequence[tuple[int, int, int]]) -> Array:
    """One (start, stop, step) per axis, already normalized to the shape."""
    if all(r == (0, s, 1) for r, s in zip(ranges, shape_of(a), strict=True)):
        return a
    start, stop, step = zip(*ranges, strict=True)
    return apply(Slice(start, stop, step), a)


def flip(a: ArrayLike, axis: int | Sequence[int] | None = None) -> Array:
    """Reverse the order along `axis` (None: all axes).  Source: mlx.core.flip."""
    a = operand(a)
    shape = shape_of(a)
    axes = as_axes(axis if isinstance(axis, int) or axis is None else tuple(axis), len(shape))
    return slice_ranges(a, [(s - 1, -1, -1) if i in axes and s else (0, s, 1) for i, s in enumerate(shape)])


@dataclass(frozen=True)
class Contiguous(Op):
    """The same value with its storage in row-major order: what the GPU kernels read."""

    name = "contiguous"
    packed = True
    mlx = "mx.contiguous({0})"

    def infer(self, w: TensorType) -> TensorType:
        return w

    def carry(self, w: TensorType) -> Packing | str:
        return w.packing or "the operand is dense"

    def emit(self, operands: tuple[Any, ...], inputs: Types, outputs: Types) -> Operand:
        """`mx.contiguous` of every component."""
        if outputs[0].packing is None:
            return super().emit(operands, inputs, outputs)
        return Storage(*(f"mx.contiguous({p})" if p else None for p in operands[0]))

    def reference(self, w: Any) -> Any:
        return w

"""Padding, repetition and rotation of elements, mostly as views and `concatenate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qgraph._errors import DTypeError, ShapeError
from qgraph.ir.op import Op, Operand, Types
from qgraph.ir.types import TensorType, broadcast_shapes, normalize_axis
from qgraph.ops.dispatch import Array, ArrayLike, apply, frontend, operand, shape_of, type_of
from qgraph.ops.elementwise import astype
from qgraph.ops.shape import (
    broadcast_to,
    concatenate,
    expand_dims,
    flatten,
    reshape,
    slice_ranges,
    split,
    squeeze,
)

__all__ = [
    "atleast_1d",
    "atleast_2d",
    "atleast_3d",
    "broadcast_arrays",
    "meshgrid",
    "pad",
    "repeat",
    "roll",
    "tile",
    "unstack",
]

MODES = ("constant", "edge", "reflect", "symmetric")


@dataclass(frozen=True)
class Pad(Op):
    """More elements before and after each axis; operands: a, and the value for mode "constant"."""

    name = "pad"
    flops_per_element = 0
    width: tuple[tuple[int, int], ...] = ()
    mode: str = "constant"

    def infer(self, a: TensorType, *value: TensorType) -> TensorType:
        """Every axis grows by its widths."""
        if self.mode not in MODES:
            raise DTypeError(f"pad: no mode {self.mode!r}", fix=f"use {', '.join(MODES)}")
        if len(self.width) != a.ndim or any(w < 0 for pair in self.width for w in pair):
            raise ShapeError(
                f"pad: widths {self.width} for an array {a.shape}", fix="(before, after) >= 0 per axis"
            )
        if len(value) != (self.mode == "constant") or any(
            v.size != 1 or v.dtype is not a.dtype for v in value
        ):
            raise DTypeError(
                f"pad: a value of {', '.join(map(str, value))} in {a.dtype}", fix="one number of a's dtype"
            )
        if self.mode != "constant" and any(
            n == 0 and any(w) for n, w in zip(a.shape, self.width, strict=True)
        ):
            raise ShapeError(f"pad: mode {self.mode!r} has nothing to repeat in {a.shape}")
        sizes = (n + sum(w) for n, w in zip(a.shape, self.width, strict=True))
        return TensorType(tuple(sizes), a.dtype)

    def emit(self, operands: tuple[Any, ...], inputs: Types, outputs: Types) -> Operand:
        """`mx.pad`."""
        if not self.width:
            return f"mx.reshape({operands[0]}, ())"
        a, *values = operands
        value = "".join(f", constant_values=mx.reshape({v}, ())" for v in values)
        width = list(self.width)
        return f"mx.pad({a}, {width}, mode={self.mode!r}{value})"

    def reference(self, a: Any, *value: Any) -> Any:
        """NumPy's pad."""
        if not value:
            how: Any = self.mode
            return np.pad(a, self.width, how)
        return np.pad(a, self.width, constant_values=np.reshape(value[0], ())) if self.width else a


@frontend
def pad(
    a: ArrayLike,
    pad_width: int | Sequence[Any],
    mode: str = "constant",
    constant_values: ArrayLike = 0,
) -> Array:
    """`a` with `pad_width` more elements around: one number, (before, after), or a pair for each axis.

    Modes: constant, edge, reflect, symmetric.  Errors: ShapeError for a negative width.
    Source: mlx.core.pad.
    """
    a = operand(a)
    width = _widths(pad_width, len(shape_of(a)))
    value: list[Any] = []
    if mode == "constant":
        dtype = type_of(a).dtype
        value = [astype(operand(constant_values, dtype), dtype)]
    return apply(Pad(width, mode), a, *value) if any(w != (0, 0) for w in width) else a


def _widths(given: int | Sequence[Any], ndim: int) -> tuple[tuple[int, int], ...]:
    if isinstance(given, int):
        return ((given, given),) * ndim
    rows: list[Any] = list(given)
    if all(isinstance(row, int) for row in rows) and len(rows) in (1, 2):
        return ((rows[0], rows[-1]),) * ndim
    pairs: list[tuple[int, ...]] = [(row,) if isinstance(row, int) else tuple(row) for row in rows]
    pairs = pairs * ndim if len(pairs) == 1 else pairs
    if len(pairs) != ndim or any(len(pair) not in (1, 2) for pair in pairs):
        raise ShapeError(
            f"pad: {len(pairs)} widths for an array of rank {ndim}", fix="(before, after) per axis"
        )
    return tuple((pair[0], pair[-1]) for pair in pairs)


def tile(a: ArrayLike, reps: int | Sequence[int], /) -> Array:
    """`a` repeated as a whole `reps` times along each axis.  Source: mlx.core.tile."""
    a = operand(a)
    counts = [reps] if isinstance(reps, int) else list(reps)
    if any(r < 0 for r in counts):
        raise ShapeError(f"tile: negative count in {counts}", fix="use counts >= 0")
    shape = list(shape_of(a))
    counts = [1] * (len(shape) - len(counts)) + counts
    shape = [1] * (len(counts) - len(shape)) + shape
    if all(r == 1 for r in counts):
        return reshape(a, shape)
    split_shape = [n for r, s in zip(counts, shape, strict=True) for n in ((1, s) if r != 1 else (s,))]
    wide = [n for r, s in zip(counts, shape, strict=True) for n in ((r, s) if r != 1 else (s,))]
    return reshape(
        broadcast_to(reshape(a, split_shape), wide), [r * s for r, s in zip(counts, shape, strict=True)]
    )


def repeat(array: ArrayLike, repeats: int, axis: int | None = None) -> Array:
    """Every element `repeats` times along `axis` (None: of the flattened array).  Source: mlx.core.repeat."""
    a = operand(array)
    if axis is None:
        a, axis = flatten(a), 0
    shape = list(shape_of(a))
    i = normalize_axis(axis, len(shape))
    if repeats < 0:
        raise ShapeError(f"repeat: repeats={repeats}", fix="use repeats >= 0")
    wide = [*shape[: i + 1], repeats, *shape[i + 1 :]]
    return reshape(
        broadcast_to(expand_dims(a, i + 1), wide), [*shape[:i], shape[i] * repeats, *shape[i + 1 :]]
    )


def roll(a: ArrayLike, shift: int | Sequence[int], axis: int | Sequence[int] | None = None, /) -> Array:
    """`a` rotated by `shift` along `axis` (None: of the flattened array).  Source: mlx.core.roll."""
    a = operand(a)
    shape = shape_of(a)
    if axis is None:
        by = shift if isinstance(shift, int) else sum(shift)
        return reshape(_rolled(flatten(a), by, 0), shape)
    axes = [axis] if isinstance(axis, int) else list(axis)
    shifts = [shift] * len(axes) if isinstance(shift, int) else list(shift)
    if len(axes) == 1 and len(shifts) > 1:
        shifts = [sum(shifts)]
    if len(axes) != len(shifts):
        raise ShapeError(f"roll: {len(shifts)} shifts for {len(axes)} axes", fix="one shift for each axis")
    for x, by in zip(axes, shifts, strict=True):
        a = _rolled(a, by, normalize_axis(x, len(shape)))
    return a


def _rolled(a: Any, shift: int, axis: int) -> Any:
    shape = shape_of(a)
    n = shape[axis]
    by = shift % n if n else 0
    if by == 0:
        return a
    whole = [(0, s, 1) for s in shape]
    parts = [
        slice_ranges(a, [*whole[:axis], (low, high, 1), *whole[axis + 1 :]])
        for low, high in ((n - by, n), (0, n - by))
    ]
    return concatenate(parts, axis)


def broadcast_arrays(*arrays: ArrayLike) -> list[Array]:
    """All arrays in their common shape.  Source: mlx.core.broadcast_arrays."""
    given = [operand(a) for a in arrays]
    shape = broadcast_shapes(*(shape_of(a) for a in given)) if given else ()
    return [broadcast_to(a, shape) for a in given]


def unstack(x: ArrayLike, /, *, axis: int = 0) -> tuple[Array, ...]:
    """The slices of `x` along `axis`, without that axis.  Source: mlx.core.unstack."""
    x = operand(x)
    i = normalize_axis(axis, len(shape_of(x)))
    n = shape_of(x)[i]
    return tuple(squeeze(part, i) for part in split(x, n, i)) if n else ()


def meshgrid(*arrays: ArrayLike, sparse: bool = False, indexing: str = "xy") -> tuple[Array, ...]:
    """Grids of coordinates from 1-D arrays.  Source: mlx.core.meshgrid."""
    if indexing not in ("xy", "ij"):
        raise ShapeError(f"meshgrid: indexing={indexing!r}", fix='use "xy" or "ij"')
    given = [flatten(operand(a)) for a in arrays]
    order = list(range(len(given)))
    if indexing == "xy":
        order[:2] = order[:2][::-1]
    grids = [reshape(a, [-1 if axis == i else 1 for axis in order]) for i, a in enumerate(given)]
    return tuple(grids if sparse else broadcast_arrays(*grids))


def _atleast(a: ArrayLike, ndim: int) -> Array:
    a = operand(a)
    shape = shape_of(a)
    if len(shape) >= ndim:
        return a
    if ndim == 3 and len(shape) == 2:
        return reshape(a, (*shape, 1))
    return reshape(a, (1, *shape, 1) if ndim == 3 and shape else (1,) * (ndim - len(shape)) + shape)


def atleast_1d(*arys: ArrayLike) -> Any:
    """The arrays with one axis or more.  Source: mlx.core.atleast_1d."""
    out = [_atleast(a, 1) for a in arys]
    return out[0] if len(out) == 1 else out


def atleast_2d(*arys: ArrayLike) -> Any:
    """The arrays with two axes or more, new ones in front.  Source: mlx.core.atleast_2d."""
    out = [_atleast(a, 2) for a in arys]
    return out[0] if len(out) == 1 else out


def atleast_3d(*arys: ArrayLike) -> Any:
    """The arrays with three axes or more.  Source: mlx.core.atleast_3d."""
    out = [_atleast(a, 3) for a in arys]
    return out[0] if len(out) == 1 else out

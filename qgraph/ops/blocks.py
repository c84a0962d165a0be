"""Blocks of static size at positions that the program computes: reading and replacing them.

MLX reads and writes past the end of an array when such a block does not fit. Here a start too far is moved
back until the block fits.
"""

from __future__ import annotations

import builtins
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qgraph._errors import DTypeError, ShapeError
from qgraph.ir.dtypes import U64, DType
from qgraph.ir.op import Op, Operand, Types
from qgraph.ir.types import Shape, TensorType, normalize_axis
from qgraph.ops.dispatch import Array, ArrayLike, apply, frontend, frontend_of, operand, shape_of, type_of
from qgraph.ops.elementwise import astype
from qgraph.ops.indexed import check_indices
from qgraph.ops.indexing import index_operand
from qgraph.ops.shape import broadcast_to

__all__ = ["slice", "slice_update"]


def like(update: ArrayLike, a: ArrayLike) -> Any:
    """`update` in the dtype of `a`."""
    dtype = type_of(a).dtype
    return astype(operand(update, dtype), dtype)


@dataclass(frozen=True)
class DynamicSlice(Op):
    """A block of static size that begins where an array of indices says.

    A start too far is moved back until the block fits, so that no other memory is read.
    """

    name = "dynamic_slice"
    flops_per_element = 0
    axes: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()

    def infer(self, a: TensorType, start: TensorType) -> TensorType:
        """`sizes` is the shape of the result."""
        check_block(self.name, a, start, self.axes, self.sizes)
        return TensorType(self.sizes, a.dtype)

    def aside(self, operands: tuple[Any, ...], inputs: Types) -> dict[int, str]:
        """The clamped starts."""
        return {1: clamped(operands[1], inputs[1].dtype, inputs[0].shape, self.axes, self.sizes)}

    def emit(self, operands: tuple[Any, ...], inputs: Types, outputs: Types) -> Operand:
        """`mx.slice` from clamped starts."""
        return f"mx.slice({operands[0]}, {operands[1]}, {self.axes}, {self.sizes})"

    def reference(self, a: Any, start: Any) -> Any:
        """A subscript by slices from the clamped starts."""
        return a[block(a.shape, start, self.axes, self.sizes)]


def check_block(op: str, a: TensorType, start: TensorType, axes: Shape, sizes: Shape) -> None:
    """Refuse a block that does not fit into `a`."""
    check_indices(op, start)
    if start.shape not in ((len(axes),), ()) or (start.shape == () and len(axes) != 1):
        raise ShapeError(
            f"{op}: starts of shape {start.shape} for {len(axes)} axes", fix="one start per axis"
        )
    if len(set(axes)) != len(axes) or not all(0 <= x < a.ndim for x in axes):
        raise ShapeError(f"{op}: axes {axes} of an array of rank {a.ndim}", fix="name every axis once")
    if len(sizes) != a.ndim or any(not 0 <= s <= n for s, n in zip(sizes, a.shape, strict=False)):
        raise ShapeError(f"{op}: a block of {sizes} in an array of {a.shape}", fix="make the block fit")


def clamped(start: str, dtype: DType, shape: Shape, axes: Shape, sizes: Shape) -> str:
    """Source of the starts, limited so that the block fits: MLX would read or write past the end."""
    limits = [shape[x] - sizes[x] for x in axes]
    limit = str(limits[0]) if len(limits) == 1 else f"mx.array({limits})"
    if dtype.size < 4:  # a limit may be more than it can hold
        start = f"{start}.astype(mx.int32)"
    elif dtype is U64:  # next to an int32 it would become a float
        start = f"mx.minimum({start}, {2**31}).astype(mx.int64)"
    return f"mx.clip({start}, 0, {limit}).astype(mx.int32)"


def block(shape: Shape, start: Any, axes: Shape, sizes: Shape) -> tuple[builtins.slice, ...]:
    """The subscript of a block in the reference."""
    begin = dict(zip(axes, np.ravel(start).tolist(), strict=True))
    out: list[builtins.slice] = []
    for i, (n, size) in enumerate(zip(shape, sizes, strict=True)):
        low = builtins.max(0, builtins.min(begin.get(i, 0), n - size))
        out.append(builtins.slice(low, low + size))
    return tuple(out)


@frontend_of("dynamic_slice")
def slice(a: ArrayLike, start_indices: ArrayLike, axes: Sequence[int], slice_size: Sequence[int]) -> Array:
    """The block of shape `slice_size` that begins at `start_indices` along `axes` (elsewhere at 0).

    A start at which the block does not fit is moved until it does (MLX would read other memory).
    Shape: slice_size.  Source: mlx.core.slice.
    """
    a = operand(a)
    normal = tuple(normalize_axis(x, len(shape_of(a))) for x in axes)
    return apply(DynamicSlice(normal, tuple(slice_size)), a, index_operand(start_indices))


@dataclass(frozen=True)
class SliceUpdate(Op):
    """Replace the block that begins where an array of indices says.

    A start too far is moved back until the block fits, so that no other memory is written.
    """

    name = "slice_update"
    flops_per_element = 0
    axes: tuple[int, ...] = ()

    def infer(self, a: TensorType, update: TensorType, start: TensorType) -> TensorType:
        """The type of a, which the update must have but for its sizes on `axes`."""
        check_block(self.name, a, start, self.axes, update.shape)
        if update.dtype is not a.dtype:
            raise DTypeError(f"{self.name}: an update of {update.dtype} in {a.dtype}", fix="cast the update")
        outside = [i for i in range(a.ndim) if i not in self.axes and update.shape[i] != a.shape[i]]
        if outside:
            raise ShapeError(f"{self.name}: {update.shape} does not fill axes {outside} of {a.shape}")
        return a.dense()

    def aside(self, operands: tuple[Any, ...], inputs: Types) -> dict[int, str]:
        """The clamped starts: one statement for the buffers of all layers."""
        if inputs[1].size == 0:
            return {}
        return {2: clamped(operands[2], inputs[2].dtype, inputs[0].shape, self.axes, inputs[1].shape)}

    def emit(self, operands: tuple[Any, ...], inputs: Types, outputs: Types) -> Operand:
        """`mx.slice_update` at clamped starts."""
        a, update, start = operands
        return a if inputs[1].size == 0 else f"mx.slice_update({a}, {update}, {start}, {self.axes})"

    def reference(self, a: Any, update: Any, start: Any) -> Any:
        """Assignment to a copy."""
        out = np.array(a)
        out[block(a.shape, start, self.axes, np.shape(update))] = update
        return out


@frontend
def slice_update(a: ArrayLike, update: ArrayLike, start_indices: ArrayLike, axes: Sequence[int]) -> Array:
    """`a` with the block at `start_indices` along `axes` replaced by `update`, cast to a's dtype.

    A start at which the block does not fit is moved until it does (MLX would write other memory).
    Shape: a's; the update broadcasts outside `axes`.  Source: mlx.core.slice_update.
    """
    a = operand(a)
    shape = shape_of(a)
    normal = tuple(normalize_axis(x, len(shape)) for x in axes)
    update = like(update, a)
    given = shape_of(update)
    if len(given) > len(shape):
        raise ShapeError(f"slice_update: an update {given} in an array {shape}", fix="drop leading axes")
    sizes = (1,) * (len(shape) - len(given)) + given
    full = tuple(s if i in normal else n for i, (s, n) in enumerate(zip(sizes, shape, strict=True)))
    return apply(SliceUpdate(normal), a, broadcast_to(update, full), index_operand(start_indices))

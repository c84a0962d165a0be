"""The storage of dense arrays seen otherwise: their bits as another dtype, their elements by strides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import mlx.core as mx
import numpy as np

from qgraph._errors import ShapeError
from qgraph.ir.dtypes import F32, DType, dtype_of
from qgraph.ir.op import Op
from qgraph.ir.types import TensorType
from qgraph.ops.dispatch import Array, ArrayLike, apply, frontend, operand, shape_of, type_of

__all__ = ["as_strided", "view"]


@dataclass(frozen=True)
class Bitcast(Op):
    """The bits of an array of dtype `source` as numbers of `dtype`; the last axis grows or shrinks."""

    name = "view"
    mlx = "mx.view({0}, {dtype})"
    flops_per_element = 0
    dtype: DType = F32
    source: DType = F32

    def infer(self, x: TensorType) -> TensorType:
        """The last axis holds as many bytes as before."""
        if x.dtype is not self.source:
            raise ShapeError(f"view: {x} does not hold {self.source}", fix=f"view {self.source} numbers")
        if self.dtype.size == x.dtype.size:
            return TensorType(x.shape, self.dtype)
        size = x.shape[-1] * x.dtype.size if x.shape else 1
        if not x.shape or size % self.dtype.size:
            raise ShapeError(
                f"view: the last axis of {x} does not divide into numbers of {self.dtype}",
                fix=f"give it a multiple of {self.dtype.size} bytes",
            )
        return TensorType((*x.shape[:-1], size // self.dtype.size), self.dtype)

    def reference(self, x: Any) -> Any:
        """By MLX: what the bits of a number are is a matter of its dtype, which the reference widens."""
        x = np.asarray(x)
        given = mx.array(np.array(x.astype(np.float32) if x.dtype.kind == "f" else x, order="C"))
        seen = mx.view(given.astype(self.source.mlx), self.dtype.mlx)
        wide: Any = seen.astype(mx.float32) if self.dtype.is_float else seen
        return np.array(wide, np.float64 if self.dtype.is_float else None)


@frontend
def view(a: ArrayLike, dtype: mx.Dtype) -> Array:
    """The bits of `a` as numbers of another dtype.

    Shape: the last axis has as many bytes as before.  Errors: ShapeError where they do not divide.
    Source: mlx.core.view.

    >>> import mlx.core as mx, qgraph as qg
    >>> qg.view(mx.array([1.0]), mx.int32).tolist()
    [1065353216]
    """
    a = operand(a)
    source, target = type_of(a).dtype, dtype_of(dtype)
    return a if source is target else apply(Bitcast(target, source), a)


@dataclass(frozen=True)
class AsStrided(Op):
    """out[i, j, …] = x.flatten()[offset + i * strides[0] + j * strides[1] + …]."""

    name = "as_strided"
    # MLX flattens a broadcast to a view whose elements do not lie in order, and then refuses it.
    mlx = "mx.as_strided(mx.contiguous({0}), {shape}, {strides}, {offset})"
    flops_per_element = 0
    shape: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    offset: int = 0

    def infer(self, x: TensorType) -> TensorType:
        """`shape`, if all its elements lie within x: MLX would read other memory."""
        if len(self.shape) != len(self.strides) or any(n < 0 for n in self.shape):
            raise ShapeError(
                f"as_strided: shape {self.shape} and strides {self.strides}", fix="one stride per axis"
            )
        if 0 not in self.shape:
            ends = [(n - 1) * by for n, by in zip(self.shape, self.strides, strict=True)]
            first = self.offset + sum(min(0, e) for e in ends)
            last = self.offset + sum(max(0, e) for e in ends)
            if first < 0 or last >= x.size:
                raise ShapeError(
                    f"as_strided: elements {first} to {last} of an array of {x.size}",
                    fix="choose shape, strides and offset within the array",
                )
        return TensorType(self.shape, x.dtype)

    def reference(self, x: Any) -> Any:
        """By the positions of the elements."""
        where = np.full(self.shape, self.offset)
        for axis, (n, by) in enumerate(zip(self.shape, self.strides, strict=True)):
            steps = [n if i == axis else 1 for i in range(len(self.shape))]
            where = where + np.reshape(np.arange(n) * by, steps)
        return np.ravel(x)[where]


@frontend
def as_strided(
    a: ArrayLike, /, shape: Sequence[int] | None = None, strides: Sequence[int] | None = None, offset: int = 0
) -> Array:
    """The elements of `a`, taken in row-major order, at `offset` and the steps that `strides` give.

    Shape: `shape` (None: a's).  Errors: ShapeError where an element would lie outside of a.
    Source: mlx.core.as_strided.

    >>> import mlx.core as mx, qgraph as qg
    >>> qg.as_strided(mx.arange(5), (3, 2), (1, 1)).tolist()
    [[0, 1], [1, 2], [2, 3]]
    """
    a = operand(a)
    sizes = tuple(shape_of(a) if shape is None else shape)
    steps = strides or [prod(sizes[i + 1 :]) for i in range(len(sizes))]
    return apply(AsStrided(sizes, tuple(steps), offset), a)

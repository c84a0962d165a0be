"""Sorting and selection along an axis."""

from __future__ import annotations

from dataclasses import dataclass
from math import log2
from typing import Any

import numpy as np

from qgraph._errors import ShapeError
from qgraph.ir.dtypes import U32
from qgraph.ir.op import Op, Operand, Types
from qgraph.ir.types import TensorType, normalize_axis
from qgraph.ops.dispatch import Array, ArrayLike, apply, frontend, operand, shape_of
from qgraph.ops.shape import flatten

__all__ = ["argpartition", "argsort", "partition", "searchsorted", "sort", "topk"]


_np: Any = np  # for expressions of Any, whose types NumPy's stubs do not know


@dataclass(frozen=True)
class Sort(Op):
    """The elements along `axis`, ascending; NaN last."""

    name = "sort"
    mlx = "mx.sort({0}, axis={axis})"
    axis: int = -1

    def infer(self, x: TensorType) -> TensorType:
        """The type of x."""
        normalize_axis(self.axis, x.ndim)
        return x.dense()

    def reference(self, x: Any) -> Any:
        """NumPy's sort."""
        return np.sort(x, self.axis)

    def flops(self, inputs: Types, outputs: Types) -> int:
        """N log n comparisons."""
        n = inputs[0].shape[self.axis]
        return inputs[0].size * max(1, round(log2(max(n, 2))))


@dataclass(frozen=True)
class Argsort(Sort):
    """The positions that sort along `axis`; the order of equal elements is not defined."""

    name = "argsort"
    mlx = "mx.argsort({0}, axis={axis})"

    def infer(self, x: TensorType) -> TensorType:
        """Positions are u32."""
        return TensorType(super().infer(x).shape, U32)

    def reference(self, x: Any) -> Any:
        """A stable argsort."""
        return np.argsort(x, self.axis, kind="stable").astype(np.uint32)


@dataclass(frozen=True)
class Partition(Op):
    """Element `kth` in its sorted place, none larger before it; otherwise in undefined order."""

    name = "partition"
    mlx = "mx.partition({0}, {kth}, axis={axis})"
    flops_per_element = 4
    kth: int = 0
    axis: int = -1

    def infer(self, x: TensorType) -> TensorType:
        """The type of x."""
        size = x.shape[normalize_axis(self.axis, x.ndim)]
        if not -size <= self.kth < size:
            raise ShapeError(
                f"{self.name}: kth={self.kth} on axis {self.axis} of {x.shape}", fix="use a position"
            )
        return x.dense()

    def reference(self, x: Any) -> Any:
        """Sorted: one of the orders that are allowed."""
        return np.sort(x, self.axis)


@dataclass(frozen=True)
class Argpartition(Partition):
    """The positions that partition."""

    name = "argpartition"
    mlx = "mx.argpartition({0}, {kth}, axis={axis})"

    def infer(self, x: TensorType) -> TensorType:
        """Positions are u32."""
        return TensorType(super().infer(x).shape, U32)

    def reference(self, x: Any) -> Any:
        """Sorted: one of the orders that are allowed."""
        return np.argsort(x, self.axis, kind="stable").astype(np.uint32)


@dataclass(frozen=True)
class Topk(Op):
    """The `k` largest elements along `axis`, in undefined order."""

    name = "topk"
    mlx = "mx.topk({0}, {k}, axis={axis})"
    k: int = 1
    axis: int = -1

    def infer(self, x: TensorType) -> TensorType:
        """K elements on the axis."""
        axis = normalize_axis(self.axis, x.ndim)
        if not 0 <= self.k <= x.shape[axis]:
            raise ShapeError(f"topk: k={self.k} on axis {axis} of {x.shape}", fix="ask for fewer elements")
        return TensorType((*x.shape[:axis], self.k, *x.shape[axis + 1 :]), x.dtype)

    def reference(self, x: Any) -> Any:
        """Ascending: one of the orders that are allowed."""
        n = x.shape[self.axis]
        ascending: Any = _np.sort(x, self.axis)
        return _np.take(ascending, np.arange(n - self.k, n), self.axis)

    def flops(self, inputs: Types, outputs: Types) -> int:
        """A few comparisons for each element."""
        return 4 * inputs[0].size


def _along(a: ArrayLike, axis: int | None) -> tuple[Any, int]:
    a = operand(a)
    if axis is None or not shape_of(a):
        return flatten(a), 0
    return a, normalize_axis(axis, len(shape_of(a)))


@frontend
def sort(a: ArrayLike, /, axis: int | None = -1) -> Array:
    """`a` sorted along `axis`, ascending (None: flattened).  Source: mlx.core.sort."""
    a, i = _along(a, axis)
    return apply(Sort(i), a)


@frontend
def argsort(a: ArrayLike, /, axis: int | None = -1) -> Array:
    """The positions (u32) that sort `a` along `axis` (None: flattened).  Source: mlx.core.argsort."""
    a, i = _along(a, axis)
    return apply(Argsort(i), a)


@frontend
def partition(a: ArrayLike, /, kth: int, axis: int | None = -1) -> Array:
    """`a` with element `kth` in its sorted place, smaller ones before it, larger ones after.

    Source: mlx.core.partition.
    """
    a, i = _along(a, axis)
    return apply(Partition(kth, i), a)


@frontend
def argpartition(a: ArrayLike, /, kth: int, axis: int | None = -1) -> Array:
    """The positions (u32) that partition `a` at `kth`.  Source: mlx.core.argpartition."""
    a, i = _along(a, axis)
    return apply(Argpartition(kth, i), a)


@frontend
def topk(a: ArrayLike, /, k: int, axis: int | None = -1) -> Array:
    """The `k` largest elements along `axis` (None: of all), in undefined order.  Source: mlx.core.topk."""
    a, i = _along(a, axis)
    return apply(Topk(k, i), a)


@dataclass(frozen=True)
class SearchSorted(Op):
    """Where every value belongs in a sorted sequence: before equal elements, or with `right` behind them."""

    name = "searchsorted"
    right: bool = False
    flops_per_element = 8

    def infer(self, a: TensorType, values: TensorType) -> TensorType:
        """A u32 for every value."""
        if a.ndim != 1:
            raise ShapeError(f"searchsorted: a sequence of shape {a.shape}", fix="give one axis")
        return TensorType(values.shape, U32)

    def emit(self, operands: tuple[Any, ...], inputs: Types, outputs: Types) -> Operand:
        """`mx.searchsorted`."""
        return f"mx.searchsorted({operands[0]}, {operands[1]}, side={'right' if self.right else 'left'!r})"

    def reference(self, a: Any, values: Any) -> Any:
        """NumPy's."""
        return _np.searchsorted(a, values, "right" if self.right else "left").astype(np.uint32)


@frontend
def searchsorted(sorted_sequence: ArrayLike, values: ArrayLike, /, side: str = "left") -> Array:
    """Where `values` belong in an ascending sequence, so that it stays sorted.

    `side`: "left" of equal elements, or "right".  Shape: that of the values, u32.
    Source: mlx.core.searchsorted.

    >>> import mlx.core as mx, qgraph as qg
    >>> qg.searchsorted(mx.array([1, 2, 2]), mx.array([2]), "right").tolist()
    [3]
    """
    if side not in ("left", "right"):
        raise ShapeError(f"searchsorted: side={side!r}", fix='use "left" or "right"')
    return apply(SearchSorted(side == "right"), operand(sorted_sequence), operand(values))

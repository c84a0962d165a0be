"""The positions of extremes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qgraph._errors import ShapeError
from qgraph.ir.dtypes import U32
from qgraph.ir.op import NATIVE, Op, Operand, Types
from qgraph.ir.types import TensorType, normalize_axis
from qgraph.ops import native
from qgraph.ops.dispatch import Array, ArrayLike, apply, frontend, operand, shape_of
from qgraph.ops.reduce import last_axis

__all__ = ["argmax", "argmin"]


@dataclass(frozen=True)
class ArgReduction(Op):
    """The position of an extreme along `axis`; None: in the flattened array. The first one wins."""

    axis: int | None = None
    keepdims: bool = False

    def infer(self, x: TensorType) -> TensorType:
        """Positions are u32."""
        sizes = list(x.shape)
        if self.axis is None:
            sizes = [1] * x.ndim if self.keepdims else []
        else:
            axis = normalize_axis(self.axis, x.ndim)
            sizes[axis : axis + 1] = [1] if self.keepdims else []
        if x.size == 0:
            raise ShapeError(
                f"{self.name}: an array without elements, {x.shape}", fix="check the shape before"
            )
        return TensorType(tuple(sizes), U32)

    def flops(self, inputs: Types, outputs: Types) -> int:
        """One comparison for every element."""
        return inputs[0].size


@dataclass(frozen=True)
class Argmax(ArgReduction):
    """The position of the largest element."""

    name = "argmax"
    mlx = "mx.argmax({0}, axis={axis}, keepdims={keepdims})"
    kernel: str = ""

    def emit(self, operands: tuple[Any, ...], inputs: Types, outputs: Types) -> Operand:
        """The template, or the kernel."""
        if self.kernel:
            return native.call("argmax", *operands, keepdims=self.keepdims)
        return super().emit(operands, inputs, outputs)

    def native(self, inputs: Types, outputs: Types) -> Op | None:
        """Along the last axis."""
        fits = self.axis is not None and last_axis((self.axis,), *inputs)
        return replace(self, kernel=NATIVE) if fits else None

    def reference(self, x: Any) -> Any:
        """The first position of the maximum."""
        return np.argmax(x, self.axis, keepdims=self.keepdims).astype(np.uint32)


@dataclass(frozen=True)
class Argmin(ArgReduction):
    """The position of the smallest element."""

    name = "argmin"
    mlx = "mx.argmin({0}, axis={axis}, keepdims={keepdims})"

    def reference(self, x: Any) -> Any:
        """The first position of the minimum."""
        return np.argmin(x, self.axis, keepdims=self.keepdims).astype(np.uint32)


@frontend
def argmax(a: ArrayLike, /, axis: int | None = None, keepdims: bool = False) -> Array:
    """The position (u32) of the first largest element along `axis`; None: in a flattened.

    Source: mlx.core.argmax.
    """
    a = operand(a)
    return apply(Argmax(None if axis is None else normalize_axis(axis, len(shape_of(a))), keepdims), a)


@frontend
def argmin(a: ArrayLike, /, axis: int | None = None, keepdims: bool = False) -> Array:
    """The position (u32) of the first smallest element along `axis`; None: in a flattened.

    Source: mlx.core.argmin.
    """
    a = operand(a)
    return apply(Argmin(None if axis is None else normalize_axis(axis, len(shape_of(a))), keepdims), a)

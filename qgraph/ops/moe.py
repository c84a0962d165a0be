"""Products with chosen matrices of a stack: what a mixture of experts computes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import mlx.core as mx
import numpy as np

from qgraph._errors import DTypeError, ShapeError
from qgraph.ir.dtypes import DType, promote
from qgraph.ir.op import NATIVE, Op, Operand, Types, literal
from qgraph.ir.types import Shape, TensorType, broadcast_shapes
from qgraph.ops.dispatch import Array, ArrayLike, apply, frontend, operand, shape_of
from qgraph.ops.indexed import Indexed, check_indices, in_range, read
from qgraph.ops.indexing import index_operand
from qgraph.ops.linear import matmul_shape
from qgraph.ops.packed import check_inner
from qgraph.ops.quantized import (
    has_native_product,
    kernel_dtype,
    native_product,
    scaled,
    scheme_arguments,
    stored,
)

__all__ = ["gather_mm", "gather_qmm"]


@dataclass(frozen=True)
class GatherMm(Indexed):
    """a[lhs] @ b[rhs]: indices count the matrices of a stack in row-major order.

    Operands: a, b, then the indices of a where `lhs`, then those of b where `rhs`; without, all in order.
    """

    name = "gather_mm"
    from_the_end = False
    lhs: bool = False
    rhs: bool = False
    sorted_indices: bool = False

    def infer(self, a: TensorType, b: TensorType, *indices: TensorType) -> TensorType:
        """The broadcast shape of the indices, then that of the product."""
        dtype = promote(a.dtype, b.dtype)
        if not dtype.is_float:
            raise DTypeError(f"{self.name}: {a.dtype} by {b.dtype}", fix="cast both to a float dtype")
        if b.packing and a.shape:
            message = f"{self.name}: a has shape {a.shape}, the weights contract {b.shape[-2]}"
            check_inner(message, a.shape[-1], b, -2)
        return TensorType(self.shape_rule(a.shape, b.shape, indices), dtype)

    def shape_rule(self, a: Shape, b: Shape, indices: Types) -> Shape:
        """The result's shape, for b as (..., inner, columns)."""
        for t in indices:
            check_indices(self.name, t)
        if len(a) < 2 or len(b) < 2:
            raise ShapeError(f"{self.name}: {a} and {b} are not stacks of matrices", fix="add axes")
        if len(indices) != self.lhs + self.rhs:
            raise ShapeError(f"{self.name}: {len(indices)} arrays of indices")
        batch = broadcast_shapes(
            indices[0].shape if self.lhs else a[:-2], indices[-1].shape if self.rhs else b[:-2]
        )
        for given, shape in ((self.lhs, a), (self.rhs, b)):
            if given and prod(batch) and not prod(shape[:-2]):
                raise ShapeError(f"{self.name}: indices into an empty stack {shape}")
        return (*batch, *matmul_shape(a[-2:], b[-2:]))

    def indexed(self, inputs: Types) -> dict[int, tuple[int, int]]:
        """The indices of a and of b, of the matrices in their stacks."""
        stacks = [prod(t.shape[:-2]) for t, given in zip(inputs, (self.lhs, self.rhs), strict=False) if given]
        return {i: (0, n) for i, n in enumerate(stacks, 2)}

    def behind(self, inputs: Types) -> int:
        """The rows and columns of the products."""
        return 2

    def arguments(self, indices: tuple[str, ...]) -> str:
        """The keyword arguments for the indices."""
        lhs, rhs = indices[0] if self.lhs else None, indices[-1] if self.rhs else None
        return f"lhs_indices={lhs}, rhs_indices={rhs}, sorted_indices={self.sorted_indices}"

    def emit(self, operands: tuple[Any, ...], inputs: Types, outputs: Types) -> Operand:
        """`mx.gather_mm`, which on a CPU takes float32 only."""
        a, b, *indices = operands
        dtype, arguments = outputs[0].dtype, self.arguments(tuple(indices))
        if dtype.size == 4 or mx.default_device().type == mx.DeviceType.gpu:
            return f"mx.gather_mm({a}, {b}, {arguments})"
        a, b = (f"{x}.astype(mx.float32)" for x in (a, b))
        return f"mx.gather_mm({a}, {b}, {arguments}).astype({literal(dtype)})"

    def reference(self, a: Any, b: Any, *indices: Any) -> Any:
        """Take the matrices, then multiply."""
        a, b, valid = self.taken(a, b, indices)
        return read(np.matmul(a, b), valid, 2)

    def taken(self, a: Any, b: Any, indices: tuple[Any, ...]) -> tuple[Any, Any, Any]:
        """The matrices that meet, and where all indices are in range."""
        valid: Any = np.array(True)
        if self.lhs:
            a = a.reshape(prod(a.shape[:-2]), *a.shape[-2:])
            safe, valid = in_range(indices[0], len(a))
            a = a[safe]
        if self.rhs:
            b = b.reshape(prod(b.shape[:-2]), *b.shape[-2:])
            safe, also = in_range(indices[-1], len(b))
            b, valid = b[safe], valid & also
        return a, b, valid

    def flops(self, inputs: Types, outputs: Types) -> int:
        """One multiplication and one addition per term."""
        return 2 * prod(outputs[0].shape) * inputs[0].shape[-1]


def _indices(given: ArrayLike | None, stack: Shape) -> list[Any]:
    return [] if given is None else [index_operand(given, prod(stack[:-2]), 0)]


@frontend
def gather_mm(
    a: ArrayLike,
    b: ArrayLike,
    /,
    lhs_indices: ArrayLike | None = None,
    rhs_indices: ArrayLike | None = None,
    *,
    sorted_indices: bool = False,
) -> Array:
    """Products of chosen matrices of `a` and `b`: ``a[lhs_indices] @ b[rhs_indices]``.

    Indices count all matrices of a stack, in row-major order; out of range, the product is NaN. Without
    them, all matrices in order.  Shape: that of the indices, broadcast, then (rows, columns).
    Source: mlx.core.gather_mm.
    """
    a, b = operand(a), operand(b)
    op = GatherMm(lhs_indices is not None, rhs_indices is not None, sorted_indices)
    return apply(op, a, b, *_indices(lhs_indices, shape_of(a)), *_indices(rhs_indices, shape_of(b)))


@dataclass(frozen=True)
class GatherQmm(GatherMm):
    """x[lhs] @ w[rhs].T (transpose) or x[lhs] @ w[rhs] for a packed stack w, without unpacking it.

    Dtype as MLX's kernel: affine promotes x with the scales; the fp modes keep x's.
    """

    name = "gather_qmm"
    packed = True
    transpose: bool = True
    kernel: str = ""

    def infer(self, a: TensorType, b: TensorType, *indices: TensorType) -> TensorType:
        """As gather_mm, in the dtype of the kernel."""
        packing = stored(self.name, b)
        shape = b.shape
        if self.transpose:
            shape = (*shape[:-2], *shape[:-3:-1])
            if a.shape:
                message = f"{self.name}: x has shape {a.shape}, the weights contract {b.shape[-1]}"
                check_inner(message, a.shape[-1], b, -1)
        dtype: DType = kernel_dtype(a, packing).dtype
        return TensorType(self.shape_rule(a.shape, shape, indices), dtype)

    def emit(self, operands: tuple[Any, ...], inputs: Types, outputs: Types) -> Operand:
        """`mx.gather_qmm`; like quantized_matmul it must not see empty operands."""
        out, packing = outputs[0], stored(self.name, inputs[1])
        if out.size == 0 or inputs[0].size == 0:
            return f"mx.zeros({out.shape}, {literal(out.dtype)})"
        x, w, *indices = operands
        if not indices and inputs[0].ndim < 3 <= inputs[1].ndim:
            x = f"{x}[None]"  # MLX would take a lower rank of x to mean the first matrix of w only
        if self.kernel:
            lhs, rhs = indices[0] if self.lhs else None, indices[-1] if self.rhs else None
            return native_product(self, x, w, packing, lhs, rhs, sorted_indices=self.sorted_indices)
        call = (
            f"mx.gather_qmm({x}, {w.packed}, {w.scales}, {w.biases}, {self.arguments(tuple(indices))}, "
            f"transpose={self.transpose}, {scheme_arguments(packing.quantization)})"
        )
        return scaled(call, w, out)

    def reference(self, a: Any, b: Any, *indices: Any) -> Any:
        """Take the matrices, then multiply."""
        x, w, valid = self.taken(a, b, indices)
        return read(np.matmul(x, np.swapaxes(w, -1, -2) if self.transpose else w), valid, 2)

    def native(self, inputs: Types, outputs: Types) -> Op | None:
        """For every packing."""
        return replace(self, kernel=NATIVE) if has_native_product(inputs, outputs) else None


@frontend
def gather_qmm(
    x: ArrayLike,
    w: ArrayLike,
    /,
    lhs_indices: ArrayLike | None = None,
    rhs_indices: ArrayLike | None = None,
    *,
    transpose: bool = True,
    sorted_indices: bool = False,
) -> Array:
    """``x[lhs_indices] @ w[rhs_indices].T`` for a quantized stack `w` (without `transpose`: no ``.T``).

    Shape: as gather_mm.  Errors: DTypeError for a dense w.  Source: mlx.core.gather_qmm.
    """
    x, w = operand(x), operand(w)
    op = GatherQmm(lhs_indices is not None, rhs_indices is not None, sorted_indices, transpose)
    return apply(op, x, w, *_indices(lhs_indices, shape_of(x)), *_indices(rhs_indices, shape_of(w)))

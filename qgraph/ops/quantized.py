"""Ops that read packed storage: the targets of the rewrites.

`quantized_matmul` and its kin take a quantized value as one operand; what MLX wants as words, scales and
biases appears only when they are emitted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from qgraph._errors import DTypeError, ShapeError
from qgraph.ir.dtypes import promote
from qgraph.ir.graph import Node
from qgraph.ir.op import NATIVE, Op, Operand, Storage, Types, literal
from qgraph.ir.types import Packing, TensorType, broadcast_shapes
from qgraph.ops import native, tiled
from qgraph.ops.dispatch import Array, ArrayLike, apply, frontend, operand
from qgraph.ops.indexed import Indexed, check_indices, in_range, read
from qgraph.ops.packed import check_inner
from qgraph.ops.shape import Transpose
from qgraph.quant import Quantization

# The ops that multiply by a packed operand (the activations are operand 0), and all that read packed words.
PRODUCTS = ("quantized_matmul", "quantized_lora_matmul", "gather_qmm")
KERNELS = (*PRODUCTS, "quantized_take")


def reads_storage(node: Node) -> bool:
    """Whether a node works on its packed operands as they are stored.

    A kernel does; so does a view, if its result is packed too.
    """
    if node.op.name in (*KERNELS, "dequantize"):
        return True
    return node.op.packed and any(v.type.packing for v in node.outputs)


# MLX divides nvfp4's global scale by the largest values of its two formats, 448 (e4m3) and 6 (e2m1).
GLOBAL_SCALE_DIVISOR = 448 * 6


def scheme_arguments(q: Quantization) -> str:
    """The keyword arguments by which MLX's functions name a scheme."""
    return f"group_size={q.group_size}, bits={q.bits}, mode={q.mode!r}"


def stored(op: str, w: TensorType) -> Packing:
    """The packing of an operand that must be stored as it stands."""
    if w.packing is None:
        raise DTypeError(
            f"{op}: the weight is not quantized ({w})", fix="use qg.dot, or qg.quantize it first"
        )
    if w.packing.axis != -1:
        raise ShapeError(f"{op}: groups run along axis {w.packing.axis}", fix="pass the weight untransposed")
    return w.packing


def kernel_dtype(x: TensorType, packing: Packing) -> TensorType:
    """X's type with the dtype that MLX's quantized kernels return."""
    if not x.dtype.is_float:
        raise DTypeError(f"quantized_matmul: activations are {x.dtype}", fix="cast them to a float dtype")
    dtype = promote(x.dtype, packing.scales) if packing.quantization.has_biases else x.dtype
    return TensorType(x.shape, dtype)


@dataclass(frozen=True)
class QuantizedMatmul(Op):
    """x @ w.T (transpose) or x @ w for a packed w, without unpacking it.

    Dtype as MLX's kernel: affine promotes x with the scales; the fp modes keep x's. `kernel` is how it is
    computed, which `legalize` chooses for a CPU: "native", "int8" (native too, with activations rounded to
    8 bits) or "tiled" (see `qgraph.ops.tiled`).
    """

    name = "quantized_matmul"
    packed = True
    transpose: bool = True
    kernel: str = ""

    def infer(self, x: TensorType, w: TensorType) -> TensorType:
        packing = stored(self.name, w)
        n, k = w.shape[-2:] if self.transpose else w.shape[:-3:-1]
        if not x.shape or x.shape[-1] != k:
            message = f"{self.name}: x has shape {x.shape}, the weight contracts {k}"
            check_inner(message, (x.shape or (1,))[-1], w, -1 if self.transpose else -2)
            raise ShapeError(
                message,
                fix="make x's last axis that size; transpose=False contracts the other axis of the weight",
            )
        if w.ndim > 2 and x.ndim < 3:
            # MLX would use the first matrix only, without a word.
            message = f"{self.name}: x of rank {x.ndim} with a weight of rank {w.ndim}"
            raise ShapeError(message, fix="expand x")
        batch = x.shape[:-2] if w.ndim == 2 else broadcast_shapes(x.shape[:-2], w.shape[:-2])
        return TensorType((*batch, *x.shape[-2:-1], n), kernel_dtype(x, packing).dtype)

    def emit(self, operands: tuple[Any, ...], inputs: Types, outputs: Types) -> Operand:
        """`mx.quantized_matmul`; MLX's kernel dies on empty operands, so those are zeros outright."""
        out, packing = outputs[0], stored(self.name, inputs[1])
        if out.size == 0 or inputs[0].size == 0:  # no results, or sums of no terms
            return f"mx.zeros({out.shape}, {literal(out.dtype)})"
        x, w = operands
        if self.kernel in KERNELS_OF_PRODUCTS:
            return native_product(self, x, w, packing)
        if self.kernel == "tiled":
            q = packing.quantization
            arguments = f"{x}, {w.packed}, {w.scales}, {w.biases}, group_size={q.group_size}, bits={q.bits}"
            return f"{tiled.FUNCTION}({arguments})"
        call = (
            f"mx.quantized_matmul({x}, {w.packed}, {w.scales}, {w.biases}, "
            f"transpose={self.transpose}, {scheme_arguments(packing.quantization)})"
        )
        return scaled(call, w, out)

    def native(self, inputs: Types, outputs: Types) -> Op | None:
        """Every packing has a native kernel."""
        return replace(self, kernel=NATIVE) if has_native_product(inputs, outputs) else None

    def reference(self, x: Any, w: Any) -> Any:
        return np.matmul(x, np.swapaxes(w, -1, -2) if self.transpose else w)

    def flops(self, inputs: Types, outputs: Types) -> int:
        return 2 * prod(outputs[0].shape) * inputs[0].shape[-1]


KERNELS_OF_PRODUCTS = {NATIVE: "", "int8": "int8"}  # and what they do to the activations


def native_product(op: Any, x: str, w: Storage, packing: Packing, *more: object, **keywords: object) -> str:
    """Source of a product by a native kernel; `more` are its operands behind the weight."""
    function = "gather_qmm" if more else "quantized_matmul"
    keywords |= {"transpose": op.transpose, **native.scheme(packing.quantization)}
    if activations := KERNELS_OF_PRODUCTS[op.kernel]:
        keywords["activations"] = activations
    return native.call(function, x, *native.components(w), *more, **keywords)


def has_native_product(inputs: Types, outputs: Types) -> bool:
    """Whether there is a native kernel for the activations, the scales and the result of a product."""
    x, w = inputs[:2]
    scales = () if w.packing is None or not w.packing.quantization.has_biases else (w.packing.scales,)
    return native.floats(x, *outputs) and all(s in native.DTYPES for s in scales)


def scaled(call: str, w: Storage, out: TensorType) -> str:
    """The product with nvfp4's global scale, where there is one."""
    if w.global_scale is None:
        return call
    return f"({call} * ({w.global_scale} / {GLOBAL_SCALE_DIVISOR})).astype({literal(out.dtype)})"


@frontend
def quantized_matmul(x: ArrayLike, w: ArrayLike, /, *, transpose: bool = True) -> Array:
    """``x @ w.T`` (``x @ w`` without `transpose`) for a quantized `w`.

    Shape: as dot.  Errors: DTypeError for a dense w.  Source: mlx.core.quantized_matmul.
    """
    return apply(QuantizedMatmul(transpose), operand(x), operand(w))


@dataclass(frozen=True)
class QuantizedLoraMatmul(QuantizedMatmul):
    """quantized_matmul(x, w) + scale * (x @ a) @ b: a LoRA branch on a packed base.

    Meaning in dtypes: the base as quantized_matmul; the branch is computed in the adapter's promoted
    dtype and added there, then rounded once to the base's dtype.
    """

    name = "quantized_lora_matmul"

    def infer(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: TensorType, w: TensorType, a: TensorType, b: TensorType, scale: TensorType
    ) -> TensorType:
        base = super().infer(x, w)
        if w.ndim != 2 or a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
            raise ShapeError(f"{self.name}: adapters {a.shape} and {b.shape} on a weight {w.shape}")
        if a.shape[0] != x.shape[-1] or b.shape[1] != base.shape[-1]:
            raise ShapeError(f"{self.name}: adapters {a.shape}, {b.shape} do not fit the base {w.shape}")
        if scale.size != 1:
            raise ShapeError(f"{self.name}: the scale has shape {scale.shape}", fix="pass one number")
        return base

    def emit(self, operands: tuple[Any, ...], inputs: Types, outputs: Types) -> Operand:
        """The base, the rank-r product scaled where it is smallest, and one `mx.addmm` for the rest."""
        x, w, a, b, scale = operands
        out = outputs[0]
        if out.size == 0:
            return f"mx.zeros({out.shape}, {literal(out.dtype)})"
        base = super().emit((x, w), inputs[:2], outputs)
        if self.kernel in KERNELS_OF_PRODUCTS:
            low = f"{native.call('matmul', x, a)} * mx.reshape({scale}, ())"
            return f"({base} + {native.call('matmul', low, b)}).astype({literal(out.dtype)})"
        low = f"mx.matmul({x}, {a}) * mx.reshape({scale}, ())"
        if out.ndim == 1:  # addmm wants matrices
            return f"({base} + mx.matmul({low}, {b})).astype({literal(out.dtype)})"
        return f"mx.addmm({base}, {low}, {b}).astype({literal(out.dtype)})"

    def native(self, inputs: Types, outputs: Types) -> Op | None:
        """Where the adapter's products have native kernels too."""
        return super().native(inputs, outputs) if native.floats(*inputs[2:4]) else None

    def reference(self, x: Any, w: Any, a: Any, b: Any, scale: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().reference(x, w) + np.reshape(scale, ()) * np.matmul(np.matmul(x, a), b)

    def flops(self, inputs: Types, outputs: Types) -> int:
        rank, m = inputs[2].shape[1], prod(inputs[0].shape[:-1])
        return super().flops(inputs, outputs) + 2 * m * rank * (inputs[2].shape[0] + inputs[3].shape[1])


@frontend
def quantized_lora_matmul(
    x: ArrayLike, w: ArrayLike, a: ArrayLike, b: ArrayLike, scale: ArrayLike, /, *, transpose: bool = True
) -> Array:
    """``x @ w.T + scale * (x @ a) @ b`` with a packed `w` and an adapter beside it.

    Shape: a (in, r), b (r, out), one scale.  The packed words are read, never changed.
    Source: mlx_lm.tuner.lora.LoRALinear.
    """
    return apply(QuantizedLoraMatmul(transpose), *map(operand, (x, w, a, b, scale)))


@dataclass(frozen=True)
class QuantizedTake(Indexed):
    """Rows (or other slices along an axis that is not packed) of a packed value, unpacked."""

    name = "quantized_take"
    packed = True
    axis: int = 0
    kernel: str = ""

    def infer(self, w: TensorType, indices: TensorType) -> TensorType:
        stored(self.name, w)
        check_indices(self.name, indices)
        if not 0 <= self.axis < w.ndim - 1:
            raise ShapeError(f"{self.name}: axis {self.axis} of rank {w.ndim} is packed or missing")
        if not w.shape[self.axis] and indices.size:
            message = f"{self.name}: axis {self.axis} of {w.shape} is empty"
            raise ShapeError(message, fix="take from an axis with elements")
        shape = (*w.shape[: self.axis], *indices.shape, *w.shape[self.axis + 1 :])
        return TensorType(shape, w.dtype)

    def emit(self, operands: tuple[Any, ...], inputs: Types, outputs: Types) -> Operand:
        """Take from every component, then unpack what was taken."""
        w, indices = operands
        out = outputs[0]
        if out.size == 0:
            return f"mx.zeros({out.shape}, {literal(out.dtype)})"
        if self.kernel:
            packing = stored(self.name, inputs[0])
            keywords = native.scheme(packing.quantization)
            return native.call(self.name, *native.components(w), indices, **keywords, dtype=out.dtype)
        # One row would leave vectors, which MLX does not unpack.
        rows = indices if out.ndim > 1 else f"mx.reshape({indices}, (1,))"
        parts = [p and f"mx.take({p}, {rows}, axis={self.axis})" for p in w[:3]]
        taken = Storage(parts[0], parts[1], parts[2], w.global_scale)
        text = unpacked(taken, inputs[0], out.size)
        return text if rows == indices else f"mx.reshape({text}, {out.shape})"

    def native(self, inputs: Types, outputs: Types) -> Op | None:
        """For rows of a matrix."""
        w, indices = inputs
        rows = w.ndim == 2 and self.axis == 0 and indices.dtype.is_int
        return replace(self, kernel=NATIVE) if rows and has_native_product((w.dense(), w), outputs) else None

    def indexed(self, inputs: Types) -> dict[int, tuple[int, int]]:
        """The indices, of the axis."""
        return {1: (self.axis, inputs[0].shape[self.axis])}

    def behind(self, inputs: Types) -> int:
        """The axes of w behind the one that is indexed."""
        return inputs[0].ndim - self.axis - 1

    def reference(self, w: Any, indices: Any) -> Any:
        """As take."""
        safe, valid = in_range(indices, w.shape[self.axis])
        return read(np.take(w, safe, self.axis), valid, w.ndim - self.axis - 1)

    flops_per_element = 2


@frontend
def quantized_take(w: ArrayLike, indices: ArrayLike, /, *, axis: int = 0) -> Array:
    """Take along an axis of a quantized `w`, unpacking only what is taken.

    Shape: as take.  Source: mlx.nn.QuantizedEmbedding.
    """
    return apply(QuantizedTake(axis), operand(w), operand(indices))


def unpacked(w: Storage, t: TensorType, size: int) -> str:
    """Source that dequantizes storage `w`, packed as a value of type `t`, with `size` numbers in it."""
    assert t.packing is not None
    q = t.packing.quantization
    arrays = [w.packed, w.scales, w.biases]
    if q.has_biases and t.packing.scales is not t.dtype:  # MLX computes in the dtype of the scales
        arrays[1:] = (f"{a}.astype(mx.float32)" for a in arrays[1:])
    odd = q.group_size == 16 and size % 32 != 0  # MLX unpacks 32 numbers at a time
    if odd:
        arrays = [a and f"mx.concatenate([{a}, {a}])" for a in arrays]
    scale = f", global_scale={w.global_scale}" if w.global_scale else ""
    call = (
        f"mx.dequantize({arrays[0]}, {arrays[1]}, {arrays[2]}, "
        f"{scheme_arguments(q)}{scale}, dtype={literal(t.dtype)})"
    )
    return f"mx.split({call}, 2)[0]" if odd else call


@dataclass(frozen=True)
class Dequantize(Op):
    """The numbers of a packed value."""

    name = "dequantize"
    packed = True
    flops_per_element = 2
    kernel: str = ""

    def infer(self, w: TensorType) -> TensorType:
        if w.packing is None:
            raise DTypeError(f"dequantize: {w} is not quantized", fix="use it as it is")
        return w.dense()

    def emit(self, operands: tuple[Any, ...], inputs: Types, outputs: Types) -> Operand:
        """`mx.dequantize`, then the axes in logical order."""
        t = inputs[0]
        if t.size == 0:
            return f"mx.zeros({t.shape}, {literal(t.dtype)})"
        order = t.storage_axes
        text = self.unpacked(operands[0], t)
        if order == tuple(range(t.ndim)):
            return text
        return Transpose.mlx.format(text, axes=tuple(order.index(i) for i in range(t.ndim)))

    def unpacked(self, w: Storage, t: TensorType) -> str:
        """Source of the numbers in the order in which they are stored."""
        if not self.kernel:
            return unpacked(w, t, t.size)
        assert t.packing is not None
        keywords = native.scheme(t.packing.quantization)
        return (
            f"{native.call('dequantize', *native.components(w), **keywords)[:-1]}, dtype={literal(t.dtype)})"
        )

    def native(self, inputs: Types, outputs: Types) -> Op | None:
        """For every packing."""
        return replace(self, kernel=NATIVE) if has_native_product((outputs[0], inputs[0]), outputs) else None

    def reference(self, w: Any) -> Any:
        return w


@frontend
def dequantize(w: ArrayLike) -> Array:
    """The dense array of a quantized value, in its logical dtype.  Source: mlx.core.dequantize."""
    return apply(Dequantize(), operand(w))

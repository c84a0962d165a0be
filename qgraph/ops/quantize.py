"""Packing a dense value in groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qgraph._errors import DTypeError, ShapeError
from qgraph.ir.dtypes import F32, U8
from qgraph.ir.op import Op, Operand, Types, literal
from qgraph.ir.types import Packing, TensorType
from qgraph.ops.dispatch import ArrayLike, apply, operand
from qgraph.ops.quantized import scheme_arguments
from qgraph.quant import Quantization

DEFAULT = Quantization()


@dataclass(frozen=True)
class Quantize(Op):
    """Pack a dense value in groups along its last axis."""

    name = "quantize"
    quantization: Quantization = DEFAULT
    flops_per_element = 6

    def infer(self, w: TensorType, *global_scale: TensorType) -> TensorType:
        q = self.quantization
        if not w.dtype.is_float or w.dtype.name == "f64":
            raise DTypeError(
                f"quantize: {w.dtype} cannot be packed", fix="cast to float32, float16 or bfloat16"
            )
        if w.ndim < 2:
            raise ShapeError(f"quantize: a value of rank {w.ndim}", fix="reshape it to a matrix")
        if w.shape[-1] % q.group_size:
            raise ShapeError(
                f"quantize: the last axis of {w.shape} is not a multiple of group_size={q.group_size}",
                fix="choose another group_size (32, 64 or 128 for affine), or pad the axis",
            )
        if global_scale and (q.mode != "nvfp4" or global_scale[0].shape or global_scale[0].dtype is not F32):
            raise DTypeError(
                "quantize: a global scale is one float32 number, for nvfp4 only",
                fix="leave it out, or pass mode='nvfp4' and a number",
            )
        scales = w.dtype if q.has_biases else U8
        return TensorType(w.shape, w.dtype, Packing(q, scales, -1, bool(global_scale)))

    def emit(self, operands: tuple[Any, ...], inputs: Types, outputs: Types) -> Operand:
        """One call that gives all components, then the global scale as it is."""
        call = self.call(operands, inputs)
        return f"(*{call}, {operands[1]})" if operands[1:] else call

    def call(self, operands: tuple[Any, ...], inputs: Types) -> str:
        """Source of words, scales and biases; empty ones outright, on which MLX divides by zero."""
        w, *scale = operands
        if inputs[0].size == 0:
            return self._empty(inputs[0])
        arguments = scheme_arguments(self.quantization)
        if scale:
            arguments += f", global_scale={scale[0]}"
        if inputs[0].size % 32:  # MLX packs 32 numbers at a time: pack them twice, keep one
            return f"[part[0] for part in mx.quantize(mx.stack([{w}, {w}]), {arguments})]"
        return f"mx.quantize({w}, {arguments})"

    def _empty(self, w: TensorType) -> str:
        zeros = [f"mx.zeros({part.shape}, {literal(part.dtype)})" for part in self.infer(w).storage]
        return f"({', '.join(zeros)},)"

    def reference(self, w: Any, *global_scale: Any) -> Any:
        """The numbers after rounding to the grid."""
        from qgraph.ops.formats import round_to_grid

        return round_to_grid(w, self.quantization, *global_scale) if w.size else w


def quantize(
    w: ArrayLike,
    /,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    mode: str = "affine",
    global_scale: ArrayLike | None = None,
) -> Any:
    """Pack `w` in groups along its last axis: a QuantizedTensor (in a trace, a quantized value).

    Shape: rank >= 2, last axis a multiple of group_size.  Dtype: float32, float16 or bfloat16, kept as
    the logical dtype.  Errors: ShapeError, DTypeError.  Source: mlx.core.quantize.

    >>> import mlx.core as mx, qgraph as qg
    >>> qg.quantize(mx.ones((8, 64)), bits=4, group_size=32).quantization.bits
    4
    """
    defaults = {"affine": (4, 64), "mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}
    default_bits, default_group = defaults.get(mode, (4, 64))
    q = Quantization(
        bits=default_bits if bits is None else bits,
        group_size=default_group if group_size is None else group_size,
        mode=mode,  # pyright: ignore[reportArgumentType]  (Quantization checks it)
    )
    extra = [] if global_scale is None else [operand(global_scale, F32)]
    return apply(Quantize(q), operand(w), *extra)

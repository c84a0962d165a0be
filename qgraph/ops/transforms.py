"""Transforms along axes: Walsh-Hadamard, and what `qg.fft` is made of."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import mlx.core as mx
import numpy as np

from qgraph._errors import DTypeError, ShapeError
from qgraph.ir.dtypes import C64, F32, floating
from qgraph.ir.op import Op, Operand, Types, literal
from qgraph.ir.types import TensorType, normalize_axis
from qgraph.ops.dispatch import Array, ArrayLike, apply, frontend, operand, shape_of
from qgraph.ops.reduce import widens

__all__ = ["hadamard_transform"]

# MLX has Hadamard matrices of these sizes, times powers of two.
HADAMARD = (1, 12, 20, 28)


@dataclass(frozen=True)
class Hadamard(Op):
    """scale * x @ H along the last axis, H being MLX's Hadamard matrix of its size."""

    name = "hadamard_transform"
    mlx = "mx.hadamard_transform({0}, scale={scale})"
    scale: float = 1.0

    def infer(self, x: TensorType) -> TensorType:
        """The shape of x, in a float dtype."""
        n = x.shape[-1] if x.shape else 0
        if not any(n and n % m == 0 and (n // m).bit_count() == 1 for m in HADAMARD):
            raise ShapeError(
                f"{self.name}: the last axis of {x.shape} is not m * 2**k with m in {HADAMARD}",
                fix="pad the axis",
            )
        if x.dtype.is_complex:
            raise DTypeError(f"{self.name}: the operand is {x.dtype}", fix="transform its parts")
        return TensorType(x.shape, floating(x.dtype))

    def emit(self, operands: tuple[Any, ...], inputs: Types, outputs: Types) -> Operand:
        """The template; 16-bit operands run in float32, since MLX would add in 16 bit."""
        if inputs[0].dtype is F32:
            return super().emit(operands, inputs, outputs)
        wide = super().emit((f"{operands[0]}.astype(mx.float32)",), inputs, outputs)
        return f"{wide}.astype({literal(outputs[0].dtype)})" if widens(outputs[0].dtype) else wide

    def reference(self, x: Any) -> Any:
        """The product with the matrix."""
        return self.scale * (x @ _matrix(np.shape(x)[-1]))

    def flops(self, inputs: Types, outputs: Types) -> int:
        """Log n additions for every element."""
        return outputs[0].size * (outputs[0].shape[-1].bit_length() + 1)


@cache
def _matrix(n: int) -> Any:
    """H, by its definition as MLX's: only signs, which float32 holds."""
    return np.array(mx.hadamard_transform(mx.eye(n), scale=1.0), np.float64)


@frontend
def hadamard_transform(a: ArrayLike, scale: float | None = None) -> Array:
    """The Walsh-Hadamard transform along the last axis, times `scale` (None: 1 / sqrt of its size).

    Shape: a's; the last axis is m * 2**k with m in (1, 12, 20, 28).  Source: mlx.core.hadamard_transform.
    """
    a = operand(a)
    shape = shape_of(a)
    factor = scale if scale is not None else shape[-1] ** -0.5 if shape else 1.0
    return apply(Hadamard(float(factor)), a)


@dataclass(frozen=True)
class Fft(Op):
    """A discrete Fourier transform along `axes`.

    `real`: of real numbers, or with `inverse` to real numbers; the last of the axes then has size // 2 + 1
    complex ones, and `size` is how many real ones it has.
    """

    name = "fft"
    axes: tuple[int, ...] = ()
    inverse: bool = False
    real: bool = False
    size: int = 0

    def infer(self, x: TensorType) -> TensorType:
        """Complex numbers, or real ones for the inverse of a real transform."""
        for axis in self.axes:
            normalize_axis(axis, x.ndim)
        if any(x.shape[axis] == 0 for axis in self.axes) or not self.axes:
            raise ShapeError(f"fft: axes {self.axes} of {x.shape}", fix="transform axes with elements")
        if (x.dtype.is_complex) == (self.real and not self.inverse):
            raise DTypeError(
                f"fft: the operand is {x.dtype}", fix="cast it: a real transform takes real numbers"
            )
        if not self.real:
            return TensorType(x.shape, C64)
        last, shape = self.axes[-1], list(x.shape)
        if self.inverse and shape[last] != self.size // 2 + 1:
            raise ShapeError(f"fft: {shape[last]} terms for {self.size} real numbers")
        shape[last] = self.size if self.inverse else shape[last] // 2 + 1
        return TensorType(tuple(shape), F32 if self.inverse else C64)

    def emit(self, operands: tuple[Any, ...], inputs: Types, outputs: Types) -> Operand:
        """MLX's function of several axes."""
        name = f"{'i' if self.inverse else ''}{'r' if self.real else ''}fftn"
        sizes = [outputs[0].shape[axis] for axis in self.axes] if self.real and self.inverse else None
        return f"mx.fft.{name}({operands[0]}, s={sizes}, axes={list(self.axes)})"

    def reference(self, x: Any) -> Any:
        """NumPy's."""
        if not self.real:
            return (np.fft.ifftn if self.inverse else np.fft.fftn)(x, axes=self.axes)
        if not self.inverse:
            return np.fft.rfftn(x, axes=self.axes)
        sizes = [np.shape(x)[axis] for axis in self.axes[:-1]] + [self.size]
        return np.fft.irfftn(x, sizes, self.axes)

    def flops(self, inputs: Types, outputs: Types) -> int:
        """5 n log n."""
        n = prod(max(inputs[0].shape[axis], outputs[0].shape[axis]) for axis in self.axes)
        return 5 * max(inputs[0].size, outputs[0].size) * n.bit_length()

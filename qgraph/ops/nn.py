"""Normalization and rotary positions: ops of their own that become MLX's fused kernels, and activations."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qgraph._errors import DTypeError, ShapeError
from qgraph.ir.dtypes import F32, promote
from qgraph.ir.op import NATIVE, Op, Operand, Types
from qgraph.ir.types import TensorType
from qgraph.ops import native
from qgraph.ops.dispatch import Array, ArrayLike, apply, frontend, operand
from qgraph.ops.elementwise import add, logaddexp, maximum, multiply, power, sigmoid, silu, tanh

__all__ = [
    "gelu_approx",
    "gelu_fast_approx",
    "layer_norm",
    "leaky_relu",
    "mish",
    "relu_squared",
    "rms_norm",
    "rope",
    "softplus",
    "swiglu",
]


_np: Any = np  # for expressions of Any, whose types NumPy's stubs do not know


def check_float(op: str, t: TensorType) -> None:
    """Refuse an operand that is no float."""
    if not t.dtype.is_float:
        raise DTypeError(f"{op}: the operand is {t.dtype}", fix="cast it to a float dtype with .astype")


def _check_norm(op: str, x: TensorType, parameters: tuple[TensorType, ...]) -> TensorType:
    check_float(op, x)
    if not x.shape:
        raise ShapeError(f"{op}: a 0-d value has no last axis", fix="give it an axis")
    for p in parameters:
        check_float(op, p)
        if p.shape != x.shape[-1:]:
            raise ShapeError(f"{op}: a parameter of shape {p.shape} for rows of {x.shape[-1]}, {x.shape}")
    return TensorType(x.shape, promote(x.dtype, *(p.dtype for p in parameters)))


@dataclass(frozen=True)
class RmsNorm(Op):
    """x / sqrt(mean(x²) + eps) along the last axis, times the weight where one is given."""

    name = "rms_norm"
    flops_per_element = 5
    eps: float = 1e-5
    kernel: str = ""

    def infer(self, x: TensorType, *weight: TensorType) -> TensorType:
        """The shape of x; the promoted dtype."""
        return _check_norm(self.name, x, weight)

    def emit(self, operands: tuple[Any, ...], inputs: Types, outputs: Types) -> Operand:
        """`mx.fast.rms_norm`."""
        x, *weight = operands
        if self.kernel:
            return native.call("rms_norm", x, weight[0] if weight else None, eps=self.eps)
        return f"mx.fast.rms_norm({x}, {weight[0] if weight else None}, {self.eps!r})"

    def reference(self, x: Any, *weight: Any) -> Any:
        """The formula."""
        out = x / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + self.eps) if x.size else np.array(x)
        return out * weight[0] if weight else out

    def native(self, inputs: Types, outputs: Types) -> Op | None:
        """For the float types."""
        return replace(self, kernel=NATIVE) if native.floats(*inputs) else None


@frontend
def rms_norm(x: ArrayLike, weight: ArrayLike | None, eps: float) -> Array:
    """``x / sqrt(mean(x**2, -1) + eps) * weight`` along the last axis.

    Shape: x's; the weight is (x.shape[-1],).  Dtype: the promoted one.  Source: mlx.core.fast.rms_norm.
    """
    return apply(RmsNorm(float(eps)), operand(x), *([] if weight is None else [operand(weight)]))


@dataclass(frozen=True)
class LayerNorm(Op):
    """(x - mean) / sqrt(var + eps) along the last axis, times the weight, plus the bias."""

    name = "layer_norm"
    flops_per_element = 8
    eps: float = 1e-5
    weight: bool = True
    bias: bool = True
    kernel: str = ""

    def infer(self, x: TensorType, *parameters: TensorType) -> TensorType:
        """The shape of x; the promoted dtype."""
        if len(parameters) != self.weight + self.bias:
            raise ShapeError(f"layer_norm: {len(parameters)} parameters, not {self.weight + self.bias}")
        out = _check_norm(self.name, x, parameters)
        return out if self.weight else x.dense()  # as in MLX: a bias alone takes the dtype of x

    def _split(self, parameters: Any) -> tuple[Any, Any]:
        return (parameters[0] if self.weight else None, parameters[-1] if self.bias else None)

    def emit(self, operands: tuple[Any, ...], inputs: Types, outputs: Types) -> Operand:
        """`mx.fast.layer_norm`."""
        weight, bias = self._split(operands[1:])
        if self.kernel:
            return native.call("layer_norm", operands[0], weight, bias, eps=self.eps)
        return f"mx.fast.layer_norm({operands[0]}, {weight}, {bias}, {self.eps!r})"

    def reference(self, x: Any, *parameters: Any) -> Any:
        """The formula."""
        weight, bias = self._split(parameters)
        out = np.array(x)
        if x.size:
            centred = x - np.mean(x, -1, keepdims=True)
            out = centred / np.sqrt(np.mean(np.square(centred), -1, keepdims=True) + self.eps)
        out = out if weight is None else out * weight
        return out if bias is None else out + bias

    def native(self, inputs: Types, outputs: Types) -> Op | None:
        """For the float types."""
        return replace(self, kernel=NATIVE) if native.floats(*inputs) else None


@frontend
def layer_norm(x: ArrayLike, weight: ArrayLike | None, bias: ArrayLike | None, eps: float) -> Array:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` along the last axis.

    Shape: x's; weight and bias are (x.shape[-1],).  Source: mlx.core.fast.layer_norm.
    """
    given = [operand(p) for p in (weight, bias) if p is not None]
    return apply(LayerNorm(float(eps), weight is not None, bias is not None), operand(x), *given)


@dataclass(frozen=True)
class Rope(Op):
    """Rotate pairs of the first `dims` features by angles that grow with the position.

    Operands: x, then the offset where `offset` is None, then the frequencies where `base` is None.
    """

    name = "rope"
    flops_per_element = 10
    dims: int = 0
    traditional: bool = False
    base: float | None = 10000.0
    scale: float = 1.0
    offset: int | None = 0
    kernel: str = ""

    def infer(self, x: TensorType, *rest: TensorType) -> TensorType:
        """The type of x."""
        check_float(self.name, x)
        if x.ndim < 3:
            raise ShapeError(
                f"rope: x has shape {x.shape}, not (batch, ..., length, features)", fix="add axes"
            )
        if not 0 < self.dims <= x.shape[-1] or self.dims % 2:
            raise ShapeError(
                f"rope: dims={self.dims} of {x.shape[-1]} features", fix="use an even number of them"
            )
        if len(rest) != (self.offset is None) + (self.base is None):
            raise ShapeError(f"rope: {len(rest)} operands beside x")
        if self.offset is None and (not rest[0].dtype.is_int or rest[0].shape not in ((), (1,), x.shape[:1])):
            raise ShapeError(f"rope: an offset {rest[0]} for x {x}", fix="one integer, or one for each batch")
        if self.base is None and rest[-1].shape != (self.dims // 2,):
            raise ShapeError(
                f"rope: freqs of shape {rest[-1].shape}", fix=f"give dims / 2 = {self.dims // 2}"
            )
        return x.dense()

    def emit(self, operands: tuple[Any, ...], inputs: Types, outputs: Types) -> Operand:
        """`mx.fast.rope`."""
        x, *rest = operands
        offset = rest.pop(0) if self.offset is None else self.offset
        freqs = f", freqs={rest[0]}" if rest else ""
        name = f"{NATIVE}.rope" if self.kernel else "mx.fast.rope"
        return (
            f"{name}({x}, {self.dims}, traditional={self.traditional}, base={self.base!r}, "
            f"scale={self.scale!r}, offset={offset}{freqs})"
        )

    def native(self, inputs: Types, outputs: Types) -> Op | None:
        """For the float types."""
        return replace(self, kernel=NATIVE) if native.floats(inputs[0]) else None

    def reference(self, x: Any, *rest: Any) -> Any:
        """Rotation by position * scale * base^(-2i / dims), or position * scale / freqs[i]."""
        angles = self.angles(x.shape[-2]).reference(*rest)
        rows = len(angles) if angles.ndim > 2 else 1
        angles = angles.reshape(rows, *[1] * (x.ndim - 3), x.shape[-2], self.dims // 2)
        return self._rotated(np.array(x), np.cos(angles), np.sin(angles))

    def angles(self, length: int) -> RopeAngles:
        """The op that gives the angles of `length` positions; its operands are those after x."""
        return RopeAngles(self.dims, self.base, self.scale, self.offset, length)

    def _rotated(self, x: Any, cos: Any, sin: Any) -> Any:
        """Pairs are neighbours (traditional), or one from each half."""
        if self.traditional:
            first, second = slice(0, self.dims, 2), slice(1, self.dims, 2)
        else:
            first, second = slice(0, self.dims // 2), slice(self.dims // 2, self.dims)
        a, b = x[..., first].copy(), x[..., second].copy()
        x[..., first], x[..., second] = a * cos - b * sin, a * sin + b * cos
        return x


@dataclass(frozen=True)
class RopeAngles(Op):
    """The angles by which `rope` turns the pairs of features, in f32.

    Operands: the offset where `offset` is None, then the frequencies where `base` is None.
    Shape: (length, dims / 2); for a batch of offsets (batch, 1, length, dims / 2).
    """

    name = "rope_angles"
    flops_per_element = 3
    dims: int = 0
    base: float | None = 10000.0
    scale: float = 1.0
    offset: int | None = 0
    length: int = 1

    def infer(self, *rest: TensorType) -> TensorType:
        """One row for every position."""
        if len(rest) != (self.offset is None) + (self.base is None):
            raise ShapeError(f"rope_angles: {len(rest)} operands")
        half = self.dims // 2
        if self.offset is None and (not rest[0].dtype.is_int or rest[0].ndim > 1):
            raise ShapeError(f"rope_angles: an offset {rest[0]}", fix="one integer, or one for each batch")
        if self.base is None and rest[-1].shape != (half,):
            raise ShapeError(f"rope_angles: freqs of shape {rest[-1].shape}", fix=f"give dims / 2 = {half}")
        batch = rest[0].shape if self._batched(rest) else ()
        return TensorType((*batch, *((1,) if batch else ()), self.length, half), F32)

    def _batched(self, rest: tuple[Any, ...]) -> bool:
        """Whether every row of the batch has its own offset; the shape (1,) is one offset for all."""
        return self.offset is None and rest[0].shape not in ((), (1,))

    def emit(self, operands: tuple[Any, ...], inputs: Types, outputs: Types) -> Operand:
        """What MLX's rope does on a CPU, step by step, so that the bits are the same."""
        rest, half = list(operands), self.dims // 2
        offset = rest.pop(0) if self.offset is None else self.offset
        offset = f"{offset}[:, None, None]" if self._batched(inputs) else offset
        positions = f"mx.add(mx.arange({self.length}, dtype=mx.float32), {offset})"
        positions = positions if self.scale == 1 else f"mx.multiply({positions}, {self.scale!r})"
        if self.base is None:
            speeds = f"mx.reciprocal({rest[0]})"
        else:
            step = float(np.float32(np.float32(math.log(np.float32(self.base))) / np.float32(half)))
            speeds = f"mx.exp(mx.multiply(mx.arange(0, {-half}, -1, dtype=mx.float32), {step!r}))"
        return f"mx.multiply(mx.expand_dims({positions}, -1), {speeds})"

    def reference(self, *rest: Any) -> Any:
        """Position * scale * base^(-2i / dims), or position * scale / freqs[i]."""
        left, half = list(rest), self.dims // 2
        given = np.asarray(left.pop(0) if self.offset is None else self.offset)
        offset = np.reshape(given, (-1, 1, 1) if given.size != 1 else ()).astype(np.int64)
        if self.base is None:
            speeds = 1.0 / np.asarray(left[0], np.float64)
        else:
            speeds = self.base ** (-np.arange(half, dtype=np.float64) / half)
        positions: Any = (offset + _np.arange(self.length)) * self.scale
        return positions[..., None] * speeds


@frontend
def rope(
    a: ArrayLike,
    dims: int,
    *,
    traditional: bool,
    base: float | None,
    scale: float,
    offset: int | ArrayLike,
    freqs: ArrayLike | None = None,
) -> Array:
    """Rotary positions on the first `dims` features.

    `offset` is the first position: an int (one program for each), or an array of one integer or of one
    for each batch (one program for all). Exactly one of `base` and `freqs` (dims / 2 wavelengths) is given.
    Shape: (batch, ..., length, features).  Source: mlx.core.fast.rope.
    """
    if (base is None) == (freqs is None):
        raise ShapeError("rope: give exactly one of base and freqs", fix="pass base=10000.0")
    static = isinstance(offset, int)
    op = Rope(
        dims, traditional, None if base is None else float(base), float(scale), offset if static else None
    )
    rest = ([] if static else [operand(offset)]) + ([] if freqs is None else [operand(freqs)])
    return apply(op, operand(a), *rest)


def softplus(a: ArrayLike) -> Array:
    """``log(1 + exp(a))``.  Source: mlx.nn.softplus."""
    a = operand(a)
    return logaddexp(a, 0)


def leaky_relu(a: ArrayLike, negative_slope: float = 0.01) -> Array:
    """`a` where positive, else `negative_slope` times a.  Source: mlx.nn.leaky_relu."""
    a = operand(a)
    return maximum(multiply(a, negative_slope), a)


def mish(a: ArrayLike) -> Array:
    """``a * tanh(softplus(a))``.  Source: mlx.nn.mish."""
    a = operand(a)
    return multiply(a, tanh(softplus(a)))


def gelu_approx(a: ArrayLike) -> Array:
    """The tanh form of gelu.  Source: mlx.nn.gelu_approx.

    >>> import mlx.core as mx, qgraph as qg
    >>> round(qg.gelu_approx(mx.array(1.0)).item(), 4)
    0.8412
    """
    a = operand(a)
    inner = multiply(add(a, multiply(power(a, 3), 0.044715)), math.sqrt(2 / math.pi))
    return multiply(multiply(a, 0.5), add(tanh(inner), 1))


def gelu_fast_approx(a: ArrayLike) -> Array:
    """``a * sigmoid(1.702 a)``.  Source: mlx.nn.gelu_fast_approx."""
    a = operand(a)
    return multiply(a, sigmoid(multiply(a, 1.702)))


def relu_squared(a: ArrayLike) -> Array:
    """``max(a, 0) ** 2``.  Source: mlx.nn.relu2."""
    a = maximum(operand(a), 0)
    return multiply(a, a)


def swiglu(gate: ArrayLike, x: ArrayLike) -> Array:
    """``silu(gate) * x``.  Source: mlx_lm.models.activations.swiglu."""
    return multiply(silu(gate), x)

"""Numbers of 8 bits: e4m3, one sign, four bits of exponent, three of mantissa."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from qgraph._errors import DTypeError
from qgraph.ir.dtypes import BF16, U8, DType, dtype_of
from qgraph.ir.op import Op
from qgraph.ir.types import TensorType
from qgraph.ops.dispatch import Array, ArrayLike, apply, frontend, operand

__all__ = ["from_fp8", "to_fp8"]

_CODE = np.arange(128)
_EXPONENT, _MANTISSA = _CODE >> 3, (_CODE & 7) / 8.0
# What the codes without a sign stand for; the last one is no number.
_VALUES: NDArray[np.float64] = np.where(
    _EXPONENT == 0, _MANTISSA * 2.0**-6, (1 + _MANTISSA) * 2.0 ** (_EXPONENT - 7.0)
)
_VALUES[127] = np.nan


@dataclass(frozen=True)
class ToFp8(Op):
    """The nearest number of 8 bits, ties to the even one, the largest for what is larger and for NaN."""

    name = "to_fp8"
    mlx = "mx.to_fp8({0})"

    def infer(self, x: TensorType) -> TensorType:
        """Bytes."""
        if not x.dtype.is_float:
            raise DTypeError(f"to_fp8: the operand is {x.dtype}", fix="cast it to a float dtype")
        return TensorType(x.shape, U8)

    def reference(self, x: Any) -> Any:
        """By the table of all values."""
        return _encoded(np.asarray(x, np.float64))


def _encoded(x: NDArray[np.float64]) -> NDArray[np.uint8]:
    size = np.abs(x)
    above = np.minimum(np.searchsorted(_VALUES[:127], size), 126)
    below = np.maximum(above - 1, 0)
    to_above, to_below = _VALUES[above] - size, size - _VALUES[below]
    up = (to_above < to_below) | ((to_above == to_below) & (above % 2 == 0))
    nearest = np.where(up, above, below)
    code = np.where(np.isnan(size) | (size >= _VALUES[126]), 126, nearest)
    return (code + 128 * (np.signbit(x) & ~np.isnan(x))).astype(np.uint8)


@dataclass(frozen=True)
class FromFp8(Op):
    """The numbers that bytes stand for."""

    name = "from_fp8"
    mlx = "mx.from_fp8({0}, {dtype})"
    dtype: DType = BF16

    def infer(self, x: TensorType) -> TensorType:
        """Every float dtype holds them exactly."""
        if x.dtype is not U8 or not self.dtype.is_float:
            raise DTypeError(
                f"from_fp8: from {x.dtype} to {self.dtype}", fix="convert bytes to a float dtype"
            )
        return TensorType(x.shape, self.dtype)

    def reference(self, x: Any) -> Any:
        """By the table."""
        code: Any = np.asarray(x, np.int64)
        return (1.0 - 2.0 * (code >> 7)) * _VALUES[code & 127]


@frontend
def to_fp8(x: ArrayLike) -> Array:
    """`x` rounded to 8 bits (e4m3, the largest is 448), as bytes.

    Shape: x's.  Dtype: u8.  Errors: DTypeError for what is no float.  Source: mlx.core.to_fp8.

    >>> import mlx.core as mx, qgraph as qg
    >>> qg.to_fp8(mx.array([1.0, -2.0, 1000.0])).tolist()
    [56, 192, 126]
    """
    return apply(ToFp8(), operand(x))


@frontend
def from_fp8(x: ArrayLike, dtype: mx.Dtype = mx.bfloat16) -> Array:
    """The numbers that bytes of `to_fp8` stand for.

    Shape: x's.  Errors: DTypeError for what are no bytes.  Source: mlx.core.from_fp8.

    >>> import mlx.core as mx, qgraph as qg
    >>> qg.from_fp8(mx.array([56, 192], mx.uint8), mx.float32).tolist()
    [1.0, -2.0]
    """
    return apply(FromFp8(dtype_of(dtype)), operand(x))

"""New arrays. In a trace they are nodes, so that one jitted function makes them every time it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import mlx.core as mx
import numpy as np

from qgraph._errors import DTypeError, ShapeError, TraceError
from qgraph.ir.dtypes import BOOL, F32, I32, I64, DType, dtype_of
from qgraph.ir.op import Constant, Op
from qgraph.ir.types import TensorType
from qgraph.ops.dispatch import Array, ArrayLike, active, apply, operand, shape_of, type_of
from qgraph.ops.elementwise import astype, where
from qgraph.ops.shape import broadcast_to

__all__ = [
    "arange",
    "array",
    "eye",
    "full",
    "full_like",
    "identity",
    "linspace",
    "ones",
    "ones_like",
    "tri",
    "tril",
    "triu",
    "zeros",
    "zeros_like",
]

LARGEST_CONSTANT = 1024  # elements that become part of a program instead of an input to it
Shaped = int | Sequence[int]


def numpy_dtype(dtype: DType) -> Any:
    """The dtype of the reference: float64 for every float."""
    if dtype.is_float:
        return np.float64
    return np.complex128 if dtype.is_complex else np.dtype(dtype.mlx_name.rstrip("_"))


def _shape(shape: Shaped) -> tuple[int, ...]:
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    if any(s < 0 for s in sizes):
        raise ShapeError(f"negative size in {sizes}", fix="use sizes >= 0")
    return sizes


def array(val: Any, dtype: mx.Dtype | None = None) -> Array:
    """`val` as an array: a number, a nested list, a NumPy or MLX array; in a trace also a traced value.

    Dtype: float32, int32 (int64 where needed) or bool for Python numbers.  Source: mlx.core.array.
    """
    if isinstance(val, mx.array) or hasattr(val, "_type"):
        return val if dtype is None else astype(val, dtype)
    if active() is None:
        return mx.array(val) if dtype is None else mx.array(val, dtype)
    try:
        given = np.asarray(val)
    except ValueError:
        raise ShapeError("array: a ragged list", fix="make all rows equally long") from None
    except TraceError:
        raise DTypeError("array: a list with traced values", fix="join them with qg.stack") from None
    if given.dtype.kind not in "biuf":
        raise DTypeError(f"array: cannot read {type(val).__name__}", fix="pass numbers")
    if given.size > LARGEST_CONSTANT:
        return astype(mx.array(val), dtype) if dtype is not None else mx.array(val)
    kind = (
        _dtype_of_numpy(given, isinstance(val, (np.ndarray, np.generic)))
        if dtype is None
        else dtype_of(dtype)
    )
    cast = {"b": bool, "i": int, "f": float}[{"bool": "b"}.get(kind.name, "f" if kind.is_float else "i")]
    return apply(Constant(tuple(cast(x) for x in given.ravel().tolist()), given.shape, kind))


def _dtype_of_numpy(x: np.ndarray[Any, Any], typed: bool) -> DType:
    """As MLX reads NumPy arrays (`typed`) and Python numbers, which are int32 where int64 is not needed."""
    if x.dtype.kind == "f":
        return {2: dtype_of(mx.float16)}.get(x.dtype.itemsize, F32)
    if x.dtype == np.int64 and not typed:
        return I64 if x.size and max(abs(int(x.min())), abs(int(x.max()))) >= 2**31 else I32
    return BOOL if x.dtype == np.bool_ else DType.all[f"{x.dtype.kind}{8 * x.dtype.itemsize}"]


def full(shape: Shaped, vals: ArrayLike, dtype: mx.Dtype | None = None) -> Array:
    """`vals` broadcast to `shape`, as `dtype` (None: that of vals).  Source: mlx.core.full."""
    value = operand(vals) if dtype is None else astype(operand(vals, dtype_of(dtype)), dtype)
    return broadcast_to(value, _shape(shape))


def zeros(shape: Shaped, dtype: mx.Dtype = mx.float32) -> Array:
    """Zeros.  Source: mlx.core.zeros."""
    return full(shape, 0, dtype)


def ones(shape: Shaped, dtype: mx.Dtype = mx.float32) -> Array:
    """Ones.  Source: mlx.core.ones."""
    return full(shape, 1, dtype)


def full_like(a: ArrayLike, vals: ArrayLike, dtype: mx.Dtype | None = None) -> Array:
    """`vals` in the shape and dtype of `a`.  Source: mlx.core.full_like."""
    t = type_of(operand(a))
    return full(t.shape, vals, t.dtype.mlx if dtype is None else dtype)


def zeros_like(a: ArrayLike, /) -> Array:
    """Zeros in the shape and dtype of `a`.  Source: mlx.core.zeros_like."""
    return full_like(a, 0)


def ones_like(a: ArrayLike, /) -> Array:
    """Ones in the shape and dtype of `a`.  Source: mlx.core.ones_like."""
    return full_like(a, 1)


@dataclass(frozen=True)
class Arange(Op):
    """start, start + step, … before stop."""

    name = "arange"
    mlx = "mx.arange({start}, {stop}, {step}, dtype={dtype})"
    start: float = 0
    stop: float = 0
    step: float = 1
    dtype: DType = I32

    def infer(self) -> TensorType:
        """As many as fit."""
        return TensorType((max(0, ceil((self.stop - self.start) / self.step)),), self.dtype)

    def reference(self) -> Any:
        """Multiples of the step, rounded to integers first for an integer dtype, as MLX does."""
        kind = numpy_dtype(self.dtype)
        (n,) = self.infer().shape
        first = np.array(self.start).astype(kind)
        step = np.array(self.start + self.step).astype(kind) - first
        return (first + np.arange(n) * step).astype(kind)


def arange(
    start: float, stop: float | None = None, step: float | None = None, dtype: mx.Dtype | None = None
) -> Array:
    """Numbers from `start` (0 where `stop` is not given) to before `stop`, `step` apart.

    Dtype: int32 for ints, int64 where they need it, float32 for floats.  Source: mlx.core.arange.

    >>> import qgraph as qg
    >>> qg.arange(1, 7, 2).tolist()
    [1, 3, 5]
    """
    low, high = (0, start) if stop is None else (start, stop)
    by = 1 if step is None else step
    numbers = (low, high, by)
    if not all(isinstance(x, (int, float)) for x in numbers):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise DTypeError(
            "arange: the limits must be Python numbers: they decide a shape", fix="use ints or floats"
        )
    if by == 0:
        raise ShapeError("arange: the step is 0")
    if dtype is not None:
        kind = dtype_of(dtype)
    elif any(isinstance(x, float) for x in numbers):
        kind = F32
    else:
        kind = I32 if all(-(2**31) <= x < 2**31 for x in numbers) else I64
    return apply(Arange(low, high, by, kind))


@dataclass(frozen=True)
class Linspace(Op):
    """`num` numbers at equal distances."""

    name = "linspace"
    mlx = "mx.linspace({start}, {stop}, {num}, {endpoint}, dtype={dtype})"
    start: float = 0.0
    stop: float = 1.0
    num: int = 50
    endpoint: bool = True
    dtype: DType = F32

    def infer(self) -> TensorType:
        """`num` numbers."""
        return TensorType((self.num,), self.dtype)

    def reference(self) -> Any:
        """NumPy's linspace."""
        return np.linspace(self.start, self.stop, self.num, self.endpoint).astype(numpy_dtype(self.dtype))


def linspace(
    start: float, stop: float, num: int = 50, endpoint: bool = True, dtype: mx.Dtype = mx.float32
) -> Array:
    """`num` numbers from `start` to `stop` (included with `endpoint`).  Source: mlx.core.linspace."""
    if num < 0:
        raise ShapeError(f"linspace: num={num}", fix="use num >= 0")
    return apply(Linspace(float(start), float(stop), num, endpoint, dtype_of(dtype)))


@dataclass(frozen=True)
class Eye(Op):
    """Ones on the diagonal `k`."""

    name = "eye"
    mlx = "mx.eye({n}, {m}, {k}, dtype={dtype})"
    n: int = 1
    m: int = 1
    k: int = 0
    dtype: DType = F32

    def infer(self) -> TensorType:
        """N rows of m."""
        return TensorType((self.n, self.m), self.dtype)

    def reference(self) -> Any:
        """NumPy's eye."""
        return np.eye(self.n, self.m, self.k, numpy_dtype(self.dtype))


@dataclass(frozen=True)
class Tri(Eye):
    """Ones on and below the diagonal `k`."""

    name = "tri"
    mlx = "mx.tri({n}, {m}, {k}, dtype={dtype})"

    def reference(self) -> Any:
        """NumPy's tri."""
        return np.tri(self.n, self.m, self.k, numpy_dtype(self.dtype))


def _matrix(kind: type[Eye], n: int, m: int | None, k: int, dtype: mx.Dtype) -> Array:
    rows, columns = _shape((n, n if m is None else m))
    return apply(kind(rows, columns, k, dtype_of(dtype)))


def eye(n: int, m: int | None = None, k: int = 0, dtype: mx.Dtype = mx.float32) -> Array:
    """Ones on the diagonal `k` of an (n, m) matrix of zeros.  Source: mlx.core.eye."""
    return _matrix(Eye, n, m, k, dtype)


def identity(n: int, dtype: mx.Dtype = mx.float32) -> Array:
    """The identity matrix.  Source: mlx.core.identity."""
    return eye(n, dtype=dtype)


def tri(n: int, m: int | None = None, k: int = 0, dtype: mx.Dtype = mx.float32) -> Array:
    """Ones on and below the diagonal `k`.  Source: mlx.core.tri."""
    return _matrix(Tri, n, m, k, dtype)


def tril(x: ArrayLike, k: int = 0) -> Array:
    """`x` with zeros above the diagonal `k`.  Shape: rank >= 2.  Source: mlx.core.tril."""
    x = operand(x)
    return where(_lower("tril", x, k), x, zeros((), type_of(x).dtype.mlx))


def triu(x: ArrayLike, k: int = 0) -> Array:
    """`x` with zeros below the diagonal `k`.  Shape: rank >= 2.  Source: mlx.core.triu."""
    x = operand(x)
    return where(_lower("triu", x, k - 1), zeros((), type_of(x).dtype.mlx), x)


def _lower(name: str, x: Any, k: int) -> Any:
    shape = shape_of(x)
    if len(shape) < 2:
        raise ShapeError(f"{name}: an array of shape {shape}", fix="use two axes or more")
    return tri(shape[-2], shape[-1], k, mx.bool_)

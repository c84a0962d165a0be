"""Reductions over axes, and softmax."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod as product
from typing import Any, ClassVar, cast

import numpy as np

from qgraph._errors import DTypeError, ShapeError
from qgraph.ir.dtypes import BOOL, F32, I8, I16, I32, U8, U16, U32, DType, floating
from qgraph.ir.op import NATIVE, Op, Operand, Types, literal
from qgraph.ir.types import TensorType, normalize_axis
from qgraph.ops import native
from qgraph.ops.dispatch import Array, ArrayLike, apply, as_axes, frontend, operand, shape_of
from qgraph.ops.elementwise import Rule, boolean, same

Axis = int | Sequence[int] | None

__all__ = [
    "all",
    "any",
    "logsumexp",
    "max",
    "mean",
    "min",
    "prod",
    "softmax",
    "std",
    "sum",
    "var",
]


def accumulating(dtype: DType) -> DType:
    """The dtype in which MLX adds and multiplies: 32 bits at least for integers."""
    if dtype in (U8, U16):
        return U32
    return I32 if dtype in (BOOL, I8, I16) else dtype


def widens(dtype: DType) -> bool:
    """Whether sums over elements of `dtype` are to be kept in float32: MLX's default is the storage type.

    In bfloat16 a sum of ones ends at 256, and a softmax is off by several percent.
    """
    return dtype.is_float and dtype.size == 2


def real_floating(dtype: DType) -> DType:
    """The float dtype of a variance: complex numbers vary by a real number."""
    return dtype if dtype.is_float else F32


def numpy_accumulator(x: Any) -> Any:
    """`accumulating` for the arrays of the reference."""
    kind = np.asarray(x).dtype
    if kind == np.bool_ or (kind.kind == "i" and kind.itemsize < 4):
        return np.int32
    return np.uint32 if kind.kind == "u" and kind.itemsize < 4 else kind


def last_axis(axes: tuple[int, ...], x: TensorType) -> bool:
    """Whether `axes` are the last one of floats that the kernels know, and it has elements."""
    return x.ndim > 0 and x.size > 0 and tuple(a % x.ndim for a in axes) == (x.ndim - 1,) and native.floats(x)


@dataclass(frozen=True)
class Reduction(Op):
    """One number for all elements along `axes`."""

    axes: tuple[int, ...] = ()
    keepdims: bool = False
    rule: ClassVar[Rule] = staticmethod(same)
    of_nothing: ClassVar[str] = "0"  # source of the value for no elements; "" where there is none

    def infer(self, x: TensorType) -> TensorType:
        """The shape without `axes`; the dtype by the rule."""
        shape = self.result(x)
        if not self.of_nothing and 0 in [x.shape[i] for i in self.axes]:
            raise ShapeError(
                f"{self.name}: axes {self.axes} of {x.shape} have no elements",
                fix="reduce axes with elements",
            )
        return TensorType(shape, type(self).rule(x.dtype))

    def result(self, x: TensorType) -> tuple[int, ...]:
        """The shape of the result."""
        for axis in self.axes:
            normalize_axis(axis, x.ndim)
        if self.keepdims:
            return tuple(1 if i in self.axes else s for i, s in enumerate(x.shape))
        return tuple(s for i, s in enumerate(x.shape) if i not in self.axes)

    def emit(self, operands: tuple[Any, ...], inputs: Types, outputs: Types) -> Operand:
        """The template; the value itself for an operand without elements: MLX's kernels read beyond it."""
        if inputs[0].size == 0:
            return f"mx.full({outputs[0].shape}, {self.of_nothing or 0}, {literal(outputs[0].dtype)})"
        text = str(super().emit(operands, inputs, outputs))
        if self.axes or inputs[0].dtype is outputs[0].dtype:
            return text
        return f"{text}.astype({literal(outputs[0].dtype)})"  # MLX leaves an array alone that is not reduced

    def flops(self, inputs: Types, outputs: Types) -> int:
        """One operation for every element read."""
        return self.flops_per_element * inputs[0].size


@dataclass(frozen=True)
class NativeReduction(Reduction):
    """One with a native kernel."""

    kernel: str = ""

    def emit(self, operands: tuple[Any, ...], inputs: Types, outputs: Types) -> Operand:
        """The template, or the kernel."""
        if self.kernel:
            return native.call(self.name, *operands, keepdims=self.keepdims)
        return super().emit(operands, inputs, outputs)

    def native(self, inputs: Types, outputs: Types) -> Op | None:
        """Along the last axis."""
        return replace(self, kernel=NATIVE) if last_axis(self.axes, *inputs) else None


def _reduction(
    name: str,
    meaning: str,
    reference: Callable[..., Any],
    rule: Rule = same,
    flops: int = 1,
    of_nothing: str = "0",
    base: type[Reduction] = Reduction,
) -> Callable[..., Array]:
    """Declare the reduction `name` and give its public function."""

    def meaning_in_numpy(self: Reduction, x: Any) -> Any:
        return reference(x, self.axes, self.keepdims)

    # MLX would subtract the maximum and exponentiate in the integer dtype.
    operand_text = "{0}.astype({out.dtype})" if name == "logsumexp" else "{0}"
    body = {
        "name": name,
        "reference": meaning_in_numpy,
        "rule": staticmethod(rule),
        "mlx": f"mx.{name}({operand_text}, axis={{axes}}, keepdims={{keepdims}})",
        "flops_per_element": flops,
        "of_nothing": of_nothing,
        "__module__": __name__,
    }
    kind = cast(type[Reduction], type(name.title(), (base,), body))

    def function(a: ArrayLike, /, axis: Axis = None, keepdims: bool = False) -> Array:
        a = operand(a)
        return apply(kind(_axes(axis, a), keepdims), a)

    function.__name__ = function.__qualname__ = name
    function.__doc__ = (
        f"{meaning} along `axis` (None: all axes).\n\n    Shape: a's without the axes; `keepdims` leaves "
        f"them as 1.  Errors: ShapeError for an axis out of range.\n    Source: mlx.core.{name}.\n    "
    )
    return frontend(function)


def _axes(axis: Axis, a: ArrayLike) -> tuple[int, ...]:
    return as_axes(axis if axis is None or isinstance(axis, int) else tuple(axis), len(shape_of(a)))


def _sum(x: Any, axes: tuple[int, ...], keepdims: bool) -> Any:
    return np.sum(x, axes, numpy_accumulator(x), keepdims=keepdims)


def _prod(x: Any, axes: tuple[int, ...], keepdims: bool) -> Any:
    return np.prod(x, axes, numpy_accumulator(x), keepdims=keepdims)


def _mean(x: Any, axes: tuple[int, ...], keepdims: bool) -> Any:
    count = product(np.shape(x)[i] for i in axes)
    total = np.sum(x, axes, np.result_type(np.asarray(x).dtype, np.float64), keepdims=keepdims)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.true_divide(total, count)


def _max(x: Any, axes: tuple[int, ...], keepdims: bool) -> Any:
    return np.max(x, axes, keepdims=keepdims)


def _min(x: Any, axes: tuple[int, ...], keepdims: bool) -> Any:
    return np.min(x, axes, keepdims=keepdims)


def _all(x: Any, axes: tuple[int, ...], keepdims: bool) -> Any:
    return np.all(x, axes, keepdims=keepdims)


def _any(x: Any, axes: tuple[int, ...], keepdims: bool) -> Any:
    return np.any(x, axes, keepdims=keepdims)


def _logsumexp(x: Any, axes: tuple[int, ...], keepdims: bool) -> Any:
    x = np.asarray(x, np.float64)
    top = np.max(x, axes, keepdims=True, initial=-np.inf)
    shift = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        out = shift + np.log(np.sum(np.exp(x - shift), axes, keepdims=True))
    return out if keepdims else np.squeeze(out, axes)


NAN = "float('nan')"
sum = _reduction("sum", "The sum", _sum, accumulating)
mean = _reduction("mean", "The mean", _mean, floating, of_nothing=NAN)
prod = _reduction("prod", "The product", _prod, accumulating, of_nothing="1")
max = _reduction("max", "The largest element", _max, of_nothing="", base=NativeReduction)
min = _reduction("min", "The smallest element", _min, of_nothing="")
all = _reduction("all", "Whether every element is nonzero", _all, boolean, of_nothing="True")
any = _reduction("any", "Whether some element is nonzero", _any, boolean, of_nothing="False")
logsumexp = _reduction(
    "logsumexp",
    "log(sum(exp(a))) without overflow",
    _logsumexp,
    floating,
    flops=10,
    of_nothing="float('-inf')",
    base=NativeReduction,
)


@dataclass(frozen=True)
class Variance(Reduction):
    """The mean squared distance from the mean, with the divisor n - ddof."""

    name = "var"
    mlx = "mx.var({0}, axis={axes}, keepdims={keepdims}, ddof={ddof})"
    rule = staticmethod(real_floating)
    of_nothing = NAN
    flops_per_element = 4
    ddof: int = 0

    def reference(self, x: Any) -> Any:
        """NaN where n - ddof is not positive, as in MLX."""
        return self._variance(np.asarray(x) + 0.0)

    def _variance(self, x: Any) -> Any:
        count = product(x.shape[i] for i in self.axes)
        if count == 0:
            return np.full(np.sum(x, self.axes, keepdims=self.keepdims).shape, np.nan)
        total = np.sum(
            np.square(np.abs(x - np.mean(x, self.axes, keepdims=True))), self.axes, keepdims=self.keepdims
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.true_divide(total, count - self.ddof if count > self.ddof else 0)


@dataclass(frozen=True)
class Deviation(Variance):
    """The square root of the variance."""

    name = "std"
    mlx = "mx.std({0}, axis={axes}, keepdims={keepdims}, ddof={ddof})"

    def reference(self, x: Any) -> Any:
        """The root of the variance."""
        return np.sqrt(super().reference(x))


@frontend
def var(a: ArrayLike, /, axis: Axis = None, keepdims: bool = False, ddof: int = 0) -> Array:
    """The variance along `axis` (None: all axes), divided by n - ddof.  Source: mlx.core.var."""
    a = operand(a)
    return apply(Variance(_axes(axis, a), keepdims, ddof), a)


@frontend
def std(a: ArrayLike, /, axis: Axis = None, keepdims: bool = False, ddof: int = 0) -> Array:
    """The standard deviation along `axis` (None: all axes).  Source: mlx.core.std."""
    a = operand(a)
    return apply(Deviation(_axes(axis, a), keepdims, ddof), a)


@dataclass(frozen=True)
class Softmax(Op):
    """exp(x - max) / sum over `axes`; in float32 for 16-bit operands, unless captured code wants it so."""

    name = "softmax"
    flops_per_element = 12
    axes: tuple[int, ...] = ()
    precise: bool = True
    kernel: str = ""

    def infer(self, x: TensorType) -> TensorType:
        """The type of x, which must be a float: MLX would truncate the quotients to integers."""
        if not x.dtype.is_float:
            raise DTypeError(
                f"softmax: the operand is {x.dtype}", fix="cast it to a float dtype with .astype"
            )
        for axis in self.axes:
            normalize_axis(axis, x.ndim)
        return x.dense()

    def emit(self, operands: tuple[Any, ...], inputs: Types, outputs: Types) -> Operand:
        """`mx.softmax`, whose `precise` means float32 inside."""
        if self.kernel:
            return native.call("softmax", *operands)
        precise = ", precise=True" if self.precise and widens(inputs[0].dtype) else ""
        return f"mx.softmax({operands[0]}, axis={literal(self.axes)}{precise})"

    def reference(self, x: Any) -> Any:
        """NaN for a row of -inf alone, as in MLX."""
        with np.errstate(invalid="ignore"):
            e = np.exp(x - np.max(x, self.axes, keepdims=True, initial=-np.inf))
            return e / np.sum(e, self.axes, keepdims=True)

    def native(self, inputs: Types, outputs: Types) -> Op | None:
        """Along the last axis, precise."""
        return replace(self, kernel=NATIVE) if last_axis(self.axes, *inputs) else None


@frontend
def softmax(a: ArrayLike, /, axis: Axis = None, *, precise: bool = True) -> Array:
    """The softmax over `axis` (None: over all axes, as in MLX).

    16-bit operands are computed in float32 whatever `precise` says, an argument of MLX's function: summed
    in 16 bit the result would be off by several percent.
    Errors: DTypeError for integers.  Source: mlx.core.softmax.
    """
    del precise
    a = operand(a)
    return apply(Softmax(_axes(axis, a)), a)

"""Elementwise ops: one line declares the op, its dtype rule, its NumPy meaning and its public function."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np

from qgraph._errors import DTypeError, QGraphError
from qgraph.ir.dtypes import BOOL, F32, DType, dtype_of, floating, promote
from qgraph.ir.op import Op, Types
from qgraph.ir.types import Packing, TensorType, broadcast_shapes
from qgraph.ops.dispatch import Array, ArrayLike, apply, frontend, frontend_of, operand, operands, type_of

_np: Any = np  # for expressions of Any, whose types NumPy's stubs do not know
Rule = Callable[[DType], DType]


def same(dtype: DType) -> DType:
    """The result has the operands' dtype."""
    return dtype


def boolean(dtype: DType) -> DType:
    """The result is bool."""
    del dtype
    return BOOL


def real_part(dtype: DType) -> DType:
    """The dtype of the parts of a complex number; others are real."""
    return F32 if dtype.is_complex else dtype


def signed(dtype: DType) -> DType:
    """The result has the operands' dtype, which must not be bool."""
    if dtype is BOOL:
        raise DTypeError("bool has no sign", fix="use qg.logical_not, or cast to an integer")
    return dtype


class Elementwise(Op):
    """An op on broadcast operands; `rule` gives the result's dtype from the promoted one."""

    elementwise = True
    rule: ClassVar[Rule]
    arity: ClassVar[int] = 1
    _one: ClassVar[Elementwise]

    def infer(self, *types: TensorType) -> TensorType:
        """Broadcast shape; dtype by the rule."""
        if len(types) != self.arity:
            raise QGraphError(f"{self.name} takes {self.arity} operands, found {len(types)}")
        dtype = type(self).rule(promote(*(t.dtype for t in types)))
        return TensorType(broadcast_shapes(*(t.shape for t in types)), dtype)

    # No parameters, so one instance each: a key compares and hashes it by identity. (As a dataclass each of
    # the sixty would also cost half a millisecond of the import.)
    def __new__(cls) -> Elementwise:
        one = cls.__dict__.get("_one")
        if one is None:
            one = super().__new__(cls)
            cls._one = one
        return one

    __eq__ = object.__eq__  # pyright: ignore[reportAssignmentType]
    __hash__ = object.__hash__

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"an op is immutable; cannot set {name!r}")


def _declare(name: str, reference: Callable[..., Any], rule: Rule, **flags: object) -> Op:
    """Make the op class of `name` and its one instance."""
    arity = cast(int, flags.get("arity", 1))
    mlx = flags.pop("mlx", None) or f"mx.{name}({', '.join(f'{{{i}}}' for i in range(arity))})"
    body = {"name": name, "reference": staticmethod(reference), "rule": staticmethod(rule), "mlx": mlx}
    kind = type(f"{name.title().replace('_', '')}", (Elementwise,), {**body, **flags, "__module__": __name__})
    return cast(Op, kind())


def _unary(
    name: str,
    meaning: str,
    reference: Callable[..., Any],
    rule: Rule = floating,
    flops: int = 1,
    mlx: str = "",
) -> Callable[[ArrayLike], Array]:
    op = _declare(name, reference, rule, flops_per_element=flops, mlx=mlx)

    def function(a: ArrayLike, /) -> Array:
        return apply(op, operand(a))

    return _documented(function, name, f"{meaning}, elementwise.", "a")


def _binary(
    name: str,
    meaning: str,
    reference: Callable[..., Any],
    rule: Rule = same,
    commutes: bool = False,
    mlx: str = "",
) -> Callable[[ArrayLike, ArrayLike], Array]:
    op = _declare(name, reference, rule, arity=2, commutes=commutes, mlx=mlx)

    def function(a: ArrayLike, b: ArrayLike, /) -> Array:
        return apply(op, *operands(a, b))

    return _documented(function, name, f"{meaning}, elementwise with broadcasting.", "a, b")


def _documented(function: Callable[..., Array], name: str, meaning: str, args: str) -> Callable[..., Array]:
    function.__name__ = function.__qualname__ = name
    function.__doc__ = f"{meaning}\n\n    Shape: that of {args} broadcast.  Source: mlx.core.{name}.\n    "
    return frontend(function)


def _exact_gelu(x: Any) -> Any:
    return x * 0.5 * (1 + _erf(x / math.sqrt(2)))


_erf = np.vectorize(math.erf, otypes=[np.float64])


def _sigmoid(x: Any) -> Any:
    return _np.where(
        x >= 0, 1 / (1 + _np.exp(-_np.abs(x))), _np.exp(-_np.abs(x)) / (1 + _np.exp(-_np.abs(x)))
    )


def _silu(x: Any) -> Any:
    return x * _sigmoid(x)


def _relu(x: Any) -> Any:
    return np.maximum(x, 0)


def _rsqrt(x: Any) -> Any:
    return 1 / np.sqrt(x)


def _reciprocal(x: Any) -> Any:
    return 1 / np.asarray(x, np.float64)


def _round_half_even(x: Any) -> Any:
    return _np.round(x)


def _erfinv(x: Any) -> Any:
    """By bisection of erf: both are odd and rise, and erf(6) is 1."""
    x = np.asarray(x, np.float64)
    low, high = np.full(x.shape, -6.0), np.full(x.shape, 6.0)
    for _ in range(60):
        middle: Any = (low + high) / 2
        below = _erf(middle) < x
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    inside: Any = np.where(np.abs(x) < 1, (low + high) / 2, np.copysign(np.inf, x))
    return np.where(x == 0, x, np.where(np.abs(x) <= 1, inside, np.nan))  # bisection ends beside 0


def _quotient(a: Any, b: Any) -> Any:
    return _np.true_divide(a, b)


negative = _unary("negative", "-a", np.negative, signed)
abs = _unary("abs", "Absolute value", np.abs, real_part)
sign = _unary("sign", "-1, 0 or 1 by the sign", np.sign, same)
square = _unary("square", "a times a", np.square, same)
floor = _unary("floor", "Largest integer not above a", np.floor, same)
ceil = _unary("ceil", "Smallest integer not below a", np.ceil, same)
round = _unary("round", "Nearest integer, halves to even", _round_half_even, same)
exp = _unary("exp", "e to the power a", np.exp, flops=8)
expm1 = _unary("expm1", "exp(a) - 1, exact near 0", np.expm1, flops=8)
log = _unary("log", "Natural logarithm", np.log, flops=8)
log2 = _unary("log2", "Logarithm to base 2", np.log2, flops=8)
log10 = _unary("log10", "Logarithm to base 10", np.log10, flops=8)
log1p = _unary("log1p", "log(1 + a), exact near 0", np.log1p, flops=8)
sqrt = _unary("sqrt", "Square root", np.sqrt)
rsqrt = _unary("rsqrt", "1 / sqrt(a)", _rsqrt, flops=2)
reciprocal = _unary("reciprocal", "1 / a", _reciprocal)
sin = _unary("sin", "Sine", np.sin, flops=8)
cos = _unary("cos", "Cosine", np.cos, flops=8)
tan = _unary("tan", "Tangent", np.tan, flops=8)
arcsin = _unary("arcsin", "Inverse sine", np.arcsin, flops=8)
arccos = _unary("arccos", "Inverse cosine", np.arccos, flops=8)
arctan = _unary("arctan", "Inverse tangent", np.arctan, flops=8)
sinh = _unary("sinh", "Hyperbolic sine", np.sinh, flops=8)
cosh = _unary("cosh", "Hyperbolic cosine", np.cosh, flops=8)
tanh = _unary("tanh", "Hyperbolic tangent", np.tanh, flops=8)
arcsinh = _unary("arcsinh", "Inverse hyperbolic sine", np.arcsinh, flops=8)
arccosh = _unary("arccosh", "Inverse hyperbolic cosine", np.arccosh, flops=8)
arctanh = _unary("arctanh", "Inverse hyperbolic tangent", np.arctanh, flops=8)
erf = _unary("erf", "Error function", _erf, flops=8)
erfinv = _unary("erfinv", "The inverse of the error function", _erfinv, flops=8)
sigmoid = _unary("sigmoid", "1 / (1 + exp(-a))", _sigmoid, flops=10)
silu = _unary("silu", "a * sigmoid(a)", _silu, flops=11, mlx="({0} * mx.sigmoid({0}))")
gelu = _unary(
    "gelu",
    "a * Phi(a), exact",
    _exact_gelu,
    flops=12,
    mlx="({0} * (1 + mx.erf({0} / 1.4142135623730951)) / 2)",
)
relu = _unary("relu", "max(a, 0)", _relu, same, mlx="mx.maximum({0}, 0)")
bitwise_invert = _unary("bitwise_invert", "Every bit inverted", np.invert, same)
logical_not = _unary("logical_not", "Whether a is zero", np.logical_not, boolean)
real = _unary("real", "The real part", np.real, real_part)
imag = _unary("imag", "The imaginary part", np.imag, real_part)
conjugate = _unary("conjugate", "The complex conjugate", np.conjugate, same)
isnan = _unary("isnan", "Whether a is NaN", np.isnan, boolean)
isinf = _unary("isinf", "Whether a is infinite", np.isinf, boolean)
isfinite = _unary("isfinite", "Whether a is finite", np.isfinite, boolean)

add = _binary("add", "a + b", np.add, commutes=True)
subtract = _binary("subtract", "a - b", np.subtract)
multiply = _binary("multiply", "a * b", np.multiply, commutes=True)
divide = _binary("divide", "a / b", _quotient, floating)
floor_divide = _binary("floor_divide", "a // b", np.floor_divide)
remainder = _binary("remainder", "a % b, with the sign of b", np.remainder)
power = _binary("power", "a to the power b", np.power)
maximum = _binary("maximum", "The larger", np.maximum, commutes=True)
minimum = _binary("minimum", "The smaller", np.minimum, commutes=True)
logaddexp = _binary("logaddexp", "log(exp(a) + exp(b))", np.logaddexp, floating, commutes=True)
arctan2 = _binary("arctan2", "The angle of the point (b, a)", np.arctan2, floating)
equal = _binary("equal", "a == b", np.equal, boolean, commutes=True)
not_equal = _binary("not_equal", "a != b", np.not_equal, boolean, commutes=True)
less = _binary("less", "a < b", np.less, boolean)
less_equal = _binary("less_equal", "a <= b", np.less_equal, boolean)
greater = _binary("greater", "a > b", np.greater, boolean)
greater_equal = _binary("greater_equal", "a >= b", np.greater_equal, boolean)
logical_and = _binary("logical_and", "a and b", np.logical_and, boolean, commutes=True)
logical_or = _binary("logical_or", "a or b", np.logical_or, boolean, commutes=True)
bitwise_and = _binary("bitwise_and", "a & b", np.bitwise_and, commutes=True)
bitwise_or = _binary("bitwise_or", "a | b", np.bitwise_or, commutes=True)
bitwise_xor = _binary("bitwise_xor", "a ^ b", np.bitwise_xor, commutes=True)
left_shift = _binary("left_shift", "a << b", np.left_shift)
right_shift = _binary("right_shift", "a >> b", np.right_shift)


@dataclass(frozen=True)
class Where(Op):
    """Choose by a condition."""

    name = "where"
    mlx = "mx.where({0}, {1}, {2})"
    elementwise = True

    def infer(self, condition: TensorType, x: TensorType, y: TensorType) -> TensorType:
        """All three broadcast; x and y promote."""
        shape = broadcast_shapes(condition.shape, x.shape, y.shape)
        return TensorType(shape, promote(x.dtype, y.dtype))

    reference = staticmethod(np.where)


@frontend
def where(condition: ArrayLike, x: ArrayLike, y: ArrayLike, /) -> Array:
    """`x` where `condition` holds, else `y`.  Shape: all broadcast.  Source: mlx.core.where."""
    return apply(Where(), operand(condition), *operands(x, y))


@dataclass(frozen=True)
class Cast(Op):
    """Change the dtype. A quantized value keeps its storage and changes its logical dtype."""

    name = "cast"
    mlx = "{0}.astype({dtype})"
    elementwise = True
    packed = True
    dtype: DType = F32

    def infer(self, x: TensorType) -> TensorType:
        """The shape of x; another float dtype keeps the packing."""
        carried = self.carry(x) if x.packing else None
        return TensorType(x.shape, self.dtype, carried if isinstance(carried, Packing) else None)

    def carry(self, x: TensorType) -> Packing | str:
        """Float to float keeps the storage; the scales keep their own dtype."""
        assert x.packing is not None
        if not self.dtype.is_float or self.dtype.size > F32.size:  # no kernel gives float64
            return f"a cast to {self.dtype} needs the numbers themselves"
        return x.packing

    def emit(self, operands: Any, inputs: Types, outputs: Types) -> Any:
        """Nothing to do for a packed value."""
        if outputs[0].packing is not None:
            return operands[0]
        return super().emit(operands, inputs, outputs)

    def reference(self, x: Any) -> Any:
        """Truncation to integers; the float dtypes are all float64 in the reference."""
        if self.dtype.is_float:
            return np.asarray(x, np.float64)
        return np.asarray(x).astype(self.dtype.mlx_name.rstrip("_"))


@frontend_of("cast")
def astype(a: ArrayLike, dtype: Any) -> Array:
    """`a` as `dtype` (an mx.Dtype).  A quantized value stays packed between float dtypes.

    Source: mlx.core.array.astype.
    """
    a, target = operand(a), dtype_of(dtype)
    return a if type_of(a).dtype is target else apply(Cast(target), a)


def clip(a: ArrayLike, a_min: ArrayLike | None, a_max: ArrayLike | None) -> Array:
    """`a` limited to a_min … a_max; None leaves a side open.  Source: mlx.core.clip."""
    if a_min is None and a_max is None:
        raise DTypeError("clip: both limits are None", fix="give a_min, a_max or both")
    out = a if a_min is None else maximum(a, a_min)
    return out if a_max is None else minimum(out, a_max)
